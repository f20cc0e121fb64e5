"""Searching for CRePE's coefficients: the space, the optimisers, and the study that records a search.

An optimiser is a generator that yields generations of candidates and is sent their losses; :func:`search` drives it,
saves the :class:`Study` after each generation, and, given an unfinished study, replays the recorded losses first, so
that a search that was killed at any moment ends where the uninterrupted one would have ended.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import crepe_llm
from crepe_llm.search.fitness import RIA, Coefficients, Mask

__all__ = [
    "OPTIMISERS",
    "Candidate",
    "Finalist",
    "SearchSpace",
    "Study",
    "StudyError",
    "cma_es",
    "hill_climb",
    "random_search",
    "search",
]

Optimiser = Generator[list[Coefficients], list[float], None]

# How many candidates CMA-ES looks around with: a power of two, which Sobol sequences want.
_LOOKED_AT = 64

_FORMAT = 1


class StudyError(ValueError):
    """A study cannot be read, continued or used for what was asked."""


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Where coefficients are looked for: a box, logarithmic in the coefficients, linear in the exponent.

    Only the ratios of the three coefficients matter, so the row's is fixed. Equal bounds fix a dimension.

    Args:
        column: lowest and highest coefficient of the column term, positive.
        neighbourhood: lowest and highest coefficient of the neighbourhood term, positive.
        activation_exponent: lowest and highest exponent, at least 0.
        kernel_sizes: the window sizes to choose from, odd, ascending.
        row: the fixed coefficient of the row term, positive.

    Raises:
        ValueError: bounds that contradict each other or are out of range, a kernel size that is even, none at all, or
            nothing left to vary.
    """

    column: tuple[float, float] = (0.02, 20.0)
    neighbourhood: tuple[float, float] = (0.02, 20.0)
    activation_exponent: tuple[float, float] = (0.2, 1.4)
    kernel_sizes: tuple[int, ...] = (3, 5, 7, 9, 13, 19, 31)
    row: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("column", "neighbourhood", "activation_exponent"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not all(math.isfinite(bound) for bound in bounds):
                raise ValueError(f"{name}={bounds} must be two finite numbers, the lowest and the highest value")
            if bounds[0] > bounds[1]:
                raise ValueError(f"{name}={bounds} is empty: the lowest value comes first")
            if bounds[0] < 0 or (bounds[0] == 0 and name != "activation_exponent"):
                raise ValueError(f"{name}={bounds} must be positive, since coefficients are searched on a log scale")
        if not (math.isfinite(self.row) and self.row > 0):
            raise ValueError(f"row={self.row} must be a positive number")
        sizes = self.kernel_sizes
        if not sizes or any(size < 1 or size % 2 == 0 for size in sizes) or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"kernel_sizes={sizes} must be one or more odd, positive numbers in ascending order")
        if self.dimensions == 0:
            raise ValueError("every bound of the search space fixes its value, so there is nothing to search for")

    @property
    def dimensions(self) -> int:
        """How many numbers vary."""
        return sum(high > low for low, high in self._continuous()) + (len(self.kernel_sizes) > 1)

    def coefficients(self, point: Sequence[float]) -> Coefficients:
        """The coefficients at a point [4] of the unit cube; values outside of it are clipped.

        The axes are column, neighbourhood, exponent and kernel size.
        """
        log_column, log_neighbourhood, exponent = (
            low + (high - low) * min(1.0, max(0.0, float(x)))
            for x, (low, high) in zip(point[:3], self._continuous(), strict=True)
        )
        index = min(len(self.kernel_sizes) - 1, max(0, round(float(point[3]) * (len(self.kernel_sizes) - 1))))
        return Coefficients(
            row=self.row,
            column=math.exp(log_column),
            neighbourhood=math.exp(log_neighbourhood),
            kernel_size=self.kernel_sizes[index],
            activation_exponent=exponent,
        )

    def point(self, coefficients: Coefficients) -> list[float]:
        """The point [4] of the unit cube whose coefficients are nearest to those given, up to a common factor."""
        scale = self.row / coefficients.row if coefficients.row > 0 else math.inf
        values = [
            math.log(max(coefficients.column * scale, 1e-30)) if scale < math.inf else math.inf,
            math.log(max(coefficients.neighbourhood * scale, 1e-30)) if scale < math.inf else math.inf,
            coefficients.activation_exponent,
        ]
        point = [
            0.5 if high == low else min(1.0, max(0.0, (value - low) / (high - low)))
            for value, (low, high) in zip(values, self._continuous(), strict=True)
        ]
        sizes = self.kernel_sizes
        nearest = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / coefficients.kernel_size)))
        return [*point, nearest / (len(sizes) - 1) if len(sizes) > 1 else 0.5]

    def varying(self) -> list[int]:
        """The axes of the unit cube that matter."""
        axes = [axis for axis, (low, high) in enumerate(self._continuous()) if high > low]
        return axes + [3] * (len(self.kernel_sizes) > 1)

    def _continuous(self) -> list[tuple[float, float]]:
        logs = [(math.log(low), math.log(high)) for low, high in (self.column, self.neighbourhood)]
        return [*logs, self.activation_exponent]


# Optimisers


def random_search(space: SearchSpace, seed: int, population: int | None = None) -> Optimiser:
    """Yield candidates drawn evenly from the space, `population` (8) at a time, without end."""
    generator = np.random.default_rng(seed)
    while True:
        yield [space.coefficients(generator.random(4).tolist()) for _ in range(population or 8)]


def cma_es(space: SearchSpace, seed: int, population: int | None = None) -> Optimiser:
    """Yield a look around, then generations of the covariance matrix adaptation evolution strategy, without end.

    The look around is 64 points of a scrambled Sobol sequence, spread evenly over the space. The first run starts at
    the best of them; a run that has converged is followed by one that starts at a random place. The kernel size is an
    integer variable: cma keeps its spread from falling below one size.

    Args:
        space: where to search.
        seed: of everything random. numpy's global generator is left as it was.
        population: candidates per generation, at least 2; None takes 4 + floor(3 ln(dimensions)), and 8 to look around.

    Raises:
        ImportError: the package ``cma`` is missing.

    Source: Hansen, arXiv 1604.00772, through the package ``cma``.
    """
    try:
        import cma
    except ImportError as error:
        raise ImportError('CMA-ES needs the package cma: pip install "crepe-llm[compress]"') from error
    if population is not None and population < 2:
        raise ValueError(f"population={population} must be at least 2 for CMA-ES")
    numpy_state = _NumpyState(seed)
    axes = space.varying()
    last_kernel = len(space.kernel_sizes) - 1
    kernel_axis = axes.index(3) if 3 in axes else None
    # Continuous axes run over [0, 1]; the kernel's over the indices of its sizes, a step of 1 from one to the next.
    extents = [float(last_kernel) if axis == 3 else 1.0 for axis in axes]

    def full(inner: Sequence[float]) -> list[float]:
        point = [0.5] * 4
        for axis, extent, value in zip(axes, extents, inner, strict=True):
            point[axis] = value / extent
        return point

    spread = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed).draw(_LOOKED_AT, dtype=torch.float64).tolist()
    losses: list[float] = []
    size = population or 8
    for first in range(0, _LOOKED_AT, size):
        losses += yield [space.coefficients(point) for point in spread[first : first + size]]
    start: list[float] = spread[losses.index(min(losses))]
    while True:
        options = {
            "seed": math.nan,  # cma leaves numpy's generator alone, and uses the state that _NumpyState puts there
            "verbose": -9,
            "bounds": [[0.0] * len(axes), extents],
            "CMA_stds": extents,
            "integer_variables": [] if kernel_axis is None else [kernel_axis],
        }
        if population is not None:
            options["popsize"] = population
        inner = [start[axis] * extent for axis, extent in zip(axes, extents, strict=True)]
        with numpy_state:
            strategy = cma.CMAEvolutionStrategy(inner, 0.25, options)
        while True:
            with numpy_state:
                stopped = strategy.stop()
                points = [] if stopped else strategy.ask()
            if stopped:
                break
            losses = yield [space.coefficients(full(point)) for point in points]
            with numpy_state:
                strategy.tell(points, losses)
        with numpy_state:
            start = np.random.random(4).tolist()


def hill_climb(space: SearchSpace, seed: int, population: int | None = None) -> Optimiser:
    """Yield one candidate at a time, each a step from the best so far along one axis; end when no step helps.

    Starts at RIA's place in the space. Each round tries every axis in random order, both ways, and keeps a step as soon
    as it lowers the loss; a round without such a step halves the step, from a quarter of the axis down to 1/32. On real
    perplexity this is the kind of search that the proxy replaces.

    Args:
        space: where to search.
        seed: of the order of the axes.
        population: ignored; accepted so that all optimisers can be called alike.

    Source: the paper (arXiv 2606.01544) says only that perplexity was hill-climbed; this procedure is ours.
    """
    generator = np.random.default_rng(seed)
    best = space.point(RIA)
    sizes = len(space.kernel_sizes)
    [best_loss] = yield [space.coefficients(best)]
    step = 0.25
    while step >= 1 / 32:
        improved = False
        for axis in generator.permutation(space.varying()).tolist():
            for direction in (1.0, -1.0):
                trial = list(best)
                length = max(step, 1 / (sizes - 1)) if axis == 3 else step
                trial[axis] = min(1.0, max(0.0, trial[axis] + direction * length))
                candidate = space.coefficients(trial)
                if candidate == space.coefficients(best):
                    continue
                [loss] = yield [candidate]
                if loss < best_loss:
                    best, best_loss, improved = trial, loss, True
                    break
        if not improved:
            step /= 2


OPTIMISERS: Mapping[str, Callable[[SearchSpace, int, int | None], Optimiser]] = {
    "cma": cma_es,
    "random": random_search,
    "hill_climb": hill_climb,
}


class _NumpyState:
    """While entered, numpy's global generator is this object's own; cma draws from the global one."""

    def __init__(self, seed: int) -> None:
        self._own = np.random.RandomState(seed).get_state()

    def __enter__(self) -> None:
        self._others = np.random.get_state()
        np.random.set_state(self._own)

    def __exit__(self, *exception: object) -> None:
        self._own = np.random.get_state()
        np.random.set_state(self._others)


# Studies


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One evaluated set of coefficients.

    Attributes:
        coefficients: what was tried.
        value: its proxy, in the proxy's own direction.
        seconds: wall time of the evaluation.
        generation: which generation of the optimiser, from 0; -1 for RIA, which every study evaluates first.
    """

    coefficients: Coefficients
    value: float
    seconds: float
    generation: int


@dataclasses.dataclass(frozen=True)
class Finalist:
    """A candidate that the model was pruned with, and how well the model then predicts some sequences of text.

    Attributes:
        coefficients: what was tried.
        losses: of each sequence, the summed negative log-likelihood of its tokens but the first, in nats.
        tokens: of each sequence, how many tokens were predicted.
        seconds: wall time of pruning and measuring.
    """

    coefficients: Coefficients
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not len(self.losses) == len(self.tokens) > 0 or min(self.tokens) < 1:
            raise ValueError(f"a finalist has {len(self.losses)} losses, and predicted {self.tokens} tokens")

    @property
    def perplexity(self) -> float:
        """Over all sequences."""
        return math.exp(math.fsum(self.losses) / sum(self.tokens))

    def clearly_better(self, other: "Finalist") -> bool:
        """Whether the mean loss per token is lower by more than twice the standard error of the difference.

        The difference is taken sequence by sequence, since texts differ more from each other than masks do. One
        sequence decides nothing.
        """
        sequences, tokens = len(self.losses), sum(self.tokens)
        if sequences < 2 or self.tokens != other.tokens:
            return False
        gains = [theirs - own for own, theirs in zip(self.losses, other.losses, strict=True)]
        gain = math.fsum(gains) / tokens
        squares = math.fsum((g - gain * t) ** 2 for g, t in zip(gains, self.tokens, strict=True))
        return gain > 2 * math.sqrt(squares * sequences / (sequences - 1)) / tokens


@dataclasses.dataclass
class Study:
    """The record of one search: what was searched where and how, and every candidate.

    Attributes:
        model: the model's name or folder.
        mask: the masks that candidates are judged by.
        proxy: what the values are: a proxy's name, or "perplexity".
        higher_is_better: the direction of the values.
        optimiser: a name from OPTIMISERS.
        space: the search space.
        seed: of the optimiser.
        population: candidates per generation, or None for the optimiser's own.
        sample: what candidates were evaluated on (layers, rows, tokens, a fingerprint): numbers and names.
        candidates: RIA first, then generation by generation.
        finalists: those that were measured on the pruned model, if any: first the one that the others must beat.
        versions: of the packages that made it.
        finished: whether the budget was spent or the optimiser ended.
    """

    model: str
    mask: Mask
    proxy: str
    higher_is_better: bool
    optimiser: str = "cma"
    space: SearchSpace = dataclasses.field(default_factory=SearchSpace)
    seed: int = 0
    population: int | None = None
    sample: dict[str, Any] = dataclasses.field(default_factory=dict)
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    finalists: list[Finalist] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: _versions())
    finished: bool = False

    @property
    def reference(self) -> Candidate:
        """RIA's coefficients, evaluated like every candidate.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        if not self.candidates:
            raise StudyError("the study has no candidates yet")
        return self.candidates[0]

    @property
    def best(self) -> Candidate:
        """The best candidate, RIA among them; of equal ones the first.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        return min(self.candidates, key=self.loss) if self.candidates else self.reference

    @property
    def seconds(self) -> float:
        """Time spent on evaluations."""
        return math.fsum(candidate.seconds for candidate in self.candidates)

    @property
    def beats_reference(self) -> bool:
        """Whether the best candidate's value is strictly better than RIA's."""
        return self.loss(self.best) < self.loss(self.reference)

    @property
    def recommended(self) -> Coefficients:
        """What to prune with: of the finalists that are clearly better than the first, the one of the lowest
        perplexity, or the first; without finalists the best candidate, or RIA's coefficients where none beats them.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        if self.finalists:
            first = self.finalists[0]
            better = [finalist for finalist in self.finalists if finalist.clearly_better(first)]
            return min(better, key=lambda finalist: finalist.perplexity, default=first).coefficients
        return self.best.coefficients if self.beats_reference else self.reference.coefficients

    def shortlist(self, count: int, others: Sequence[Coefficients] = ()) -> list[Coefficients]:
        """Which candidates to measure the perplexity of: `others`, RIA, the best, and the best of the look around.

        Later generations crowd around the proxy's optimum and would give many times the same mask. The look around is
        spread over the space, so its best differ from each other. (Without CMA-ES every candidate belongs to it.)

        Args:
            count: how many, if there are as many; `others`, RIA and the best in any case.
            others: coefficients from elsewhere, such as a recipe's own.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        chosen = [*others, self.reference.coefficients, self.best.coefficients]
        spread = self.candidates[1 : 1 + _LOOKED_AT] if self.optimiser == "cma" else self.candidates
        room = count - len(set(chosen))
        ranked = [c.coefficients for c in sorted(spread, key=self.loss) if c.coefficients not in chosen]
        return list(dict.fromkeys([*chosen, *ranked[: max(0, room)]]))

    def loss(self, candidate: Candidate) -> float:
        """The candidate's value with the sign under which lower is better."""
        return -candidate.value if self.higher_is_better else candidate.value

    def require_mask(self, mask: Mask) -> None:
        """Refuse to lend coefficients to masks of another kind than the study's.

        Raises:
            StudyError: the masks differ.
        """
        if self.mask != mask:
            raise StudyError(
                f"the study searched for {self.mask} masks, and its coefficients are to prune {mask}: "
                "the best coefficients differ between the two; search again, or take a study of this structure"
            )

    def save(self, path: str | Path) -> None:
        """Write the study as JSON, atomically: a reader or a crash sees the old file or the new one, never a part."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read a study.

        Raises:
            StudyError: there is no such file, or it is damaged or no study.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise StudyError(f"the study {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise StudyError(f"the study {path} is damaged, it is no JSON ({error}): restore or delete it") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise StudyError(f'{path} is no study of this version: its "format" is not {_FORMAT}')
        try:
            content["mask"] = Mask(**content["mask"])
            content["space"] = SearchSpace(**content["space"])
            for name, kind in (("candidates", Candidate), ("finalists", Finalist)):
                content[name] = [
                    kind(**{**entry, "coefficients": Coefficients(**entry["coefficients"])})
                    for entry in content.get(name, [])
                ]
            study = cls(**content)
            values = [candidate.value for candidate in study.candidates]
            if not all(map(math.isfinite, values + [loss for f in study.finalists for loss in f.losses])):
                raise ValueError("a candidate's value is not finite")
            return study
        except (KeyError, TypeError, ValueError) as error:
            raise StudyError(f"the study {path} is damaged ({error}): restore or delete it") from error

    def __str__(self) -> str:
        best = sorted(self.candidates, key=self.loss)[:5]
        lines = [
            f"{self.model}, {self.mask}: {len(self.candidates)} candidates in {self.seconds:.1f} s "
            f"by {self.optimiser}, seed {self.seed}; "
            f"{self.proxy}, {'higher' if self.higher_is_better else 'lower'} is better"
            + ("" if self.finished else "; unfinished")
        ]
        lines += [f"  {candidate.value:.6g}  {candidate.coefficients}" for candidate in best]
        if self.candidates:
            lines.append(f"  {self.reference.value:.6g}  RIA")
        if self.finalists:
            seconds, used = math.fsum(finalist.seconds for finalist in self.finalists), self.recommended
            lines.append(f"perplexity of {len(self.finalists)} finalists, in {seconds:.1f} s:")
            for finalist in sorted(self.finalists, key=lambda finalist: finalist.perplexity):
                note = ", to be beaten" if finalist == self.finalists[0] else ""
                note += ", used" if finalist.coefficients == used else ""
                lines.append(f"  {finalist.perplexity:.2f}  {finalist.coefficients}{note}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw every candidate's value, the best so far and RIA's value over the number of candidates.

        Raises:
            ImportError: matplotlib is missing.
            StudyError: nothing was evaluated yet.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install matplotlib") from error
        reference = self.reference.value
        values = [candidate.value for candidate in self.candidates[1:]] or [reference]
        best = (np.maximum if self.higher_is_better else np.minimum).accumulate(np.array(values))
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(values, ".", color="0.6", label="candidate")
        axes.plot(best, color="C0", label="best so far")
        axes.axhline(reference, color="C3", linestyle="--", label="RIA")
        axes.set(xlabel="candidates", ylabel=self.proxy, title=f"{self.model}, {self.mask}")
        axes.legend()
        figure.savefig(path, dpi=120)


def _versions() -> dict[str, str]:
    import importlib.metadata

    versions = {"crepe_llm": crepe_llm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["cma"] = importlib.metadata.version("cma")
    return versions


# What two runs must share for one to continue the other.
_IDENTITY = (
    "model",
    "mask",
    "proxy",
    "higher_is_better",
    "optimiser",
    "space",
    "seed",
    "population",
    "sample",
)


def search(
    objective: Callable[[Coefficients], float],
    study: Study,
    *,
    candidates: int | None = None,
    minutes: float | None = None,
    path: str | Path | None = None,
    progress: Callable[[Study], None] | None = None,
) -> Study:
    """Search until the budget is spent, or until the optimiser ends.

    Args:
        objective: the value of one candidate; deterministic, or resuming cannot give the same result.
        study: the settings; its candidates must be empty.
        candidates: stop after this many evaluations beside RIA's; a generation is never cut, so there may be more.
        minutes: stop when the evaluations recorded have taken this long. At least one of the two must be given.
        path: where the study is saved after each generation. A file that is there already and has the same settings is
            continued, so that a search killed at any moment ends as if it had not been.
        progress: called with the study after each generation.

    Returns:
        The study, finished.

    Raises:
        StudyError: the file at `path` has other settings, is damaged, or does not replay.
        ValueError: no budget, a NaN or infinite value, or a proxy that is the same for every candidate.
    """
    if candidates is None and minutes is None:
        raise ValueError("the search needs a budget: give candidates, minutes or both")
    for name, budget in (("candidates", candidates), ("minutes", minutes)):
        if budget is not None and not budget > 0:
            raise ValueError(f"{name}={budget} must be positive")
    if study.optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser={study.optimiser} must be one of {', '.join(OPTIMISERS)}")
    recorded: list[Candidate] = []
    if path is not None and Path(path).exists():
        earlier = Study.load(path)
        for name in _IDENTITY:
            if getattr(earlier, name) != getattr(study, name):
                raise StudyError(
                    f"the study {path} was made with {name}={getattr(earlier, name)!r}, and this search has "
                    f"{getattr(study, name)!r}: give another file, or delete this one"
                )
        recorded = earlier.candidates
        study.finalists = earlier.finalists
        study.versions = earlier.versions
    replay = iter(recorded)

    def value_of(coefficients: Coefficients, generation: int) -> Candidate:
        known = next(replay, None)
        if known is not None:
            if known.coefficients != coefficients or known.generation != generation:
                raise StudyError(
                    f"the study {path} does not replay: candidate {len(study.candidates)} is recorded as "
                    f"{known.coefficients} and would now be {coefficients}; it was made with {study.versions}, "
                    f"this is {_versions()}: search anew in another file"
                )
            return known
        started = time.perf_counter()
        value = float(objective(coefficients))
        if not math.isfinite(value):
            raise ValueError(f"{study.proxy} is {value} for {coefficients}: check the model and its calibration data")
        return Candidate(coefficients, value, time.perf_counter() - started, generation)

    def spent() -> bool:
        if len(study.candidates) < len(recorded):
            return False
        if candidates is not None and len(study.candidates) - 1 >= candidates:
            return True
        return minutes is not None and study.seconds >= 60 * minutes

    study.candidates = [value_of(RIA, -1)]
    optimiser = OPTIMISERS[study.optimiser](study.space, study.seed, study.population)
    generation = 0
    losses: list[float] | None = None
    while not spent():
        try:
            proposed = next(optimiser) if losses is None else optimiser.send(losses)
        except StopIteration:
            break
        evaluated = [value_of(coefficients, generation) for coefficients in proposed]
        study.candidates += evaluated
        losses = [study.loss(candidate) for candidate in evaluated]
        generation += 1
        _refuse_constant(study)
        if len(study.candidates) > len(recorded):
            if path is not None:
                study.save(path)
            if progress is not None:
                progress(study)
    study.finished = True
    if path is not None:
        study.save(path)
    return study


def _refuse_constant(study: Study) -> None:
    """A proxy that does not tell candidates apart would let the optimiser wander and call its last place the best."""
    tried = {candidate.coefficients for candidate in study.candidates}
    if len(tried) >= 8 and len({candidate.value for candidate in study.candidates}) == 1:
        raise ValueError(
            f"{study.proxy} is {study.candidates[0].value} for each of {len(tried)} candidates, so it cannot guide a "
            "search: take another proxy, or widen the search space"
        )
