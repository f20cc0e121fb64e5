import pytest

from crepe_llm.search.halving import Cost, Measure, choose_rounds, judge, propose, run_last_stage
from crepe_llm.search.search import search, take_record
from crepe_llm.search.space import RIA, WANDA, Coefficients
from crepe_llm.search.study import Study
from crepe_llm.search.trials import Plan, Round, Trial
from searches import bowl, study

COST = Cost(pruning=2.0, window=0.5, last=30.0)
OWN = Coefficients(1.0, 4.0, 3.0, 31, 0.85)
WIDE = ([512] * 16, [512] * 32)


def test_the_default_halves_twice():
    assert choose_rounds(*WIDE, COST) == (Round(32, 2), Round(8, 8), Round(3, 32))
    # With little text each stage takes what there is.
    assert choose_rounds([512] * 3, [512] * 4, COST) == (Round(32, 2), Round(8, 3), Round(3, 4))


@pytest.mark.parametrize("tokens", [8_000, 30_000, 60_000, 112_000, 400_000])
def test_a_budget_of_tokens_is_kept_and_used(tokens):
    rounds = choose_rounds(*WIDE, COST, tokens=tokens)
    first, second, last = rounds
    spent = 512 * (
        first.candidates * first.windows
        + second.candidates * max(0, second.windows - first.windows)
        + last.candidates * last.windows
    )
    assert 0.6 * tokens < spent <= tokens
    assert last.candidates <= 3 and first.candidates > second.candidates > last.candidates


@pytest.mark.parametrize("seconds", [120, 300, 600])
def test_a_budget_of_seconds_is_kept(seconds):
    rounds = choose_rounds(*WIDE, COST, seconds=seconds)
    assert 0.6 * seconds < COST.of(rounds) <= seconds


def test_budgets_that_pay_for_nothing_have_no_rounds():
    assert choose_rounds(*WIDE, COST, seconds=20) == ()
    assert choose_rounds(*WIDE, COST, tokens=100) == ()


def test_costs_add_up():
    rounds = (Round(32, 2), Round(8, 8), Round(3, 32))
    assert COST.of(rounds) == 32 * (2 + 2 * 0.5) + 8 * (2 + 6 * 0.5) + 2 * 30


def test_proposals_come_nearer_to_the_minimum():
    start = study()
    result = search(bowl(), start, candidates=64)
    tried = [Trial(c.coefficients, (c.value, c.value), (1, 1), 0.0) for c in result.candidates[1:17]]
    best = min(trial.loss for trial in tried)
    for seed in range(2):
        proposed = propose(start.space, tried, 8, seed)
        assert len(proposed) == 8
        points = [start.space.point(c) for c in [*proposed, *(trial.coefficients for trial in tried)]]
        # All are apart, so that no two give nearly the same mask.
        for number, point in enumerate(points[:8]):
            others = points[:number] + points[number + 1 :]
            assert min(max(abs(a - b) for a, b in zip(point, other, strict=True)) for other in others) > 0.1
        tried += [Trial(c, (bowl()(c),) * 2, (1, 1), 0.0) for c in proposed]
    assert min(trial.loss for trial in tried) < best / 3


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
    return Plan("", (Round(24, 2), Round(6, 4), Round(3, 6)), 1.0)


def judged(path, model, own=RIA, settings=None):
    result = search(bowl(), settings or study(), candidates=64, path=path)
    judge(result, own, model.measures, plan, path)
    return result


def test_a_better_candidate_is_found_and_wins(tmp_path):
    model = Model()
    result = judged(tmp_path / "study.json", model)
    assert [len(stage.trials) for stage in result.stages] == [24, 6, 3]
    assert [len(stage.trials[0].losses) for stage in result.stages] == [2, 4, 6]
    assert all(stage.trials[0].coefficients == RIA for stage in result.stages)
    first = {trial.coefficients for trial in result.stages[0].trials}
    assert {RIA, WANDA, result.best.coefficients} <= first
    assert bowl()(result.recommended) < bowl()(RIA) / 10
    # Survivors are measured on new windows only, and the incumbent first of all as the recipe prunes.
    assert model.calls[0] == ("real", RIA, range(6))
    assert {(call[0], call[2]) for call in model.calls[1:]} == {
        ("quick", range(2)),
        ("quick", range(2, 4)),
        ("real", range(6)),
    }
    assert len(model.calls) == 24 + 6 + 3


def test_an_incumbent_that_is_best_stays(tmp_path):
    space = study().space
    own = space.coefficients((0.7, 0.3, 0.6, 0.5))
    assert judged(tmp_path / "study.json", Model(), own).recommended == own


def test_what_follows_the_mask_decides(tmp_path):
    """The early stages like one place, the last one another: where the incumbent is."""
    own = study().space.coefficients((0.2, 0.8, 0.2, 0.5))
    result = judged(tmp_path / "study.json", Model(moved=(0.2, 0.8, 0.2, 0.5)), own)
    assert min(result.stages[1].trials, key=lambda trial: trial.loss).coefficients != own
    assert result.recommended == own


@pytest.mark.parametrize("moment", [1, 2, 9, 23, 28, 33])
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
    assert len(resumed.calls) == 24 + 6 + 3 - (moment - 1)

    def seen(of):
        return [[(trial.coefficients, trial.losses) for trial in stage.trials] for stage in of.stages]

    assert seen(result) == seen(whole) == seen(Study.load(path))
    assert Study.load(path).finished


def test_a_budget_that_is_spent_leaves_the_incumbent(tmp_path):
    model = Model()
    result = search(bowl(), study(), candidates=16)
    judge(result, RIA, model.measures, lambda seconds: Plan("minutes=1", (), 0.0), tmp_path / "study.json")
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
