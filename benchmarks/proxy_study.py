"""How well does each proxy rank configurations as perplexity does?

`measure` prunes a model with random configurations (RIA and Wanda first), measures the perplexity of each on held-out
validation text, and appends a row to results/proxy_study.jsonl as soon as it is done; it can be stopped and started
again at will. `report` computes every proxy on the sample that PHOSearchModifier takes by default, and prints Spearman
correlations with bootstrap confidence intervals; it can be repeated with other proxies without measuring anew.

    python benchmarks/proxy_study.py measure --model smollm2 --configurations 28 --tokens 4096
    python benchmarks/proxy_study.py report --model smollm2 --plot docs/notes/proxy_study_smollm2.png
"""

import argparse
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from crepe_llm.search.fitness import PROXIES, evaluate
from crepe_llm.search.space import RIA, WANDA, Coefficients, SearchSpace
from pho_common import MODELS, Bench, parse_mask
from records import LEGEND, RESULTS, Row, append, dagger, is_done, read, read_old, with_old

# Raised by every change of a default or of how something is measured. 1: rows without provenance.
PROTOCOL = 2
PATH = RESULTS / "proxy_study.jsonl"
CELL = ("model", "seed", "mask", "coefficients")


def configurations(count: int) -> list[Coefficients]:
    """RIA, Wanda, and random ones, log-even in the coefficients; the first of a longer list are a shorter list."""
    space, generator = SearchSpace(), random.Random(12345)
    chosen = [RIA, WANDA]
    while len(chosen) < count:
        column, neighbourhood = (
            math.exp(generator.uniform(math.log(low), math.log(high)))
            for low, high in (space.column, space.neighbourhood)
        )
        kernel_size = generator.choice(space.kernel_sizes)
        exponent = generator.uniform(*space.activation_exponent)
        chosen.append(Coefficients(space.row, column, neighbourhood, kernel_size, exponent))
    return chosen


def measure(options: argparse.Namespace) -> None:
    bench, rows = None, read(PATH)
    for coefficients in configurations(options.configurations):
        for mask in options.masks:
            key = {
                "model": options.model,
                "seed": options.seed,
                "mask": mask,
                "tokens": options.tokens,
                "calibration_dtype": "bfloat16",
                "coefficients": coefficients.fields,
            }
            if is_done(key, rows, PROTOCOL):
                continue
            if bench is None:
                bench = Bench(options.model, options.seed)
            with bench.pruned(coefficients, parse_mask(mask)):
                perplexity = bench.perplexity(bench.corpus.valid, options.tokens)
            rows.append(append(PATH, PROTOCOL, key | {"perplexity": perplexity}))
            print(f"{options.model}, {mask}: perplexity {perplexity:.2f}: {coefficients}", flush=True)


def measured(model: str, seed: int, mask: str) -> list[Row]:
    """The rows of a model, seed and mask in the order of `configurations`: RIA's, Wanda's, then the random ones'."""
    rows = with_old(read(PATH), read_old(PATH), PROTOCOL, CELL)
    mine = [row for row in rows if (row["model"], row["seed"], row["mask"]) == (model, seed, mask)]
    return [row for c in configurations(len(mine)) for row in mine if row["coefficients"] == c.fields]


def interval(values: np.ndarray, perplexities: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """Spearman's correlation, and the 2.5 % and 97.5 % quantiles over configurations resampled with replacement."""
    generator = np.random.default_rng(0)
    resampled = []
    for _ in range(draws):
        drawn = generator.integers(len(values), size=len(values))
        if len(set(values[drawn])) > 1 and len(set(perplexities[drawn])) > 1:
            resampled.append(spearmanr(values[drawn], perplexities[drawn]).statistic)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(spearmanr(values, perplexities).statistic), float(low), float(high)


def report(options: argparse.Namespace) -> None:
    bench = Bench(options.model, options.seed)
    panels: dict[str, Any] = {}
    for mask in options.masks:
        records = measured(options.model, options.seed, mask)
        if len(records) < 5:
            print(f"{mask}: {len(records)} configurations measured, too few to correlate")
            continue
        perplexities = np.array([record["perplexity"] for record in records])
        tokens = {record["tokens"] for record in records}
        order = np.argsort(perplexities)
        better = order[: len(order) // 2]
        print(
            f"\n{options.model}, {mask}, seed {options.seed}: {len(records)} configurations, perplexity on "
            f"{'/'.join(map(str, sorted(tokens)))} validation tokens {perplexities.min():.1f} to "
            f"{perplexities.max():.1f}, RIA {perplexities[0]:.1f}, Wanda {perplexities[1]:.1f}\n\n"
            "| proxy | Spearman with perplexity | 95 % interval | among the better half | perplexity of its choice |\n"
            "|---|---|---|---|---|"
        )
        for name, proxy in PROXIES.items():
            values = np.array(
                [
                    evaluate(bench.samples, Coefficients(**record["coefficients"]), parse_mask(mask), proxy)
                    for record in records
                ]
            )
            losses = -values if proxy.higher_is_better else values
            rho, low, high = interval(losses, perplexities)
            half = float(spearmanr(losses[better], perplexities[better]).statistic)
            print(
                f"| {name} | {rho:+.2f} | {low:+.2f} to {high:+.2f} | {half:+.2f} "
                f"| {perplexities[int(losses.argmin())]:.1f}{dagger(records)} |",
                flush=True,
            )
            panels[f"{name}, {mask}"] = (values, perplexities)
        print(f"\n{LEGEND}" if dagger(records) else "")
    if options.plot is not None and panels:
        draw(panels, options)


def draw(panels: dict[str, Any], options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    columns = len(PROXIES)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3 * columns, 3 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, (values, perplexities)) in zip(grid.flat, panels.items(), strict=False):
        axes.plot(values, perplexities, ".")
        axes.plot(values[0], perplexities[0], "C3.", markersize=10, label="RIA")
        axes.set(title=title.replace(", ", "\n"), yscale="log", ylabel="perplexity")
        axes.legend()
    figure.suptitle(f"{options.model}, calibration seed {options.seed}")
    figure.savefig(options.plot, dpi=100)
    print(f"\nplot: {options.plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("measure", measure), ("report", report)):
        command = commands.add_parser(name)
        command.add_argument("--model", choices=MODELS, default="smollm2")
        command.add_argument("--seed", type=int, default=0, help="of calibration and sample")
        command.add_argument("--masks", nargs="+", default=["2:4", "0.6:matrix"], help='such as "4:8" or "0.5:row"')
        command.set_defaults(run=run)
        if run is measure:
            command.add_argument("--configurations", type=int, default=32)
            command.add_argument("--tokens", type=int, default=4096, help="of validation text")
        else:
            command.add_argument("--plot", type=Path, help="draw proxies against perplexity there")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
