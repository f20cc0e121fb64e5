"""The search by a proxy, which finds what is worth measuring on the whole model.

:func:`search` drives an optimiser and saves the :class:`Study` after each generation. Given an unfinished study, it
replays the recorded losses first, so that a search that was killed at any moment ends where the uninterrupted one would
have ended. Several processes share the candidates of a generation out, and all have the same values; the first one
saves.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from crepe_llm import processes
from crepe_llm.search.optimisers import OPTIMISERS
from crepe_llm.search.space import RIA, Coefficients
from crepe_llm.search.study import Candidate, Study, StudyError, package_versions

__all__ = ["search", "take_record"]

# What a study must share with the run that goes on with it: what is known before the calibration, and what is not.
_SETTINGS = ("model", "mask", "proxy", "higher_is_better", "optimiser", "space", "seed")
_IDENTITY = (*_SETTINGS, "sample")


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
        objective: the value of one candidate; deterministic, or resuming cannot give the same result. Of several
            processes each calls it for its share of the candidates.
        study: the settings; its candidates must be empty.
        candidates: stop after this many evaluations beside RIA's; a generation is never cut, so there may be more.
        minutes: stop when the evaluations recorded have taken this long, over all processes. At least one of the two
            must be given.
        path: where the study is saved after each generation. A file that is there already and has the same settings is
            continued, so that a search killed at any moment ends as if it had not been.
        progress: called with the study after each generation.

    Returns:
        The study, finished.

    Raises:
        StudyError: the file at `path` has other settings, is damaged, or does not replay.
        ValueError: no budget, a NaN or infinite value, or a proxy that is the same for every candidate.
    """
    budget = _Budget(candidates, minutes)
    if study.optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser={study.optimiser} must be one of {', '.join(OPTIMISERS)}")
    value_of = _Values(objective, study, path)
    study.candidates = value_of([RIA], -1)
    optimiser = OPTIMISERS[study.optimiser](study.space, study.seed)
    generation = 0
    losses: list[float] | None = None
    while value_of.replays or not budget.spent(study):
        try:
            proposed = next(optimiser) if losses is None else optimiser.send(losses)
        except StopIteration:
            break
        evaluated = value_of(processes.from_first(proposed), generation)
        study.candidates += evaluated
        losses = [study.loss(candidate) for candidate in evaluated]
        generation += 1
        _refuse_constant(study)
        if value_of.evaluated_any and processes.is_first():
            if path is not None:
                study.save(path)
            if progress is not None:
                progress(study)
    study.finished = True
    if path is not None and processes.is_first():
        study.save(path)
    return study


@dataclasses.dataclass(frozen=True)
class _Budget:
    candidates: int | None
    minutes: float | None

    def __post_init__(self) -> None:
        if self.candidates is None and self.minutes is None:
            raise ValueError("the search needs a budget: give candidates, minutes or both")
        for name, budget in dataclasses.asdict(self).items():
            if budget is not None and not budget > 0:
                raise ValueError(f"{name}={budget} must be positive")

    def spent(self, study: Study) -> bool:
        if self.candidates is not None and len(study.candidates) - 1 >= self.candidates:
            return True
        return self.minutes is not None and study.seconds >= 60 * self.minutes


class _Values:
    """The values of candidates: those on record first, in their order, then those that the objective gives."""

    def __init__(self, objective: Callable[[Coefficients], float], study: Study, path: str | Path | None) -> None:
        self._objective, self._study, self._path = objective, study, path
        self._recorded = [] if path is None else take_record(study, path)
        self._given = 0

    @property
    def replays(self) -> bool:
        """Whether candidates on record are still to come."""
        return self._given < len(self._recorded)

    @property
    def evaluated_any(self) -> bool:
        """Whether a candidate was evaluated that was not on record."""
        return self._given > len(self._recorded)

    def __call__(self, proposed: Sequence[Coefficients], generation: int) -> list[Candidate]:
        places = range(self._given, min(self._given + len(proposed), len(self._recorded)))
        replayed = [self._replayed(proposed[place - self._given], place, generation) for place in places]
        new = proposed[len(replayed) :]
        self._given += len(proposed)
        return replayed + processes.spread(new, lambda coefficients: self._evaluated(coefficients, generation))

    def _evaluated(self, coefficients: Coefficients, generation: int) -> Candidate:
        started = time.perf_counter()
        value = float(self._objective(coefficients))
        if not math.isfinite(value):
            raise ValueError(
                f"{self._study.proxy} is {value} for {coefficients}: check the model and its calibration data"
            )
        return Candidate(coefficients, value, time.perf_counter() - started, generation)

    def _replayed(self, coefficients: Coefficients, place: int, generation: int) -> Candidate:
        known = self._recorded[place]
        if known.coefficients != coefficients or known.generation != generation:
            raise StudyError(
                f"the study {self._path} does not replay: candidate {place} is recorded as "
                f"{known.coefficients} and would now be {coefficients}; it was made with {self._study.versions}, "
                f"this is {package_versions()}: search anew in another file"
            )
        return known


def check_record(study: Study, path: str | Path) -> None:
    """Refuse an earlier run's file with which a search will not go on, as far as that is known before a calibration.

    Args:
        study: the search's settings; its sample is not looked at.
        path: where the search will be recorded. There may be no such file.

    Raises:
        StudyError: it is damaged, or had other settings.
    """
    processes.by_first(lambda: _same_search(study, path, _SETTINGS))


def take_record(study: Study, path: str | Path) -> list[Candidate]:
    """The candidates of an earlier run with the same settings; its plan, stages and versions become the study's.

    The first of several processes reads. Where there is no such file, there are no candidates.

    Raises:
        StudyError: it is damaged, or had other settings.
    """
    earlier = processes.by_first(lambda: _same_search(study, path, _IDENTITY))
    if earlier is None:
        return []
    study.plan, study.stages = earlier.plan, earlier.stages
    study.versions = earlier.versions
    return earlier.candidates


def _same_search(study: Study, path: str | Path, settings: Sequence[str]) -> Study | None:
    if not Path(path).exists():
        return None
    earlier = Study.load(path)
    for name in settings:
        if getattr(earlier, name) != getattr(study, name):
            raise StudyError(
                f"the study {path} was made with {name}={getattr(earlier, name)!r}, and this search has "
                f"{getattr(study, name)!r}: give another file, or delete this one"
            )
    return earlier


def _refuse_constant(study: Study) -> None:
    """A proxy that does not tell candidates apart would let the optimiser wander and call its last place the best."""
    tried = {candidate.coefficients for candidate in study.candidates}
    if len(tried) >= 8 and len({candidate.value for candidate in study.candidates}) == 1:
        raise ValueError(
            f"{study.proxy} is {study.candidates[0].value} for each of {len(tried)} candidates, so it cannot guide a "
            "search: take another proxy, or widen the search space"
        )
