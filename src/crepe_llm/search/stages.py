"""Two stages on the whole model: many candidates on little text, then the last few pruned as the recipe prunes.

A study's stages are measured in the order of its plan, and saved trial by trial. What is on record is not measured
again, so that a search that was killed at any moment ends as if it had not been.

Several processes share the candidates out, and all have the same results; the first one saves.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from crepe_llm import processes
from crepe_llm.search.space import RIA, WANDA, Coefficients
from crepe_llm.search.study import Study
from crepe_llm.search.surrogate import Surrogate
from crepe_llm.search.trials import Plan, Round, Stage, Trial

__all__ = ["DEFAULT_ROUNDS", "DEFAULT_TOKENS", "WINDOW", "Cost", "Measure", "choose_rounds", "judge", "run_last_stage"]

WINDOW = 512
"""Tokens of a window: texts are cut into windows of at most so many."""

DEFAULT_ROUNDS = ((32, 8192), (4, 16384))
"""Of the first stage and of the last, how many candidates are judged, each on how many tokens, as far as there is
text."""
DEFAULT_TOKENS = sum(candidates * tokens for candidates, tokens in DEFAULT_ROUNDS)
"""The most tokens that pruned models are judged on by default."""
# With fewer candidates and windows than these a stage decides nothing.
_FEWEST = ((12, 2), (4, 8))
# So many of the first stage's candidates are chosen by the proxy, at most; then so many at a time by the surrogate.
_BY_PROXY, _AT_ONCE = 16, 4


Candidate = TypeVar("Candidate")


@dataclasses.dataclass(frozen=True)
class Measure(Generic[Candidate]):
    """One way to measure candidates.

    Attributes:
        name: how they are pruned, and what is measured.
        tokens: of each window, how many are predicted. Windows of the text's two halves take turns.
        losses: of a candidate and a range of windows, the summed loss of each window; a process calls it alone.
        prepare: what all processes do together before.
    """

    name: str
    tokens: tuple[int, ...]
    losses: Callable[[Candidate, range], list[float]]
    prepare: Callable[[], None] = lambda: None


CoefficientMeasure = Measure[Coefficients]


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds that things take.

    Attributes:
        pruning: one process, for a candidate's pruning in the first stage.
        window: one process, for a window there.
        last: one process, for a candidate of the last stage.
        processes: how many share candidates.
    """

    pruning: float
    window: float
    last: float
    processes: int = 1

    def of(self, rounds: Sequence[Round]) -> float:
        """What rounds take; the incumbent's place in the last one is paid before there is a plan."""
        return self._first(rounds[0]) + self._last(rounds[1])

    def limit(self, rounds: Sequence[Round], seconds: float) -> float:
        """What the trials of the first stage may take together, over all processes, if both rounds have so long."""
        whole = dataclasses.replace(self, processes=1)
        return (seconds - self._last(rounds[1])) * whole._first(rounds[0]) / self._first(rounds[0])

    def _first(self, round_: Round) -> float:
        shared = min(_by_proxy(round_), round_.candidates)
        rest = round_.candidates - shared
        turns = self._turns(shared) + rest // _AT_ONCE * self._turns(_AT_ONCE) + self._turns(rest % _AT_ONCE)
        return turns * (self.pruning + round_.windows * self.window)

    def _last(self, round_: Round) -> float:
        return self._turns(round_.candidates - 1) * self.last

    def _turns(self, candidates: int) -> float:
        """How many candidates the busiest process has of these."""
        return math.ceil(candidates / self.processes)


def choose_rounds(
    windows: Sequence[int],
    cost: Cost,
    *,
    tokens: int | None = None,
    seconds: float | None = None,
) -> tuple[Round, ...]:
    """The stages that a budget pays for.

    By default 32 candidates on 8192 tokens each and 4 on 16384, as far as there is text. A smaller budget takes fewer
    candidates and fewer tokens for each, a larger one takes more candidates.

    Args:
        windows: tokens of each window that candidates may be judged on.
        cost: what things take.
        tokens: the most tokens, candidates times windows, in both stages.
        seconds: the most that the stages may take.

    Returns:
        The two rounds; none where the budget is too small for any.
    """
    if tokens is None and seconds is None:
        return _scaled(1.0, windows)
    for factor in np.geomspace(8, 1 / 1024, 131).tolist():
        rounds = _scaled(factor, windows)
        asked = sum(each.candidates * sum(windows[: each.windows]) for each in rounds)
        if (tokens is None or asked <= tokens) and (seconds is None or cost.of(rounds) <= seconds):
            return rounds
    return ()


def _scaled(factor: float, windows: Sequence[int]) -> tuple[Round, ...]:
    rounds: list[Round] = []
    for (candidates, wanted), (fewest, shortest) in zip(DEFAULT_ROUNDS, _FEWEST, strict=True):
        length, there = sum(windows) / len(windows), min(wanted, sum(windows))
        count = min(len(windows), max(shortest, round(there * min(1.0, factor) ** 0.5 / length)))
        affordable = round(candidates * there * factor / (count * length))
        most = candidates if rounds else round(candidates * max(1.0, factor))
        rounds.append(Round(min(most, max(fewest, affordable)), count))
    return tuple(rounds)


def judge(
    study: Study,
    others: Sequence[Coefficients],
    measures: tuple[CoefficientMeasure, CoefficientMeasure],
    plan: Callable[[float], Plan],
    path: Path,
    progress: Callable[[Stage], None] = lambda stage: None,
) -> None:
    """Run a study's stages, until the last one says what to use.

    The incumbent is pruned as the recipe prunes first of all, which tells what that takes.

    Args:
        study: after the search by proxy; its stages are filled here.
        others: the incumbent's coefficients, then what else the first stage measures in any case.
        measures: of the first stage and of the last.
        plan: of the seconds that the incumbent took in the last stage, what to do; the first process's counts. A study
            that was read with a plan for the same budget keeps it.
        path: where the study is saved after each trial.
        progress: told of a stage after each trial.
    """
    quick, real = measures
    recorder = _Recorder(study, path, progress)
    study.finished = False
    last = Stage(real.name)
    recorder.measure(last, real, others[:1], len(real.tokens))
    wanted = processes.from_first(plan(last.trials[0].seconds))
    # Plans of earlier versions had three rounds.
    if study.plan is None or study.plan.budget != wanted.budget or len(study.plan.rounds) not in (0, 2):
        study.plan = wanted
    study.stages = []
    if study.plan.rounds:
        final = study.plan.rounds[-1]
        stage = Stage(quick.name)
        study.stages.append(stage)
        _first_stage(study, stage, recorder, quick, others)
        chosen, finalists = processes.from_first(_finalists(study, stage, final.candidates))
        study.stages.append(last)
        last.trials.clear()
        recorder.measure(last, real, finalists, final.windows)
        last.chosen, last.tried = chosen, len(stage.trials)
    else:
        study.stages.append(last)
    _finish(study, path)


def run_last_stage(
    study: Study,
    candidates: Sequence[Coefficients],
    real: CoefficientMeasure,
    path: Path,
    progress: Callable[[Stage], None],
) -> None:
    """Have the last stage alone choose among candidates, the incumbent first; for what another study found."""
    recorder, last = _Recorder(study, path, progress), Stage(real.name)
    study.stages = [last]
    recorder.measure(last, real, list(dict.fromkeys(candidates)), len(real.tokens))
    _finish(study, path)


def _finish(study: Study, path: Path) -> None:
    study.finished = True
    if processes.is_first():
        study.save(path)


def _finalists(study: Study, stage: Stage, count: int) -> tuple[tuple[int, int] | None, list[Coefficients]]:
    """The incumbent, what each half of the text alone would choose, and the best of all; where the two are in it."""
    if len(stage.trials) < 3 or len(stage.trials[0].losses) < 2:
        return None, Surrogate(study.space, stage.trials).finalists(count)
    by_half = [
        Surrogate(study.space, [trial.on(stage.half(number)) for trial in stage.trials]).finalists(2)[1]
        for number in (0, 1)
    ]
    first, *others = Surrogate(study.space, stage.trials).finalists(count)
    finalists = list(dict.fromkeys([first, *by_half, *others]))[:count]
    return (finalists.index(by_half[0]), finalists.index(by_half[1])), finalists


def _first_stage(
    study: Study, stage: Stage, recorder: "_Recorder", quick: CoefficientMeasure, others: Sequence[Coefficients]
) -> None:
    """What is measured in any case, some candidates by proxy, then those that a surrogate of the losses proposes.

    Where the machine has become slower than the plan took it to be, the surrogate proposes fewer.
    """
    assert study.plan is not None
    round_ = study.plan.rounds[0]
    # As published, where the search chooses who competes: RIA's scores in the whole matrix, Wanda's in each row.
    published = [study.space.competing(RIA, "matrix"), study.space.competing(WANDA, "row")]
    shortlist = study.shortlist(_by_proxy(round_), [*others, *published])[: round_.candidates]
    recorder.measure(stage, quick, shortlist, round_.windows)
    limit = math.inf if study.plan.limit is None else study.plan.limit
    while (room := round_.candidates - len(stage.trials)) > 0:
        # By the times on record, so that a search that goes on stops at the same place.
        if math.fsum(trial.seconds for trial in stage.trials) >= limit:
            break
        surrogate = Surrogate(study.space, stage.trials)
        proposed = processes.from_first(surrogate.propose(min(room, _AT_ONCE), study.seed + len(stage.trials)))
        if not proposed:
            break
        recorder.measure(stage, quick, proposed, round_.windows)


def _by_proxy(round_: Round) -> int:
    """How many of the first stage's candidates are chosen by the proxy, or known beforehand."""
    return max(_FEWEST[0][0] * 2 // 3, min(_BY_PROXY, round_.candidates * 2 // 5))


class _Recorder:
    """Measures what is not on record, and saves."""

    def __init__(self, study: Study, path: Path, progress: Callable[[Stage], None]) -> None:
        self._study, self._path, self._progress = study, path, progress
        self._known: dict[tuple[str, Coefficients], Trial] = {}
        for stage in study.stages:
            for trial in stage.trials:
                self._remember(stage.name, trial)

    def measure(self, stage: Stage, measure: CoefficientMeasure, pool: Sequence[Coefficients], windows: int) -> None:
        """Add the trials of a pool, which is the same in all processes, to a stage."""
        left = [c for c in pool if len(self._losses(stage, c)) < windows]
        new = set(left)
        for coefficients in pool:
            if coefficients in left[:1]:
                self._complete(stage, measure, left[: processes.count()], windows)
                left = left[processes.count() :]
            known = self._known[stage.name, coefficients]
            stage.trials.append(Trial(coefficients, known.losses[:windows], measure.tokens[:windows], known.seconds))
            if coefficients in new and processes.is_first():
                self._save(stage)
                self._progress(stage)

    def _complete(self, stage: Stage, measure: CoefficientMeasure, turn: Sequence[Coefficients], windows: int) -> None:
        """Measure some candidates on the windows that they have not been measured on."""
        measure.prepare()

        def timed(coefficients: Coefficients) -> tuple[list[float], float]:
            started = time.perf_counter()
            found = measure.losses(coefficients, range(len(self._losses(stage, coefficients)), windows))
            return found, time.perf_counter() - started

        for coefficients, (found, taken) in zip(turn, processes.spread(turn, timed), strict=True):
            known = self._known.get((stage.name, coefficients))
            seconds = taken + (0.0 if known is None else known.seconds)
            losses = (*self._losses(stage, coefficients), *found)
            self._remember(stage.name, Trial(coefficients, losses, measure.tokens[:windows], seconds))

    def _losses(self, stage: Stage, coefficients: Coefficients) -> tuple[float, ...]:
        """What is on record of a candidate."""
        known = self._known.get((stage.name, coefficients))
        return () if known is None else known.losses

    def _save(self, stage: Stage) -> None:
        # Trials of an earlier run that this one has not come to yet stay in the file.
        stages = [*self._study.stages, *([] if stage in self._study.stages else [stage])]
        seen = {(each.name, trial.coefficients) for each in stages for trial in each.trials}
        rest: dict[tuple[str, int], list[Trial]] = {}
        for (way, coefficients), trial in self._known.items():
            if (way, coefficients) not in seen:
                rest.setdefault((way, len(trial.losses)), []).append(trial)
        unfinished = [Stage(way, trials) for (way, _), trials in rest.items()]
        dataclasses.replace(self._study, stages=[*unfinished, *stages], finished=False).save(self._path)

    def _remember(self, way: str, trial: Trial) -> None:
        known = self._known.get((way, trial.coefficients))
        if known is None or len(known.losses) < len(trial.losses):
            self._known[way, trial.coefficients] = trial
