"""Successive halving on the whole model: many candidates on little text, few on much, the last pruned for real.

A study's stages are measured in the order of its plan, and saved trial by trial. What is on record is not measured
again, so that a search that was killed at any moment ends as if it had not been.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import RBFInterpolator

from crepe_llm.search.space import RIA, WANDA, Coefficients, SearchSpace
from crepe_llm.search.study import Study
from crepe_llm.search.trials import Plan, Round, Stage, Trial

__all__ = ["WINDOW", "Cost", "Measure", "choose_rounds", "judge", "propose", "run_last_stage"]

WINDOW = 512
"""Tokens of a window: texts are cut into windows of at most so many."""

# Candidates and tokens of each. The last stage is pruned as the recipe prunes.
_DEFAULT = ((32, 1024), (8, 4096), (3, 16384))
# With fewer candidates than these a stage decides nothing.
_FEWEST = (8, 3, 2)
# Half of the first stage's candidates are chosen by the proxy, the others by what was measured of these.
_PROPOSED_AT_ONCE = 8
# Candidates nearer to each other than this, in the unit cube, give nearly the same masks.
_NEAR = 0.12
_SMOOTHING = 1e-3


@dataclasses.dataclass(frozen=True)
class Measure:
    """One way to measure candidates.

    Attributes:
        name: how they are pruned, and what is measured.
        tokens: of each window, how many are predicted.
        losses: of a candidate and a range of windows, the summed loss of each window.
    """

    name: str
    tokens: tuple[int, ...]
    losses: Callable[[Coefficients, range], list[float]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds that pruning by cached statistics takes, a window, and a candidate of the last stage."""

    pruning: float
    window: float
    last: float

    def of(self, rounds: Sequence[Round]) -> float:
        """What rounds take; survivors are not measured again on windows that they were measured on."""
        seconds = (rounds[-1].candidates - 1) * self.last
        for each, new in zip(rounds[:-1], _new_windows(rounds), strict=True):
            seconds += each.candidates * (self.pruning + new * self.window) * bool(new)
        return seconds


def choose_rounds(
    windows: Sequence[int],
    kept: Sequence[int],
    cost: Cost,
    *,
    tokens: int | None = None,
    seconds: float | None = None,
) -> tuple[Round, ...]:
    """The stages that a budget pays for.

    By default 32 candidates on 1024 tokens each, 8 on 4096 and 3 on 16384, as far as there is text. A smaller budget
    takes fewer tokens for each candidate and, at one window, fewer candidates; a larger one takes more candidates.

    Args:
        windows: tokens of each window that early stages may use.
        kept: tokens of each window that is kept for the last stage.
        cost: what things take.
        tokens: the most tokens, candidates times windows, in all stages.
        seconds: the most that the stages may take.

    Returns:
        The rounds; none where the budget is too small for any.
    """
    if tokens is None and seconds is None:
        return _scaled(1.0, windows, kept)
    for factor in np.geomspace(8, 1 / 1024, 131).tolist():
        rounds = _scaled(factor, windows, kept)
        fits = tokens is None or _tokens_of(rounds, windows, kept) <= tokens
        if fits and (seconds is None or cost.of(rounds) <= seconds):
            return rounds
    return ()


def _scaled(factor: float, windows: Sequence[int], kept: Sequence[int]) -> tuple[Round, ...]:
    rounds = []
    for (candidates, wanted), fewest in zip(_DEFAULT, _FEWEST, strict=True):
        last = wanted == _DEFAULT[-1][1]
        texts = kept if last else windows
        length = sum(texts) / len(texts)
        count = min(len(texts), max(1, round(wanted * min(1.0, factor) / length)))
        affordable = round(candidates * wanted * factor / (count * length))
        most = candidates if last else round(candidates * max(1.0, factor))
        rounds.append(Round(min(most, max(fewest, affordable)), count))
    return tuple(rounds)


def _new_windows(rounds: Sequence[Round]) -> list[int]:
    before = [0, *(each.windows for each in rounds[:-2])]
    return [max(0, each.windows - seen) for each, seen in zip(rounds[:-1], before, strict=True)]


def _tokens_of(rounds: Sequence[Round], windows: Sequence[int], kept: Sequence[int]) -> int:
    total, seen = rounds[-1].candidates * sum(kept[: rounds[-1].windows]), 0
    for each in rounds[:-1]:
        total += each.candidates * max(0, sum(windows[: each.windows]) - seen)
        seen = sum(windows[: each.windows])
    return total


def propose(space: SearchSpace, trials: Sequence[Trial], count: int, seed: int) -> list[Coefficients]:
    """Candidates where a smooth surface through the losses of trials is lowest, apart from each other and from these.

    The surface is a thin-plate spline over the unit cube. Losses above the median count as the median: how bad the bad
    ones are says nothing of where the best one is.

    Args:
        space: where to look.
        trials: on the same windows, more than the space has dimensions.
        count: how many, if there are as many.
        seed: of the places that are looked at.
    """
    axes = space.varying()
    known = np.array([space.point(trial.coefficients) for trial in trials])[:, axes]
    losses = np.array([trial.loss for trial in trials])
    surface = RBFInterpolator(known, np.minimum(losses, np.median(losses)), smoothing=_SMOOTHING, degree=1)
    places = torch.quasirandom.SobolEngine(4, scramble=True, seed=seed).draw(2048, dtype=torch.float64).numpy()
    chosen: list[Coefficients] = []
    taken = list(known)
    for index in np.argsort(surface(places[:, axes]), kind="stable"):
        place = places[index][axes]
        if len(chosen) < count and min(np.abs(np.array(taken) - place).max(axis=1)) >= _NEAR:
            chosen.append(space.coefficients(places[index].tolist()))
            taken.append(place)
    return chosen


def judge(
    study: Study,
    own: Coefficients,
    measures: tuple[Measure, Measure],
    plan: Callable[[float], Plan],
    path: Path,
    progress: Callable[[Stage], None] = lambda stage: None,
) -> None:
    """Run a study's stages, until the last one says what to use.

    The incumbent is pruned as the recipe prunes first of all, which tells what that takes.

    Args:
        study: after the search by proxy; its stages are filled here.
        own: the incumbent's coefficients.
        measures: by cached statistics, and as the recipe prunes.
        plan: of the seconds that the incumbent took in the last stage, what to do. A study that was read with a plan
            for the same budget keeps it.
        path: where the study is saved after each trial.
        progress: told of a stage after each trial.
    """
    quick, real = measures
    recorder = _Recorder(study, path, progress)
    study.finished = False
    last = Stage(real.name)
    recorder.measure(last, real, [own], len(real.tokens))
    wanted = plan(last.trials[0].seconds)
    if study.plan is None or study.plan.budget != wanted.budget:
        study.plan = wanted
    study.stages = []
    pool = [own]
    for number, round_ in enumerate(study.plan.rounds[:-1]):
        stage = Stage(f"stage {number + 1}, {quick.name}")
        study.stages.append(stage)
        if number == 0:
            _first_stage(study, stage, recorder, quick, own)
        else:
            recorder.measure(stage, quick, pool[: round_.candidates], round_.windows)
        pool = stage.best(len(stage.trials))
    study.stages.append(last)
    if study.plan.rounds:
        final = study.plan.rounds[-1]
        last.trials.clear()
        recorder.measure(last, real, pool[: final.candidates], final.windows)
    study.finished = True
    study.save(path)


def run_last_stage(
    study: Study, candidates: Sequence[Coefficients], real: Measure, path: Path, progress: Callable[[Stage], None]
) -> None:
    """Have the last stage alone choose among candidates, the incumbent first; for what another study found."""
    recorder, last = _Recorder(study, path, progress), Stage(real.name)
    study.stages = [last]
    recorder.measure(last, real, list(dict.fromkeys(candidates)), len(real.tokens))
    study.finished = True
    study.save(path)


def _first_stage(study: Study, stage: Stage, recorder: "_Recorder", quick: Measure, own: Coefficients) -> None:
    """Half of the candidates by proxy; then those that a surface through the losses so far proposes."""
    assert study.plan is not None
    round_ = study.plan.rounds[0]
    recorder.measure(stage, quick, study.shortlist(round_.candidates // 2, [own, RIA, WANDA]), round_.windows)
    while (room := round_.candidates - len(stage.trials)) > 0:
        seed = study.seed + len(stage.trials)
        proposed = propose(study.space, stage.trials, min(room, _PROPOSED_AT_ONCE), seed)
        if not proposed:
            break
        recorder.measure(stage, quick, proposed, round_.windows)


class _Recorder:
    """Measures what is not on record, and saves."""

    def __init__(self, study: Study, path: Path, progress: Callable[[Stage], None]) -> None:
        self._study, self._path, self._progress = study, path, progress
        self._known: dict[tuple[str, Coefficients], Trial] = {}
        for stage in study.stages:
            for trial in stage.trials:
                self._remember(_way(stage.name), trial)

    def measure(self, stage: Stage, measure: Measure, pool: Sequence[Coefficients], windows: int) -> None:
        """Add the trials of a pool to a stage."""
        for coefficients in pool:
            known = self._known.get((_way(stage.name), coefficients))
            trial = _completed(measure, coefficients, windows, known)
            if known is None or len(known.losses) < windows:
                self._remember(_way(stage.name), trial)
                stage.trials.append(trial)
                self._save(stage)
                self._progress(stage)
            else:
                stage.trials.append(trial)

    def _save(self, stage: Stage) -> None:
        # Trials of an earlier run that this one has not come to yet stay in the file.
        stages = [*self._study.stages, *([] if stage in self._study.stages else [stage])]
        seen = {(_way(each.name), trial.coefficients) for each in stages for trial in each.trials}
        rest: dict[tuple[str, int], list[Trial]] = {}
        for (way, coefficients), trial in self._known.items():
            if (way, coefficients) not in seen:
                rest.setdefault((way, len(trial.losses)), []).append(trial)
        unfinished = [Stage(f"stage to come, {way}", trials) for (way, _), trials in rest.items()]
        dataclasses.replace(self._study, stages=[*unfinished, *stages], finished=False).save(self._path)

    def _remember(self, way: str, trial: Trial) -> None:
        known = self._known.get((way, trial.coefficients))
        if known is None or len(known.losses) < len(trial.losses):
            self._known[way, trial.coefficients] = trial


def _way(stage: str) -> str:
    """A stage's name without its number: trials of one way to measure serve all stages that measure so."""
    return stage.partition(", ")[2] if stage.startswith("stage ") else stage


def _completed(measure: Measure, coefficients: Coefficients, windows: int, known: Trial | None) -> Trial:
    losses = [] if known is None else list(known.losses[:windows])
    seconds = 0.0 if known is None else known.seconds
    if len(losses) < windows:
        started = time.perf_counter()
        losses += measure.losses(coefficients, range(len(losses), windows))
        seconds += time.perf_counter() - started
    return Trial(coefficients, tuple(losses), measure.tokens[:windows], seconds)
