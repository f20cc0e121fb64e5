"""Pruning by two processes of one thread against one: score and mask, Gram matrices, ADMM.

    python benchmarks/speedup.py                            # under 5 minutes, on a machine that does nothing else
    python benchmarks/speedup.py --model tiny --turns 1     # a try

The layers of one decoder block, in a shape of scale.py, have random weights (bf16) and inputs. Both numbers of
processes run in turn, over gloo, and share the work as a recipe's pass does: every process adds its share of the tokens
to the Gram matrices, and layers are one process's each, whose results all get. "ADMM" has all layers of the block to
share out, "ADMM, in turn" only those with the same inputs, as with `true_sequential`. Its iterations are few, which
changes no share. A stage takes until the last process has ended. Every run is a row of --results.
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

import torch

from crepe_llm import processes
from crepe_llm.functional.admm import ADMMOptions, admm
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.pruning.block_pass import shared_out
from crepe_llm.pruning.layer import Layer, record_mask, set_weight_matrix, share_layer
from crepe_llm.pruning.steps import Mask, Refit, Step
from records import RESULTS, Row, append
from scale import COEFFICIENTS, MODELS, keep

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1
ROUNDS, ITERATIONS, REFINEMENT = 2, 2, 1
REPEATS = 5  # of the quick stages in a run, whose medians count
COUNTS = (1, 2)
STAGES = ("score + mask", "Gram", "ADMM", "ADMM, in turn")


class Block:
    """The linear layers of a Llama block by the inputs that they share, with the statistics of random tokens."""

    def __init__(self, model: str, tokens: int) -> None:
        shape = MODELS[model]
        torch.manual_seed(0)
        rows = {"q": shape.hidden, "k": shape.keys, "v": shape.keys, "o": shape.hidden}
        rows |= {"gate": shape.ffn, "up": shape.ffn, "down": shape.hidden}
        self.groups = [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
        widths = [shape.hidden] * 3 + [shape.ffn]
        self.modules, self.dense, self.inputs, self.statistics = {}, {}, {}, {}
        for group, width in zip(self.groups, widths, strict=True):
            inputs = torch.randn(tokens, width) * (torch.rand(width) + 0.5)
            statistics = InputStatistics(width, gram=True)
            statistics.update(inputs)
            self.inputs[group[0]] = inputs.tensor_split(processes.count())[processes.rank()].clone()
            for name in group:
                module = torch.nn.Linear(width, rows[name], bias=False, dtype=torch.bfloat16)
                self.modules[name], self.statistics[name] = module, statistics
                self.dense[name] = module.weight.detach().clone()

    def prune(self, names: list[str], steps: list[Step]) -> None:
        """Prune layers as a recipe's pass does: each is one process's, and all get the result."""
        owners = shared_out([self.modules[name] for name in names])
        for name in names:
            module = self.modules[name]
            if owners[module] == processes.rank():
                layer = Layer(name, module, self.dense[name], self.statistics[name], self.dense[name])
                for step in steps:
                    step(layer)
                set_weight_matrix(module, layer.weight)
                record_mask(module, layer.keep)
        for module, owner in owners.items():
            share_layer(module, owner)

    def gram(self) -> None:
        """Gather the statistics of the block's tokens anew."""
        for inputs in self.inputs.values():
            found = InputStatistics(inputs.shape[1], gram=True)
            found.update(inputs)
            processes.add_up_statistics(found)


def steps() -> tuple[Mask, Refit]:
    """CRePE's mask, and ADMM after it, as the shipped recipes have them."""

    def scores(weight: torch.Tensor, found: InputStatistics) -> torch.Tensor:
        return crepe_scores(weight, found.norm, **COEFFICIENTS)

    def solve(layer: Layer, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        options = ADMMOptions(rounds=ROUNDS, iterations=ITERATIONS, refinement=REFINEMENT)
        found = admm(target, layer.gram, lambda weight: scores(weight, layer.statistics), keep, options)
        return found.keep, found.weight

    return Mask(lambda name, *of: scores(*of), lambda name, scores: keep(scores)), Refit(solve)


def timed(work: Callable[[], object], repeats: int) -> float:
    """Median seconds until the last process has ended."""
    found = []
    for _ in range(repeats):
        processes.wait()
        started = time.perf_counter()
        work()
        processes.wait()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


@torch.no_grad()
def measure(model: str, tokens: int) -> dict[str, float]:
    """Seconds of every stage, in this process and those beside it."""
    block, (mask, refit) = Block(model, tokens), steps()
    names = list(block.modules)
    block.prune(names, [mask])  # first touches
    work = (
        lambda: block.prune(names, [mask]),
        block.gram,
        lambda: block.prune(names, [mask, refit]),
        lambda: [block.prune(group, [mask, refit]) for group in block.groups],
    )
    return {stage: timed(each, 1 if "ADMM" in stage else REPEATS) for stage, each in zip(STAGES, work, strict=True)}


def apart(count: int, options: argparse.Namespace) -> dict[str, float]:
    """:func:`measure` in so many processes of one thread."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(several if count > 1 else []), __file__]
    command += ["--worker", "--model", options.model, "--tokens", str(options.tokens)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{count} processes failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[Row]) -> str:
    """Markdown: medians over turns by number of processes, and how many times as fast two are."""
    lines = ["| stage | one process, s | two, s | times as fast |", "|---|---|---|---|"]
    for stage in STAGES:
        one, two = (statistics.median(r["seconds"][stage] for r in rows if r["processes"] == n) for n in COUNTS)
        lines.append(f"| {stage} | {one:.2f} | {two:.2f} | {one / two:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b", help="whose block (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="of the random inputs (%(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="runs of both (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "speedup.jsonl", help="a row a run")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        processes.start()
        found = measure(options.model, options.tokens)
        if processes.is_first():
            print(json.dumps(found))
        return
    conditions = {"model": options.model, "tokens": options.tokens}
    rows = [
        append(options.results, PROTOCOL, {**conditions, "processes": count, "seconds": apart(count, options)})
        for _ in range(options.turns)
        for count in COUNTS
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
