"""How time and memory of pruning grow with a model's width, in Llama-3.2-1B's, Llama-3-8B's and Llama-3-70B's shapes.

    python benchmarks/scale.py                           # all: hours, mostly the 70B shapes
    python benchmarks/scale.py --model llama-3.2-1b      # one model
    python benchmarks/scale.py --model tiny              # a try
    python benchmarks/scale.py --report                  # the tables of what has been measured

One layer of each kind has random weights and inputs; each stage runs on it alone, in a process of its own, so that its
peak memory is its own. Seconds are processor seconds of one thread, on which other work on the machine bears little. A
model's time is the sum over kinds, as often as it has them. The stages: `inputs` (Gram matrix and sums of a layer's
tokens; of a model for 128 x 2048 tokens, once for layers that share their inputs), `mask` (crepe_2of4), `pcg`, `admm`,
`permutation` (the search on a sample of rows), `candidate` (one of PHO's 200), `saving` (packing). For a GPU the time
is arithmetic: the larger of operations over its fp32 rate and bytes over its bandwidth, for stages whose operations are
counted. A stage that is recorded is not measured again.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK
from crepe_llm.functional.admm import ADMMOptions, admm
from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.permutation import permute_channels, sample_rows
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.search.fitness import DEFAULT_PROXY, PROXIES, LayerSample, evaluate
from crepe_llm.search.space import RIA, Mask
from records import RESULTS, Row, append, is_done, read

PROTOCOL = 1
COEFFICIENTS = {"row": 1.0, "column": 7.0, "neighbourhood": 6.0, "kernel_size": 31, "activation_exponent": 0.85}
PERMUTED_ROWS, PCG, ADMM, ROUNDS, REFINEMENT = 8192, 10, 20, 15, 10
CALIBRATION_TOKENS = 128 * 2048  # of a whole run; the time of `inputs` grows with them
# Inputs are gathered once for layers that share them: q, k and v; gate and up.
SHARED = {"k_proj, v_proj": 0, "gate_proj, up_proj": 1}


@dataclass(frozen=True)
class Shape:
    """The widths of a Llama: of the hidden states, the FFN and the keys; and how many blocks it has."""

    hidden: int
    ffn: int
    keys: int
    blocks: int

    @property
    def kinds(self) -> dict[str, tuple[int, int, int]]:
        """Of each kind of layer d_out, d_in, and how many a block has."""
        return {
            "q_proj, o_proj": (self.hidden, self.hidden, 2),
            "k_proj, v_proj": (self.keys, self.hidden, 2),
            "gate_proj, up_proj": (self.ffn, self.hidden, 2),
            "down_proj": (self.hidden, self.ffn, 1),
        }


MODELS = {
    "tiny": Shape(64, 128, 32, 2),
    "llama-3.2-1b": Shape(2048, 8192, 512, 16),
    "llama-3-8b": Shape(4096, 14336, 1024, 32),
    "llama-3-70b": Shape(8192, 28672, 1024, 80),
}


class Layer:
    """A layer of random weights (bf16) with the statistics of random inputs of unequal channels."""

    def __init__(self, rows: int, columns: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(rows, columns, generator=generator).mul_(0.02).bfloat16()
        scales = torch.rand(columns, generator=generator) + 0.5
        self.inputs = torch.randn(tokens, columns, generator=generator) * scales

    def statistics(self, gram: bool = True) -> InputStatistics:
        found = InputStatistics(self.weight.shape[1], gram=gram)
        found.update(self.inputs)
        return found

    def scores(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        return crepe_scores(weight, statistics.norm, **COEFFICIENTS)


def keep(scores: torch.Tensor) -> torch.Tensor:
    return keep_mask(scores, 0.5, "2:4")


def stages(layer: Layer) -> dict[str, Callable[[], Callable[[], object]]]:
    """Of each stage a function that prepares it and returns what is timed."""

    def mask() -> Callable[[], object]:
        statistics = layer.statistics(gram=False)
        return lambda: keep(layer.scores(layer.weight, statistics))

    def pcg() -> Callable[[], object]:
        statistics = layer.statistics()
        kept = keep(layer.scores(layer.weight, statistics))
        # No tolerance, so that each does as much.
        return lambda: conjugate_gradients(layer.weight, kept, statistics.gram, iterations=PCG, tolerance=0.0)

    def solve() -> Callable[[], object]:
        statistics = layer.statistics()
        options = ADMMOptions(rounds=ROUNDS, iterations=ADMM, refinement=REFINEMENT)
        scores = lambda weight: layer.scores(weight, statistics)  # noqa: E731
        return lambda: admm(layer.weight, statistics.gram, scores, keep, options)

    def permutation() -> Callable[[], object]:
        scores = layer.scores(layer.weight, layer.statistics(gram=False))
        (rows,) = sample_rows([len(scores)], PERMUTED_ROWS, 0)
        return lambda: permute_channels(scores[rows], 2, 4)

    def candidate() -> Callable[[], object]:
        statistics = layer.statistics()
        sample = LayerSample(
            "layer", layer.weight, statistics.norm, statistics.gram, rows=96, kernel_sizes=(3,), seed=0
        )
        return lambda: evaluate([sample], RIA, Mask("2:4", 0.5), PROXIES[DEFAULT_PROXY])

    def saving() -> Callable[[], object]:
        kept = keep(layer.scores(layer.weight, layer.statistics(gram=False)))
        weight = layer.weight.masked_fill(~kept, 0)
        return lambda: SPARSE_24_BITMASK.pack(weight, kept)

    return {
        "inputs": lambda: layer.statistics,
        "mask": mask,
        "pcg": pcg,
        "admm": solve,
        "permutation": permutation,
        "candidate": candidate,
        "saving": saving,
    }


STAGES = ("inputs", "mask", "pcg", "admm", "permutation", "candidate", "saving")


def operations(stage: str, rows: int, columns: int, tokens: int) -> tuple[float, float] | None:
    """Multiplications and additions, and bytes moved; None where they are not counted."""
    product, weights = 2.0 * rows * columns**2, 4.0 * rows * columns
    match stage:
        case "inputs":
            return 2.0 * tokens * columns**2, 4.0 * (tokens * columns + columns**2)
        case "mask":
            return 40.0 * rows * columns, 10 * weights
        case "pcg":
            return PCG * product, PCG * (8 * weights + 4.0 * columns**2)
        case "admm":
            solving = ADMM * 2 * product + REFINEMENT * product + columns**3
            return solving, (ADMM * 12 + ROUNDS * 14 + REFINEMENT * 8) * weights
        case "saving":
            return 4.0 * rows * columns, 2 * weights
    return None


def measure(stage: str, rows: int, columns: int, tokens: int) -> dict[str, float]:
    """Processor seconds of a stage on a layer, and the most memory (bytes) of this process beyond torch's own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run = stages(Layer(rows, columns, tokens))[stage]()
    started = time.process_time()
    with torch.no_grad():
        run()
    seconds = time.process_time() - started
    return {"seconds": seconds, "bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def apart(stage: str, rows: int, columns: int, options: argparse.Namespace) -> dict[str, float]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, __file__, "--layer", stage, str(rows), str(columns), "--tokens", str(options.tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{stage} of {rows} x {columns} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def recorded(options: argparse.Namespace, model: str, stage: str) -> dict[str, Row]:
    """Of each kind of layer the row of a stage, where it has been measured."""
    rows = read(options.results)
    found = {}
    for kind in MODELS[model].kinds:
        key = {"model": model, "stage": stage, "kind": kind, "tokens": options.tokens}
        same = [row for row in rows if is_done(key, [row], PROTOCOL)]
        if same:
            found[kind] = same[-1]
    return found


def whole(options: argparse.Namespace, model: str, stage: str, rows: dict[str, Row]) -> Row:
    """What a stage takes by its rows: seconds a million weights, peak memory, the whole model here and on a GPU.

    `without` names the kinds of layer that have no row. They are left out of the figures.
    """
    shape, seconds, gpu, weights = MODELS[model], 0.0, 0.0, 0
    for kind, row in rows.items():
        d_out, d_in, count = shape.kinds[kind]
        weights += count * shape.blocks * d_out * d_in
        layers = shape.blocks * (SHARED.get(kind, count) if stage == "inputs" else count)
        seconds += layers * row["seconds"] * (CALIBRATION_TOKENS / row["tokens"] if stage == "inputs" else 1)
        counted = operations(stage, d_out, d_in, CALIBRATION_TOKENS)
        if counted is not None:
            gpu += layers * max(counted[0] / (options.tflops * 1e12), counted[1] / (options.bandwidth * 1e9))
    return {
        "seconds_per_million_weights": seconds / (weights / 1e6),
        "peak_bytes": max(row["bytes"] for row in rows.values()),
        "seconds": seconds,
        "gpu_seconds": gpu or None,
        "without": [kind for kind in shape.kinds if kind not in rows],
    }


# The tables, as what they say, in which unit, and the figure's name.
TABLES = (
    ("processor seconds a million weights", 1.0, "seconds_per_million_weights"),
    ("peak memory, GB", 1e9, "peak_bytes"),
    ("whole model, hours of one core", 3600.0, "seconds"),
    ("whole model on the GPU by arithmetic, minutes", 60.0, "gpu_seconds"),
)


def report(options: argparse.Namespace) -> str:
    """Markdown: a table for each figure, a stage a row; * where a kind of layer was not measured."""
    models = options.model or [name for name in MODELS if name != "tiny"]
    found = {}
    for stage in options.stage or STAGES:
        for model in models:
            rows = recorded(options, model, stage)
            found[stage, model] = whole(options, model, stage, rows) if rows else {"without": []}
    lines = []
    for title, unit, figure in TABLES:
        lines += [f"| {title} | {' | '.join(models)} |", f"|{'---|' * (1 + len(models))}"]
        for stage in options.stage or STAGES:
            mine = [found[stage, model] for model in models]
            marks = ["*" * bool(row["without"]) for row in mine]
            figures = [f"{row[figure] / unit:.3g}" if row.get(figure) else "" for row in mine]
            cells = [text and text + mark for text, mark in zip(figures, marks, strict=True)]
            if any(cells):
                lines.append(f"| {stage} | {' | '.join(cells)} |")
        lines.append("")
    without = {", ".join(row["without"]) for row in found.values() if row["without"]}
    lines += [f"\\* without {kinds}" for kinds in sorted(without)]
    return "\n".join(lines).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(MODELS["tiny"].kinds)
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated (default: all but tiny)")
    parser.add_argument("--stage", choices=STAGES, action="append", help="may be repeated (default: all)")
    parser.add_argument("--kind", choices=kinds, action="append", metavar="LAYERS", help="of: %(choices)s (all)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the random inputs (%(default)s)")
    parser.add_argument("--tflops", type=float, default=67.0, help="the GPU's fp32 rate; an H100 SXM's (%(default)s)")
    parser.add_argument("--bandwidth", type=float, default=3350.0, help="its gigabytes per second (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "scale.jsonl", help="a row a layer and stage")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--layer", nargs=3, metavar=("STAGE", "ROWS", "COLUMNS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.layer:
        stage, rows, columns = options.layer
        print(json.dumps(measure(stage, int(rows), int(columns), options.tokens)))
        return
    wanted = [] if options.report else options.model or [name for name in MODELS if name != "tiny"]
    for model in wanted:
        for stage in options.stage or STAGES:
            for kind in options.kind or kinds:
                if kind in recorded(options, model, stage):
                    continue
                d_out, d_in, _ = MODELS[model].kinds[kind]
                key = {"model": model, "stage": stage, "kind": kind, "tokens": options.tokens}
                row = append(options.results, PROTOCOL, key | apart(stage, d_out, d_in, options))
                print(f"{model}, {stage}, {kind}: {row['seconds']:.2f} s, {row['bytes'] / 1e9:.2f} GB", flush=True)
    print(report(options))


if __name__ == "__main__":
    main()
