"""Where do Gini indices of CRePE's scores predict perplexity, and where not: by structure and by kind of layer?

`measure` needs the perplexities of proxy_study.py (random configurations, RIA and Wanda first). It computes, on the
sample of layers and rows that PHOSearchModifier takes by default, for each configuration and kind of layer: the Gini
index of all scores, of the pruned and of the kept weights' scores, the logarithms of the layer's relative output error
and of the fourth-power mean of its rows' errors, and how unevenly rows and columns are pruned (the standard deviation
of the fraction that a row or a column keeps). A row for each mask goes to results/gini_study.jsonl. `report` prints
rank correlations with perplexity and draws them.

    python benchmarks/gini_study.py measure --model smollm2
    python benchmarks/gini_study.py report --plot docs/notes/gini.png
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from crepe_llm.functional.gini import gini_index
from crepe_llm.models.blocks import kind_of
from crepe_llm.search.fitness import PROXIES, PrunedSample, prune
from crepe_llm.search.space import Coefficients
from pho_common import MODELS, Bench, parse_mask
from proxy_study import measured
from records import RESULTS, Row, append, is_done, read

PROTOCOL = 1
PATH = RESULTS / "gini_study.jsonl"
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MASKS = ("2:4", "0.5:matrix", "0.6:matrix")


def _spread(pruned: PrunedSample, axis: int) -> float:
    return pruned.keep.double().mean(dim=axis).std(correction=0).item()


MEASURES: dict[str, Callable[[PrunedSample], float]] = {
    "gini, all": lambda pruned: gini_index(pruned.scores),
    "gini, pruned": lambda pruned: gini_index(pruned.scores[~pruned.keep]),
    "gini, kept": lambda pruned: gini_index(pruned.scores[pruned.keep]),
    "error": lambda pruned: math.log(PROXIES["reconstruction"].of_layer(pruned)),
    "row error": lambda pruned: math.log(PROXIES["row_reconstruction"].of_layer(pruned)),
    "row spread": lambda pruned: _spread(pruned, 1),
    "column spread": lambda pruned: _spread(pruned, 0),
}
# Which way a measure should go with perplexity if it is to predict it: +1 where less is better.
SIGNS = {name: -1 if name.startswith("gini") else 1 for name in MEASURES}


def measure(options: argparse.Namespace) -> None:
    """Compute what is missing, a row for each mask."""
    bench, rows = None, read(PATH)
    for mask in options.masks:
        records = measured(options.model, options.seed, mask)
        key = {"model": options.model, "seed": options.seed, "mask": mask, "configurations": len(records)}
        if not records or is_done(key, rows, PROTOCOL):
            continue
        bench = bench or Bench(options.model, options.seed)
        values: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in KINDS} for name in MEASURES}
        for record in records:
            pruned = prune(bench.samples, Coefficients(**record["coefficients"]), parse_mask(mask))
            for name, of_layer in MEASURES.items():
                for kind, number in _by_kind(pruned, of_layer).items():
                    values[name][kind].append(number)
        found = {
            "coefficients": [record["coefficients"] for record in records],
            "perplexities": [record["perplexity"] for record in records],
            "values": values,
        }
        rows.append(append(PATH, PROTOCOL, key | found))
        print(f"{options.model}, seed {options.seed}, {mask}: {len(records)} configurations", flush=True)


def _by_kind(pruned: Sequence[PrunedSample], of_layer: Callable[[PrunedSample], float]) -> dict[str, float]:
    """The mean over the sampled layers of each kind."""
    numbers: dict[str, list[float]] = {}
    for sample in pruned:
        numbers.setdefault(kind_of(sample.layer.name).rpartition(".")[2], []).append(of_layer(sample))
    return {kind: math.fsum(found) / len(found) for kind, found in numbers.items()}


def spearman(first: Sequence[float], second: Sequence[float], given: Sequence[Sequence[float]] = ()) -> float:
    """The rank correlation of two, what the ranks of others explain linearly taken away from both; NaN if one is flat.

    Args:
        first, second: [n].
        given: lists of n numbers each.
    """
    known = np.column_stack([np.ones(len(first)), *(rankdata(numbers) for numbers in given)])
    ranks = np.column_stack([rankdata(np.round(first, 12)), rankdata(second)])
    rest = ranks - known @ np.linalg.lstsq(known, ranks, rcond=None)[0]
    norms = np.linalg.norm(rest, axis=0)
    return float(rest[:, 0] @ rest[:, 1] / norms.prod()) if norms.min() > 1e-6 * len(first) else math.nan


def over_kinds(row: Row, name: str) -> list[float]:
    """A measure's mean over the kinds of layers, for each configuration."""
    return np.mean([row["values"][name][kind] for kind in KINDS], axis=0).tolist()


def axes_of(row: Row) -> dict[str, list[float]]:
    """Where configurations lie: logarithms of column to row and of neighbourhood to row, and the exponent."""
    found = [Coefficients(**each) for each in row["coefficients"]]
    return {
        "column": [math.log(max(each.column, 0.005) / each.row) for each in found],
        "neighbourhood": [math.log(max(each.neighbourhood, 0.005) / each.row) for each in found],
        "exponent": [each.activation_exponent for each in found],
    }


def report(options: argparse.Namespace) -> None:
    rows = [row for row in read(PATH) if row["protocol"] == PROTOCOL]
    for row in rows:
        perplexities, axes = row["perplexities"], axes_of(row)
        print(f"\n{row['model']}, {row['mask']}, seed {row['seed']}: {row['configurations']} configurations\n")
        names = [f"`{kind}`" for kind in KINDS]
        print(f"| measure | all layers | {' | '.join(names)} | column | exponent | given both |")
        print("|---" * (len(KINDS) + 5) + "|")
        for name in MEASURES:
            values, sign = over_kinds(row, name), SIGNS[name]
            cells = [sign * spearman(values, perplexities)]
            cells += [sign * spearman(row["values"][name][kind], perplexities) for kind in KINDS]
            cells += [spearman(values, axes["column"]), spearman(values, axes["exponent"])]
            cells += [sign * spearman(values, perplexities, [axes["column"], axes["exponent"]])]
            print(f"| {name} | {' | '.join('-' if math.isnan(cell) else f'{cell:+.2f}' for cell in cells)} |")
        along = {name: spearman(values, perplexities) for name, values in axes.items()}
        errors = np.exp(over_kinds(row, "error"))
        print(
            "\nperplexity against the axes: "
            + ", ".join(f"{name} {value:+.2f}" for name, value in along.items())
            + f"; relative errors {errors.min():.3f} to {errors.max():.3f} (highest {errors.max() / errors.min():.2f} "
            f"times the lowest); perplexity {min(perplexities):.1f} to {max(perplexities):.1f}"
        )
        for name in ("error", "row error"):
            ria, together, apart = choices(row, name)
            print(
                f"log {name}: RIA's {ria:.3f}, the best configuration for all kinds of layers {together:.3f}, the best "
                f"for each kind {apart:.3f}"
            )
    if options.plot is not None and rows:
        draw(rows, options.plot)


def choices(row: Row, name: str) -> tuple[float, float, float]:
    """A measure's mean over kinds of layers: with RIA's coefficients, with the best for all, with the best for each."""
    every = over_kinds(row, name)
    return every[0], min(every), math.fsum(min(row["values"][name][kind]) for kind in KINDS) / len(KINDS)


def draw(rows: list[Row], path: Path) -> None:
    """Left of each line the correlations by kind of layer; then perplexity over the Gini index and over row spread."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False, width_ratios=[1.5, 1, 1])
    shown = ("gini, all", "gini, pruned", "error", "row error")
    for (left, middle, right), row in zip(grid, rows, strict=True):
        perplexities = row["perplexities"]
        for offset, name in enumerate(shown):
            kinds = [SIGNS[name] * spearman(row["values"][name][kind], perplexities) for kind in KINDS]
            left.bar(np.arange(len(KINDS)) + 0.2 * (offset - 1.5), kinds, 0.18, label=name)
        left.set(title=f"{row['model']}, {row['mask']}", ylabel="rank correlation", ylim=(-1, 1))
        left.set_xticks(range(len(KINDS)), [kind.removesuffix("_proj") for kind in KINDS])
        left.axhline(0, color="0.5", linewidth=0.8)
        left.legend(fontsize=7, ncols=2)
        colours: Any = axes_of(row)["column"]
        for axes, name in ((middle, "gini, all"), (right, "row spread" if ":matrix" in row["mask"] else "error")):
            drawn = axes.scatter(over_kinds(row, name), perplexities, c=colours, s=16, cmap="viridis")
            axes.set(xlabel=name, ylabel="perplexity", yscale="log")
        figure.colorbar(drawn, ax=right, label="log(column / row)")
    figure.savefig(path, dpi=80)
    print(f"\nplot: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("measure")
    command.add_argument("--model", choices=MODELS, default="smollm2")
    command.add_argument("--seed", type=int, default=0, help="of calibration and sample")
    command.add_argument("--masks", nargs="+", default=list(MASKS))
    command.set_defaults(run=measure)
    command = commands.add_parser("report")
    command.add_argument("--plot", type=Path, help="draw it there")
    command.set_defaults(run=report)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
