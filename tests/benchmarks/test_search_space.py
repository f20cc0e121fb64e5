"""The steps that search_space.py takes from a recipe's coefficients, and what it takes of them together."""

import math

import pytest

import search_space
from crepe_llm.search.space import RIA, Coefficients
from crepe_llm.search.trials import Trial
from search_space import KINDS, Change, Setting, allocation_changes, chosen, coefficient_changes


def test_a_step_changes_the_kinds_that_it_names_and_nothing_else():
    own = Coefficients(1.0, 6.0, 3.0, 31, 0.8)
    base = Setting((own,) * 7, (0.6,) * 5)
    changes = coefficient_changes()
    assert len({change.label for change in changes}) == len(changes) == 4 + 4 * 7
    changed = {change.label: change(base) for change in changes}
    setting = changed["each kind, v_proj, balance: column and neighbourhood x 3"]
    assert setting.coefficients == (own, own, Coefficients(1.0, 18.0, 9.0, 31, 0.8), own, own, own, own)
    assert setting.sparsities == base.sparsities
    setting = changed["all layers, all, exponent: -0.2"]
    assert [each.activation_exponent for each in setting.coefficients] == pytest.approx([0.6] * 7)
    assert all(each.column == 6.0 for each in setting.coefficients)


@pytest.mark.parametrize(("blocks", "sparsity"), [(30, 0.6), (18, 0.7), (7, 0.5)])
def test_moves_keep_the_mean_sparsity(blocks, sparsity):
    base = Setting((RIA,) * 7, (sparsity,) * blocks)
    changes = allocation_changes(blocks, sparsity)
    assert len({change.label for change in changes}) == len(changes) == 5 + 2 * 6
    for change in changes:
        found = change(base)
        assert math.fsum(found.sparsities) / blocks == pytest.approx(sparsity)
        assert 0 < min(found.sparsities) < sparsity < max(found.sparsities) < 1
        assert found.coefficients == base.coefficients
    line = next(change for change in changes if change.name == "spread +0.10")(base).sparsities
    assert line[0] == pytest.approx(sparsity - 0.1) and line[-1] == pytest.approx(sparsity + 0.1)
    assert list(line) == sorted(line)


def test_of_each_part_the_best_change_is_taken_if_it_is_above_its_error():
    def trial(*losses):
        return Trial(RIA, losses, (10,) * len(losses), 1.0)

    base = trial(10.0, 10.0, 10.0, 10.0)
    changes = [Change("f", part, name) for part, name in (("a", "up"), ("a", "down"), ("b", "up"), ("c", "up"))]
    losses = [(9.0, 9.1, 9.0, 9.1), (8.0, 8.1, 8.0, 8.1), (9.0, 11.0, 9.0, 10.9), (11.0, 11.0, 11.0, 11.0)]
    trials = {change.label: trial(*each) for change, each in zip(changes, losses, strict=True)}
    assert [change.label for change in chosen(changes, trials, base)] == ["f, a: down"]
    # By the first half alone the second part's step is good.
    assert [change.label for change in chosen(changes, trials, base, range(0, 4, 2))] == ["f, a: down", "f, b: up"]
    assert search_space.changes_by_label(trials) == changes


def test_what_a_half_takes_is_judged_on_the_other():
    def trial(*losses):
        return Trial(RIA, losses, (10,) * len(losses), 1.0)

    base, change = trial(10.0, 10.0, 10.0, 10.0), Change("f", "a", "up")
    trials = {change.label: trial(9.0, 11.0, 9.1, 11.0)}  # good on the first half alone
    lasts = {((), None): base, ((change.label,), 1): trial(12.0, 13.0)}
    gain, error = search_space.crossed([change], trials, base, lasts, base)
    assert gain == pytest.approx(-5 / 40) and error > 0
    assert search_space.crossed([change], trials, base, {((), None): base}, base) is None


def test_every_kind_has_its_own_coefficients():
    assert len(KINDS) == len(set(KINDS)) == 7
