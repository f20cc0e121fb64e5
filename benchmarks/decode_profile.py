"""Where the time of a decoded token goes in vLLM: our kernels, our Python, the model, the engine.

    python benchmarks/decode_profile.py                                  # 0.5B, every format of ours, eagerly
    python benchmarks/decode_profile.py --compiled                       # vLLM's default mode
    python benchmarks/decode_profile.py --engines "vLLM bf16" "2:4 bf16" --models 1b --streams 8
    OMP_NUM_THREADS=1 python benchmarks/decode_profile.py --cpu-time     # on a machine that does other work, too

One stream decodes (or --streams together), and functions are timed without those that they call; medians over the
decoding steps, in ms a step. "kernels" is the C++ library, "our Python" the linear and embedding methods,
`kernels.linear` and its checks. The operator of our 2:4 products is C++, too: its time comes from torch's profiler in a
second load. A compiled model is one function: there attention comes from the profiler as well, and norms, activations,
residual sums and the calls of operators are what is left in "model".
The timers themselves take about 0.1 ms of a step. The models are those of benchmarks/serve.py. Every engine is a
process of its own, and its figures are a row of --results.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crepe_llm.evaluation.throughput import ENVIRONMENT, Case, Load, started
from records import RESULTS, append
from serve_engines import ENGINES, Serving, is_ours
from serve_models import MODELS, stored

# Raised by every change of a default or of how something is measured.
# 2: --cpu-time is a condition. 3: products of 2:4 INT4 quantize activations. 4: --streams is a condition
# 5: products of INT8 heads quantize activations
PROTOCOL = 5

KERNELS, OURS = "kernels", "our Python"
# vLLM's classes of the model's parts.
PARTS = {
    "RMSNorm": "norm",
    "RotaryEmbedding": "rotary",
    "Llama3RotaryEmbedding": "rotary",
    "SiluAndMul": "activation",
    "Attention": "attention",
    "LogitsProcessor": "logits",
}
# Operators that torch's profiler times.
OPERATORS = {
    "crepe_llm::sparse24_linear": KERNELS,
    "vllm::unified_attention_with_output": "attention",
    "vllm::unified_kv_cache_update": "attention",
}
PRODUCTS, MODEL, SAMPLING, ENGINE = "vLLM's products", "model", "sampling", "engine"
COLUMNS = (KERNELS, OURS, PRODUCTS, *dict.fromkeys(PARTS.values()), MODEL, SAMPLING, ENGINE)


class Clock:
    """Seconds of named parts, each without the parts that it calls."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now = now
        self._parts: list[str] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed as this part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._count()
            self._parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._count()
                self._parts.pop()

        return call

    def _count(self) -> None:
        now = self._now()
        if self._parts:
            self.seconds[self._parts[-1]] = self.seconds.get(self._parts[-1], 0.0) + now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


def time_ours(clock: Clock) -> None:
    """Times the kernel library and the Python around it."""
    from crepe_llm import kernels
    from crepe_llm.kernels import cpu

    library = cpu.library()
    if library is None:
        raise RuntimeError("the kernel library is missing; install the package with a C++ compiler")
    library.crepe_multiply = clock.timed(KERNELS, library.crepe_multiply)
    kernels.linear = clock.timed(OURS, kernels.linear)


def time_model(clock: Clock, model: Any, compiled: bool) -> None:
    """Times a model that vLLM has loaded, and its parts where it runs eagerly."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is not None and not compiled:
            part = OURS if hasattr(module, "packed") else PRODUCTS
            for name in ("apply", "embedding"):
                if hasattr(method, name):
                    setattr(method, name, clock.timed(part, getattr(method, name)))
        part = PARTS.get(type(module).__name__, "")
        if part and (not compiled or part == "logits"):
            module.forward = clock.timed(part, module.forward)
    model.forward = clock.timed(MODEL, model.forward)


def operator_seconds(run: Callable[[], object], steps: int) -> dict[str, float]:
    """Seconds of a decoding step in operators, by part.

    ``run`` takes ``steps`` steps, the first of which reads the prompt. For each call in a step, the median over the
    steps counts.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        run()
    found: dict[str, float] = {}
    for name, part in OPERATORS.items():
        times = [event.time_range.elapsed_us() for event in recorded.events() if event.name == name]
        calls = len(times) // steps
        medians = [statistics.median(times[calls + call :: calls]) for call in range(calls)]
        found[part] = found.get(part, 0.0) + 1e-6 * sum(medians)
    return found


def profile(
    folder: str, dtype: str, compiled: bool, cpu_time: bool, prompt: int, streams: int, tokens: int
) -> dict[str, Any]:
    """The medians of a decoding step's seconds by part, ``ms`` and ``total_ms``, in this process."""
    clock = Clock(time.thread_time if cpu_time else time.perf_counter)
    case = Case(prompt, streams)
    engine = started(folder, dtype, [case], tokens=tokens, compiled=compiled)
    load = Load(engine.llm_engine, tokens)
    load(case)
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    time_ours(clock)
    time_model(clock, runner.model, compiled)
    runner._sample = clock.timed(SAMPLING, runner._sample)
    core = engine.llm_engine
    steps: list[dict[str, float]] = []
    step = clock.timed(ENGINE, core.step)

    def recorded() -> Any:
        outputs = step()
        steps.append(clock.take())
        return outputs

    core.step = recorded
    load(case)
    decoding = steps[1:]
    parts = {name for found in decoding for name in found}
    seconds = {name: statistics.median(found.get(name, 0.0) for found in decoding) for name in parts}
    total = statistics.median(sum(found.values()) for found in decoding)
    core.step = step
    for part, spent in operator_seconds(lambda: load(case), tokens).items():
        if compiled or part == KERNELS:  # of a model that runs eagerly the module's own time is known
            seconds[part] = seconds.get(part, 0.0) + spent
            caller = MODEL if compiled else OURS
            seconds[caller] = seconds.get(caller, 0.0) - spent
    layers = sum(hasattr(module, "packed") for module in runner.model.modules())
    return {
        "ms": {name: 1e3 * value for name, value in seconds.items()},
        "total_ms": 1e3 * total,
        "packed_layers": layers,
    }


def in_process(request: dict[str, Any], name: str) -> dict[str, Any]:
    """:func:`profile` in a process of its own; RuntimeError, with the end of its output, where it fails."""
    command = [sys.executable, __file__, "--request", json.dumps(request)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {request['folder']} was not served:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Profile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    vllm = [name for name, what in ENGINES.items() if isinstance(what, Serving)]
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.5b"])
    parser.add_argument("--engines", nargs="+", choices=vllm, default=[name for name in vllm if is_ours(name)])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are made and kept")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default mode; else it runs eagerly")
    parser.add_argument("--cpu-time", action="store_true", help="the calling thread's processor time, not the clock's")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (%(default)s)")
    parser.add_argument("--streams", type=int, default=1, help="requests that are decoded together (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each that are decoded (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "decode_profile.jsonl", help="a row an engine")
    parser.add_argument("--request", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.request:
        print(json.dumps(profile(**options.request)))
        return
    mode = {
        "compiled": options.compiled,
        "cpu_time": options.cpu_time,
        "prompt": options.prompt,
        "streams": options.streams,
        "tokens": options.tokens,
    }
    print(f"{'compiled' if options.compiled else 'eager'}, {torch.get_num_threads()} threads, ms a step, medians\n")
    print(f"| | all | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 2)}|", flush=True)
    for model in options.models:
        for name in options.engines:
            engine = ENGINES[name]
            assert isinstance(engine, Serving)
            folder = stored(model, engine.storage, options.folder)
            found = in_process({"folder": str(folder), "dtype": engine.dtype, **mode}, name)
            append(options.results, PROTOCOL, {"model": model, "engine": name, **mode, **found})
            cells = [f"{found['ms'].get(column, 0.0):.2f}" for column in COLUMNS]
            print(f"| {model}, {name} | {found['total_ms']:.2f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
