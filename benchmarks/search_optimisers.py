"""Which optimiser finds better coefficients with the same number of tokens or of candidates?

    python benchmarks/search_optimisers.py simulate     # on surfaces through measured perplexities; no model runs
    python benchmarks/search_optimisers.py proxy        # CMA-ES and random search on the proxy of a real model
    python benchmarks/search_optimisers.py report

`simulate` plays the first stage of the search, 512 windows in all. A surface is a smoothed thin-plate spline along the
logarithms of the perplexities that proxy_study.py and coefficients.py have on record for a model and mask, as far as
the coefficients are in the search space. A candidate on w windows has a normal error of --noise / sqrt(w / 16). What a
method ends with is compared with the lowest point of the surface. `proxy` gives each optimiser 200 candidates of the
search by proxy.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import cma
import numpy as np
import torch
from scipy.interpolate import RBFInterpolator

from crepe_llm.search.fitness import DEFAULT_PROXY, PROXIES, evaluate
from crepe_llm.search.optimisers import OPTIMISERS
from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, Coefficients, SearchSpace
from crepe_llm.search.study import Study
from crepe_llm.search.surrogate import Surrogate
from crepe_llm.search.trials import Trial
from pho_common import MODELS, Bench, parse_mask
from records import RESULTS, append, is_done, read, read_old

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1
PATH = RESULTS / "search_optimisers.jsonl"
# The first stage's: candidates, and windows of each.
CANDIDATES, WINDOWS = 32, 16
SPACE = SearchSpace()
# Of the spline: perplexities on record are 0.006 to 0.011 from it (root mean square of logarithms), about their noise.
SMOOTHING = 0.01

Surface = Callable[[np.ndarray], np.ndarray]
"""Of points [n, 4] of the unit cube, the logarithm of perplexity relative to RIA's, [n]."""
Look = Callable[[np.ndarray, int], np.ndarray]
"""Of points and a number of windows, what a search would see: the surface with noise."""
Method = Callable[[Look, int], np.ndarray]
"""Of what can be seen and a seed, the point [4] that a search ends with."""


def surface(model: str, mask: str) -> Surface:
    """A smoothed thin-plate spline along the perplexities on record of one model and mask, calibration seed 0."""
    points: dict[tuple[float, ...], list[float]] = {}
    for file in ("proxy_study.jsonl", "coefficients.jsonl"):
        rows = read(RESULTS / file) + read_old(RESULTS / file)
        rows = [row for row in rows if (row["model"], row["mask"], row["seed"]) == (model, mask, 0)]
        found = [(Coefficients(**row["coefficients"]), row["perplexity"]) for row in rows]
        ria = next(value for coefficients, value in found if coefficients == RIA)
        for coefficients, value in found:
            if is_inside(coefficients):
                points.setdefault(tuple(SPACE.point(coefficients)), []).append(math.log(value / ria))
    means = np.array([math.fsum(values) / len(values) for values in points.values()])
    return RBFInterpolator(np.array(list(points)), means, kernel="thin_plate_spline", smoothing=SMOOTHING)


def is_inside(coefficients: Coefficients) -> bool:
    """Whether the search space has these coefficients, up to a common factor."""
    nearest = SPACE.coefficients(SPACE.point(coefficients)).of_score
    own, scale = coefficients.of_score, SPACE.row / coefficients.row
    own |= {name: own[name] * scale for name in ("row", "column", "neighbourhood")}
    return all(math.isclose(own[name], nearest[name], rel_tol=1e-6) for name in own)


def sobol(count: int, seed: int) -> np.ndarray:
    """Points spread over the unit cube, as the search has them: [count, 4], kernel sizes among those of the space."""
    drawn = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed).draw(count, dtype=torch.float64)
    return snapped(drawn.numpy())


def snapped(points: np.ndarray) -> np.ndarray:
    """The points whose coefficients the space gives for these: inside of the cube, with a kernel size that there is."""
    return np.array([SPACE.point(SPACE.coefficients(point)) for point in points.tolist()])


def by_random(look: Look, seed: int) -> np.ndarray:
    """Random search: the best of 32 random points on 16 windows each."""
    points = snapped(np.random.default_rng(seed).random((CANDIDATES, 4)))
    return points[look(points, WINDOWS).argmin()]


def by_halving(look: Look, seed: int) -> np.ndarray:
    """Successive halving: 64 points on 4 windows each, the better half on 4 more, the better half of it on 8 more."""
    points = sobol(2 * CANDIDATES, seed)
    seen, windows = look(points, 4), 4
    for more in (4, 8):
        better = np.argsort(seen)[: len(points) // 2]
        points = points[better]
        seen = (seen[better] * windows + look(points, more) * more) / (windows + more)
        windows += more
    return points[seen.argmin()]


def by_cma(look: Look, seed: int, windows: int) -> np.ndarray:
    """CMA-ES from the middle of the cube, 8 candidates a generation, until the windows are spent."""
    options = {"seed": seed + 1, "verbose": -9, "bounds": [[0.0] * 4, [1.0] * 4], "popsize": 8}
    strategy = cma.CMAEvolutionStrategy([0.5] * 4, 0.25, options)
    best, lowest = np.full(4, 0.5), math.inf
    for _ in range(CANDIDATES * WINDOWS // (8 * windows)):
        asked = strategy.ask()
        points = snapped(np.array(asked))
        losses = look(points, windows)
        strategy.tell(asked, losses.tolist())
        if losses.min() < lowest:
            best, lowest = points[losses.argmin()], losses.min()
    return best


def by_surrogate(look: Look, seed: int) -> np.ndarray:
    """The search's own: 12 spread points, then four at a time where the surrogate hopes for most, and its best."""
    trials: list[Trial] = []

    def measure(points: np.ndarray) -> None:
        for point, loss in zip(points, look(points, WINDOWS), strict=True):
            # A trial's loss is in nats a token; the constant changes nothing.
            trials.append(Trial(SPACE.coefficients(point.tolist()), (float(loss) + 10,), (1,), 0.0))

    measure(sobol(12, seed))
    while len(trials) < CANDIDATES:
        proposed = Surrogate(SPACE, trials).propose(4, seed + len(trials))
        measure(np.array([SPACE.point(each) for each in proposed]))
    expected = Surrogate(SPACE, trials).expected([trial.coefficients for trial in trials])
    return np.array(SPACE.point(trials[int(expected.argmin())].coefficients))


METHODS: dict[str, Method] = {
    "random search": by_random,
    "successive halving": by_halving,
    "CMA-ES": lambda look, seed: by_cma(look, seed, WINDOWS),
    "CMA-ES, half the text a candidate": lambda look, seed: by_cma(look, seed, WINDOWS // 2),
    "surrogate": by_surrogate,
}


def simulate(options: argparse.Namespace) -> None:
    """Each method on each surface, many seeds, a row each."""
    rows = read(options.results)
    for model in options.models:
        for mask in options.masks:
            found = surface(model, mask)
            lowest = float(found(sobol(1 << 14, 0)).min())
            for name, method in METHODS.items():
                key = {"what": "simulation", "model": model, "mask": mask, "method": name}
                key |= {"noise": options.noise, "seeds": options.seeds}
                if is_done(key, rows, PROTOCOL):
                    continue
                above = [_ended(method, found, seed, options.noise) - lowest for seed in range(options.seeds)]
                rows.append(append(options.results, PROTOCOL, key | {"above": [round(each, 5) for each in above]}))
                print(f"{model}, {mask}, {name}: {np.mean(above):.4f} above the lowest point", flush=True)


def _ended(method: Method, found: Surface, seed: int, noise: float) -> float:
    """The surface at the point that a method ends with."""
    generator = np.random.default_rng(1000 + seed)

    def look(points: np.ndarray, windows: int) -> np.ndarray:
        return found(points) + generator.normal(scale=noise * math.sqrt(WINDOWS / windows), size=len(points))

    return float(found(method(look, seed)[None])[0])


def by_proxy(options: argparse.Namespace) -> None:
    """CMA-ES and random search on the proxy, 200 candidates each, a row for each seed."""
    rows, proxy = read(options.results), PROXIES[DEFAULT_PROXY]
    for model in options.models:
        bench = None
        for mask in options.masks:
            for seed in range(options.seeds):
                for optimiser in OPTIMISERS:
                    key = {"what": "proxy", "model": model, "mask": mask, "method": optimiser, "seed": seed}
                    key |= {"candidates": options.candidates}
                    if is_done(key, rows, PROTOCOL):
                        continue
                    bench = bench or Bench(model, 0)
                    wanted, samples = parse_mask(mask), bench.samples
                    study = search(
                        lambda c, wanted=wanted, samples=samples: evaluate(samples, c, wanted, proxy),
                        Study(model, wanted, proxy.name, proxy.higher_is_better, optimiser=optimiser, seed=seed),
                        candidates=options.candidates,
                    )
                    values = {"best": study.best.value, "ria": study.reference.value}
                    rows.append(append(options.results, PROTOCOL, key | values))
                    print(f"{model}, {mask}, {optimiser}, seed {seed}: {study.best.value:.5f}", flush=True)


def report(options: argparse.Namespace) -> None:
    """Means and standard errors over seeds."""
    rows = [row for row in read(options.results) if row["protocol"] == PROTOCOL]
    for what, title in (
        ("simulation", "log perplexity above the lowest point of the surface, what each method ends with"),
        ("proxy", "best value of the proxy (a log error, lower is better)"),
    ):
        mine = [row for row in rows if row["what"] == what]
        cells = list(dict.fromkeys((row["model"], row["mask"]) for row in mine))
        if not cells:
            continue
        print(f"\n{title}\n\n| method | {' | '.join(f'{model}, {mask}' for model, mask in cells)} |")
        print("|---" * (len(cells) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in mine):
            texts = []
            for cell in cells:
                same = [row for row in mine if (row["model"], row["mask"]) == cell and row["method"] == method]
                values = [value for row in same for value in row.get("above", [row.get("best")])]
                texts.append(_mean(values))
            print(f"| {method} | {' | '.join(texts)} |")


def _mean(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, run in (("simulate", simulate), ("proxy", by_proxy), ("report", report)):
        command = commands.add_parser(name)
        command.add_argument("--results", type=Path, default=PATH)
        command.set_defaults(run=run)
        if run is report:
            continue
        command.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
        command.add_argument("--masks", nargs="+", default=["2:4", "0.6:matrix"], help='such as "2:4" or "0.5:matrix"')
        command.add_argument("--seeds", type=int, default=16 if run is simulate else 4, help="how many (%(default)s)")
        if run is simulate:
            command.add_argument("--noise", type=float, default=0.014, help="of 16 windows, in nats a token")
        else:
            command.add_argument("--candidates", type=int, default=200)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
