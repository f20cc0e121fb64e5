import dataclasses
import time

import numpy as np
import pytest

from crepe_llm.search.search import search, take_record
from crepe_llm.search.space import RIA, WANDA, Coefficients
from crepe_llm.search.stages import Cost, Measure, choose_rounds, judge, run_last_stage
from crepe_llm.search.study import Study
from crepe_llm.search.trials import Plan, Round
from searches import bowl, study

COST = Cost(pruning=2.0, window=0.5, last=30.0)
OWN = Coefficients(1.0, 4.0, 3.0, 31, 0.85)
WIDE = [512] * 32


def test_the_default_takes_many_on_little_text_and_few_on_much():
    assert choose_rounds(WIDE, COST) == (Round(32, 16), Round(4, 32))
    # With little text each stage takes what there is.
    assert choose_rounds([512] * 4, COST) == (Round(32, 4), Round(4, 4))


@pytest.mark.parametrize("tokens", [40_000, 100_000, 327_680, 900_000])
def test_a_budget_of_tokens_is_kept_and_used(tokens):
    rounds = choose_rounds(WIDE, COST, tokens=tokens)
    first, last = rounds
    spent = 512 * (first.candidates * first.windows + last.candidates * last.windows)
    assert 0.6 * tokens < spent <= tokens
    assert last.candidates <= 4 and first.candidates > 2 * last.candidates


@pytest.mark.parametrize("seconds", [180, 300, 600])
def test_a_budget_of_seconds_is_kept(seconds):
    rounds = choose_rounds(WIDE, COST, seconds=seconds)
    assert 0.6 * seconds < COST.of(rounds) <= seconds


def test_budgets_that_pay_for_nothing_have_no_rounds():
    assert choose_rounds(WIDE, COST, seconds=20) == ()
    assert choose_rounds(WIDE, COST, tokens=100) == ()


def test_costs_add_up():
    rounds = (Round(40, 8), Round(4, 32))
    assert COST.of(rounds) == 40 * (2 + 8 * 0.5) + 3 * 30
    assert COST.limit(rounds, 200) == 200 - 3 * 30
    # Of three finalists one process has two; of each four candidates one of three processes has two.
    two, three = (dataclasses.replace(COST, processes=count) for count in (2, 3))
    assert two.of(rounds) == 20 * 6 + 2 * 30 and two.limit(rounds, 200) == 2 * (200 - 2 * 30)
    assert three.of(rounds) == (6 + 6 * 2) * 6 + 30


class Model:
    """Losses per token of a bowl, on windows that differ, with what was measured written down.

    Pruning for real moves the minimum, as what follows a mask may.
    """

    def __init__(self, windows=6, moved=(0.7, 0.3, 0.6, 0.5), spoil=None):
        self.calls = []
        tokens = (100,) * windows
        self.measures = (
            Measure("quick", tokens, lambda c, r: self._losses("quick", bowl(), c, r)),
            Measure("real", tokens, lambda c, r: self._losses("real", bowl(moved), c, r)),
        )
        self._spoil = spoil

    def _losses(self, name, loss, coefficients, windows):
        self.calls.append((name, coefficients, windows))
        if len(self.calls) == self._spoil:
            raise KeyboardInterrupt
        return [100 * (2 + 0.3 * window + loss(coefficients) * (1 + 0.01 * window)) for window in windows]


def plan(seconds=0.0):
    return Plan("", (Round(24, 2), Round(3, 6)), 1.0)


def judged(path, model, own=RIA, settings=None):
    result = search(bowl(), settings or study(), candidates=64, path=path)
    judge(result, [own, OWN], model.measures, plan, path)
    return result


def test_a_better_candidate_is_found_and_wins(tmp_path):
    model = Model()
    result = judged(tmp_path / "study.json", model)
    assert [len(stage.trials) for stage in result.stages] == [24, 3]
    assert [len(stage.trials[0].losses) for stage in result.stages] == [2, 6]
    assert all(stage.trials[0].coefficients == RIA for stage in result.stages)
    first = {trial.coefficients for trial in result.stages[0].trials}
    assert {RIA, OWN, WANDA, result.best.coefficients} <= first
    assert bowl()(result.recommended) < bowl()(RIA) / 10
    # The incumbent is measured first of all as the recipe prunes, and only once.
    assert model.calls[0] == ("real", RIA, range(6))
    assert [(call[0], call[2]) for call in model.calls[1:]] == [("quick", range(2))] * 24 + [("real", range(6))] * 2


def test_an_incumbent_that_is_best_stays(tmp_path):
    space = study().space
    own = space.coefficients((0.7, 0.3, 0.6, 0.5))
    assert judged(tmp_path / "study.json", Model(), own).recommended == own


class Tastes(Model):
    """Each window likes another side of the space, and on average none is better: what seems better is the text."""

    def __init__(self, seed):
        super().__init__(windows=8)
        self._slopes = np.random.default_rng(seed).normal(size=(8, 4))

    def _losses(self, name, loss, coefficients, windows):
        place = np.array(study().space.point(coefficients)) - 0.5
        return [100 * (2 + 0.1 * float(self._slopes[window] @ place)) for window in windows]


def test_luck_is_not_taken_for_merit(tmp_path):
    """The last stage sees the text that candidates were chosen on, and likes some; on new text they are no better.

    Of the seeds 0 to 13 the last stage alone would be wrong in four, these three among them.
    """
    liked = 0
    rounds = Plan("", (Round(20, 8), Round(3, 8)), 1.0)
    for seed in (3, 7, 10):
        result = search(bowl(), study(), candidates=64)
        judge(result, [RIA], Tastes(seed).measures, lambda seconds: rounds, tmp_path / f"{seed}.json")
        assert Study.load(tmp_path / f"{seed}.json").recommended == result.recommended == RIA
        liked += result.stages[-1].winner.coefficients != RIA
    assert liked >= 2


def test_what_follows_the_mask_decides(tmp_path):
    """The first stage likes one place, the last one another: where the incumbent is."""
    own = study().space.coefficients((0.2, 0.8, 0.2, 0.5))
    result = judged(tmp_path / "study.json", Model(moved=(0.2, 0.8, 0.2, 0.5)), own)
    assert min(result.stages[0].trials, key=lambda trial: trial.loss).coefficients != own
    assert result.recommended == own


@pytest.mark.parametrize("moment", [1, 2, 9, 23, 27])
def test_interrupted_stages_end_as_uninterrupted_ones(tmp_path, moment):
    whole = judged(tmp_path / "whole.json", Model())
    path = tmp_path / "study.json"
    with pytest.raises(KeyboardInterrupt):
        judged(path, Model(spoil=moment))
    unfinished = Study.load(path)
    assert not unfinished.finished or moment == 1  # the search by proxy was, and nothing else had begun
    str(unfinished)
    resumed = Model()
    result = judged(path, resumed)
    assert len(resumed.calls) == 24 + 3 - (moment - 1)

    def seen(of):
        return [[(trial.coefficients, trial.losses) for trial in stage.trials] for stage in of.stages]

    assert seen(result) == seen(whole) == seen(Study.load(path))
    assert Study.load(path).finished


def test_a_first_stage_that_takes_too_long_ends_and_the_last_one_follows(tmp_path):
    class Slow(Model):
        def _losses(self, *arguments):
            time.sleep(0.02)
            return super()._losses(*arguments)

    def limited(seconds):
        return dataclasses.replace(plan(), limit=0.25)

    path, counts = tmp_path / "study.json", []
    for model in (Slow(), Model()):  # then from the record
        result = search(bowl(), study(), candidates=64, path=path)
        judge(result, [RIA, OWN], model.measures, limited, path)
        first, last = result.stages
        spent = [trial.seconds for trial in first.trials]
        assert sum(spent[:-4]) < 0.25 <= sum(spent) and len(last.trials) == 3
        counts.append(len(first.trials))
    assert counts[0] == counts[1] < 24


def test_a_plan_of_an_earlier_version_is_made_anew(tmp_path):
    result = search(bowl(), study(), candidates=64)
    result.plan = Plan("", (Round(32, 2), Round(8, 4), Round(3, 6)), 1.0)
    judge(result, [RIA], Model().measures, plan, tmp_path / "study.json")
    assert result.plan == plan()


def test_a_budget_that_is_spent_leaves_the_incumbent(tmp_path):
    model = Model()
    result = search(bowl(), study(), candidates=16)
    judge(result, [RIA], model.measures, lambda seconds: Plan("minutes=1", (), 0.0), tmp_path / "study.json")
    assert result.recommended == RIA
    assert len(model.calls) == 1
    assert "the budget is spent" in str(result)


def test_what_another_model_s_study_found_is_judged_by_the_last_stage_alone(tmp_path):
    found = judged(tmp_path / "first.json", Model())
    path = tmp_path / "second.json"
    for expected in (3, 0):  # then from the record
        model, transferred = Model(), study(model="another")
        if path.exists():
            take_record(transferred, path)
        run_last_stage(transferred, [OWN, *found.challengers], model.measures[1], path, lambda stage: None)
        assert [call[0] for call in model.calls] == ["real"] * expected
        [stage] = transferred.stages
        assert [trial.coefficients for trial in stage.trials] == [OWN, *found.challengers]
        assert transferred.recommended == found.recommended
