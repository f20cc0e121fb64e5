"""How fast vLLM serves a checkpoint on this machine, and in how much memory.

:func:`measure` times an engine in this process, :func:`run` gives it a process of its own. To compare engines, run
them in turns and take the :func:`median` of each.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crepe_llm.checkpoints import read_folder
from crepe_llm.checkpoints.reading import StoredTensor, has_weights

ENVIRONMENT = {
    # The engine in the measuring process: its steps can be timed one by one, and no second process holds memory.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}
"""The environment in which engines are measured."""

_KV_CACHE_BYTES = 512 << 20
_FLOATS = ("BF16", "F16", "F32", "F64")  # which are held in the served dtype; codes of 8 bits stay what they are


@dataclass(frozen=True)
class Case:
    """A load: so many requests at once, each with a prompt of so many tokens."""

    prompt: int
    streams: int


@dataclass(frozen=True)
class Engine:
    """What is measured: a checkpoint's folder and the dtype it is served in, eagerly or compiled, under a name."""

    name: str
    model: str
    dtype: str
    compiled: bool = False


def measure(
    model: str, dtype: Any, cases: Sequence[Case], *, tokens: int = 32, repeats: int = 3, compiled: bool = False
) -> dict[str, Any]:
    """Serves random prompts greedily with vLLM, and times every step of the engine.

    Must run in a process with :data:`ENVIRONMENT`, as its only engine.

    Args:
        model: the folder of a checkpoint; no tokenizer is needed.
        dtype: the model's dtype in vLLM: "bfloat16", "float16" or "float32".
        cases: the loads.
        tokens: how many tokens each request generates.
        repeats: how often each load is run.
        compiled: whether vLLM compiles the model, as it does by default; else it runs eagerly.

    Returns:
        ``load_s``, seconds from the folder to a ready engine; ``anonymous_bytes``, how much the process's anonymous
        memory grew by then, less the key-value cache: weights, and what vLLM keeps beside them; ``model_s``, seconds in
        which vLLM built the model, read its weights and turned them into what products read; ``packing_s``, the last
        part of it, as far as layers' own methods do it; ``model_bytes`` and
        ``peak_bytes``, how much the process's anonymous memory grew meanwhile, at the end and at most;
        ``cases``, for each load the median ``first_token_s`` (request to first token, mean of the streams) and
        ``tokens_per_s`` (streams over the median time of a step in which every stream decodes).
    """
    before = _anonymous_bytes()
    loading = _Loading()
    begun = time.perf_counter()
    engine = started(model, dtype, cases, tokens=tokens, compiled=compiled)
    load = time.perf_counter() - begun
    anonymous = _anonymous_bytes() - before - _KV_CACHE_BYTES
    load_with = Load(engine.llm_engine, tokens)
    load_with(Case(min(case.prompt for case in cases), 1))  # first touches and lazy imports
    measured = []
    for case in cases:
        runs = [load_with(case) for _ in range(repeats)]
        measured.append(
            {
                **asdict(case),
                "first_token_s": statistics.median(statistics.mean(first) for first, _ in runs),
                "tokens_per_s": case.streams / statistics.median(step for _, steps in runs for step in steps),
            }
        )
    return {"load_s": load, "anonymous_bytes": anonymous, **loading.figures, "cases": measured}


def started(model: str, dtype: Any, cases: Sequence[Case], *, tokens: int, compiled: bool) -> Any:
    """vLLM with a model, ready for these loads; arguments as in :func:`measure`."""
    from vllm import LLM

    return LLM(
        model,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        max_model_len=max(case.prompt for case in cases) + tokens,
        max_num_seqs=max(case.streams for case in cases),
        kv_cache_memory_bytes=_KV_CACHE_BYTES,
        seed=0,
    )


class PeakMemory:
    """The growth of this process's anonymous memory in a ``with`` block, in bytes: at its end, and at most.

    Memory is sampled every few milliseconds.
    """

    def __enter__(self) -> "PeakMemory":
        self._before = self._peak = _anonymous_bytes()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._sampler.join()
        end = _anonymous_bytes()
        self.growth, self.peak = end - self._before, max(self._peak, end) - self._before

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            self._peak = max(self._peak, _anonymous_bytes())


class _Loading:
    """Measures vLLM while it loads the next model."""

    def __init__(self) -> None:
        from vllm.model_executor.model_loader import base_loader, default_loader

        self.figures: dict[str, Any] = {"packing_s": 0.0}
        load = base_loader.BaseModelLoader.load_model

        def load_model(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            with PeakMemory() as memory:
                model = load(*args, **kwargs)
            seconds = time.perf_counter() - begun
            self.figures |= {"model_s": seconds, "model_bytes": memory.growth, "peak_bytes": memory.peak}
            return model

        base_loader.BaseModelLoader.load_model = load_model  # type: ignore[method-assign]
        read = default_loader.DefaultModelLoader.load_weights

        def load_weights(loader: Any, model: Any, *args: Any) -> None:
            methods = {id(m): m for m in (getattr(module, "quant_method", None) for module in model.modules()) if m}
            for method in methods.values():  # some layers share one
                method.process_weights_after_loading = self._timed(method.process_weights_after_loading)
            read(loader, model, *args)

        default_loader.DefaultModelLoader.load_weights = load_weights  # type: ignore[method-assign]

    def _timed(self, function: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(layer: Any) -> None:
            begun = time.perf_counter()
            function(layer)
            self.figures["packing_s"] += time.perf_counter() - begun

        return call


class Load:
    """Loads a vLLM engine with random prompts, for each of which it generates so many tokens, and times it."""

    def __init__(self, engine: Any, tokens: int) -> None:
        import torch
        from vllm import SamplingParams

        self._engine = engine
        self._wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._vocabulary = engine.model_config.get_vocab_size()
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, case: Case) -> tuple[list[float], list[float]]:
        """Seconds to each stream's first token, and of every step in which all streams decode."""
        import torch

        first: dict[str, float] = {}
        steps: list[float] = []
        begun = time.perf_counter()
        for stream in range(case.streams):
            prompt = torch.randint(0, self._vocabulary, (case.prompt,), generator=self._generator).tolist()
            self._engine.add_request(str(stream), {"prompt_token_ids": prompt}, self._wanted)
        while self._engine.has_unfinished_requests():
            decoding = len(first) == case.streams
            step = time.perf_counter()
            outputs = self._engine.step()
            now = time.perf_counter()
            if decoding:
                steps.append(now - step)
            for output in outputs:
                first.setdefault(output.request_id, now - begun)
        return list(first.values()), steps


def complete(model: str, dtype: Any, prompt: str, *, tokens: int = 48) -> dict[str, Any]:
    """Lets vLLM continue a text, eagerly and greedily; where to run it is said at :func:`measure`.

    Args:
        model: the folder of a checkpoint with its tokenizer.
        dtype: as in :func:`measure`.
        prompt: the text to continue.
        tokens: how many tokens are generated.

    Returns:
        ``text``, what follows the prompt; ``tokens_per_s``, over a second run, prompt included; ``anonymous_bytes``, as
        in :func:`measure`.
    """
    from vllm import LLM, SamplingParams

    before = _anonymous_bytes()
    engine = LLM(
        model, dtype=dtype, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=_KV_CACHE_BYTES, seed=0
    )
    anonymous = _anonymous_bytes() - before - _KV_CACHE_BYTES
    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    engine.generate([prompt], wanted, use_tqdm=False)
    started = time.perf_counter()
    (output,) = engine.generate([prompt], wanted, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {"text": output.outputs[0].text, "tokens_per_s": tokens / seconds, "anonymous_bytes": anonymous}


def run(engine: Engine, cases: Sequence[Case], *, tokens: int = 32, repeats: int = 3) -> dict[str, Any]:
    """Starts an engine in a process of its own and returns what :func:`measure` says of it, with ``weight_bytes``
    (:func:`weight_bytes`; None of a model that lies in no folder of safetensors).

    Raises:
        RuntimeError: the engine failed; the message ends with what it printed last.
    """
    loads = [asdict(case) for case in cases]
    return _in_process(engine, "measure", cases=loads, tokens=tokens, repeats=repeats, compiled=engine.compiled)


def run_completion(engine: Engine, prompt: str, *, tokens: int = 48) -> dict[str, Any]:
    """As :func:`run`, for :func:`complete`."""
    return _in_process(engine, "complete", prompt=prompt, tokens=tokens)


def weight_bytes(model: str, dtype: str) -> int:
    """How many bytes a checkpoint's weights take when its floating-point tensors are held in ``dtype``.

    Args:
        model: the checkpoint's folder.
        dtype: "bfloat16", "float16" or "float32".

    Raises:
        FormatError: the checkpoint is damaged.
    """
    return held_bytes(read_folder(model).tensors.values(), dtype)


def held_bytes(tensors: Iterable[StoredTensor], dtype: str) -> int:
    """How many bytes tensors of a checkpoint take when the floating-point ones are held in ``dtype``."""
    width = {"float32": 4}.get(dtype, 2)
    return sum(math.prod(each.shape) * width if each.dtype in _FLOATS else each.size for each in tensors)


def _in_process(engine: Engine, function: str, **options: Any) -> dict[str, Any]:
    request = {"function": function, "model": engine.model, "dtype": engine.dtype, **options}
    command = [sys.executable, "-m", "crepe_llm.evaluation.throughput", json.dumps(request)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{engine.name}: {engine.model} was not served:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    known = weight_bytes(engine.model, engine.dtype) if has_weights(engine.model) else None
    return {**result, "weight_bytes": known}


def median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over several runs of one engine with the same loads."""
    first = runs[0]
    figures = ("load_s", "anonymous_bytes", "model_s", "packing_s", "model_bytes", "peak_bytes", "weight_bytes")
    return {
        **{
            figure: statistics.median(run[figure] for run in runs)
            for figure in figures
            if first.get(figure) is not None
        },
        "cases": [
            {
                **case,
                **{
                    figure: statistics.median(run["cases"][index][figure] for run in runs)
                    for figure in ("first_token_s", "tokens_per_s")
                },
            }
            for index, case in enumerate(first["cases"])
        ],
    }


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon; memory can be measured on Linux only")


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    function = request.pop("function")
    if function == "complete":
        return complete(**request)
    return measure(cases=[Case(**case) for case in request.pop("cases")], **request)


if __name__ == "__main__":
    print(json.dumps(_answer(json.loads(sys.argv[1]))))
