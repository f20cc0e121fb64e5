import numpy as np
import pytest
from scipy import stats

from crepe_llm.search.space import RIA, WANDA, Coefficients
from crepe_llm.search.trials import Stage, Trial

SHIPPED = Coefficients(1.0, 7.0, 6.0, 31, 0.85)
TOKENS = tuple(np.random.default_rng(0).integers(20, 60, 16).tolist())


def trials(shift=0.0):
    """Two trials on texts that differ far more than the two do; the second's loss per token is lower by about 0.02."""
    generator = np.random.default_rng(1)
    texts = generator.normal(3, 0.5, 16)
    gains = generator.normal(0.02, 0.01, 16) - shift
    return [Trial(RIA, tuple(loss * TOKENS), TOKENS, 0.0) for loss in (texts, texts - gains)], gains


def test_gains_have_the_jackknifes_standard_error():
    (worse, better), gains = trials()
    gain, error = better.gain_over(worse)
    differences, tokens = gains * TOKENS, np.array(TOKENS)
    assert gain == pytest.approx(differences.sum() / tokens.sum())
    left_out = (differences.sum() - differences) / (tokens.sum() - tokens)
    assert error == pytest.approx(np.sqrt(15 / 16 * ((left_out - left_out.mean()) ** 2).sum()), rel=0.1)
    assert worse.gain_over(better) == pytest.approx((-gain, error))


@pytest.mark.parametrize("factor", [0.95, 1.05])
def test_a_gain_counts_from_students_quantile_on(factor):
    (worse, better), _ = trials()
    gain, error = better.gain_over(worse)
    needed = stats.t(15).ppf(0.975) * error * factor
    (worse, better), _ = trials(shift=gain - needed)
    assert better.clearly_better(worse) == (factor > 1)
    assert not worse.clearly_better(better)


def test_noise_is_seldom_taken_for_a_gain():
    """Of pairs that differ by noise alone, one in forty looks clearly better: what the quantile says."""
    generator = np.random.default_rng(2)
    tokens = (100,) * 8
    wrong = 0
    for _ in range(2000):
        first, second = (Trial(RIA, tuple(generator.normal(300, 9, 8)), tokens, 0.0) for _ in range(2))
        wrong += second.clearly_better(first)
    assert 0.015 < wrong / 2000 < 0.035


def test_one_window_decides_nothing():
    assert not Trial(RIA, (1.0,), (9,), 0.0).clearly_better(Trial(RIA, (2.0,), (9,), 0.0))


def test_an_equal_trial_is_not_better():
    (worse, _), _ = trials()
    assert not worse.clearly_better(worse)


def test_trials_on_other_windows_are_not_compared():
    with pytest.raises(ValueError, match="2 and 1 windows"):
        Trial(RIA, (1.0, 2.0), (9, 9), 0.0).gain_over(Trial(RIA, (1.0,), (9,), 0.0))
    with pytest.raises(ValueError, match="2 losses"):
        Trial(RIA, (1.0, 2.0), (9,), 0.0)


def test_a_stage_keeps_its_incumbent():
    tokens = (10, 10, 10)
    stage = Stage("s", [Trial(RIA, (9, 9, 9), tokens, 0.0), Trial(WANDA, (8, 8.5, 9), tokens, 0.0)])
    assert stage.best(2) == [RIA, WANDA] and stage.best(1) == [RIA]
    assert stage.winner.coefficients == RIA
    stage.trials[1] = Trial(WANDA, (8, 8.1, 8), tokens, 0.0)
    assert stage.winner.coefficients == WANDA
    with pytest.raises(ValueError, match="no trial yet"):
        _ = Stage("s").winner


def test_what_is_chosen_on_one_half_is_judged_on_the_other():
    tokens = (10, 20, 10, 10)
    own = Trial(RIA, (20.0, 40.0, 21.0, 22.0), tokens, 0.0)
    even = Trial(WANDA, (10.0, 38.0, 11.0, 20.0), tokens, 0.0)  # best on windows 0 and 2
    odd = Trial(SHIPPED, (19.0, 20.0, 20.0, 12.0), tokens, 0.0)  # best on windows 1 and 3
    stage = Stage("s", [own, even, odd], chosen=(1, 2))
    gain, error = stage.honest_gain
    gains = np.array([20.0 - 19, 40 - 38, 21 - 20, 22 - 20])
    assert gain == pytest.approx(gains.sum() / 50)
    residuals = gains - gain * np.array(tokens)
    assert error == pytest.approx(np.sqrt((residuals**2).sum() * 4 / 3) / 50)
    assert stage.is_confirmed == (gain > np.sqrt(2) * stats.t(3).ppf(0.975) * error)
    assert "judged on the other" in stage.table()
    # Chosen on the half that it is judged on, the same trials would look far better.
    assert Stage("s", [own, even, odd], chosen=(2, 1)).honest_gain[0] > 5 * gain
    assert Stage("s", [own, even]).is_confirmed
    with pytest.raises(ValueError, match="is not known in the stage"):
        _ = Stage("s", [own]).honest_gain


@pytest.mark.parametrize(("tried", "confirmed"), [(0, False), (3, True), (100_000, False)])
def test_a_winner_that_no_half_would_choose_is_confirmed_by_a_gain_that_is_clear_among_many(tried, confirmed):
    tokens = (10,) * 8
    own = Trial(RIA, (20.0,) * 8, tokens, 0.0)
    winner = Trial(WANDA, tuple(20 - gain for gain in (2.0, 3.0, 2.5, 4.0, 1.5, 3.0, 2.0, 3.5)), tokens, 0.0)
    poor = Trial(SHIPPED, (20.5, 19.5) * 4, tokens, 0.0)
    stage = Stage("s", [own, winner, poor], chosen=(2, 2), tried=tried)
    gain, error = winner.gain_over(own)
    if tried:
        assert confirmed == (gain > stats.t(7).ppf(1 - 0.025 / tried) * error)
    assert stage.winner is winner and stage.is_confirmed == confirmed


def test_a_trial_on_some_windows():
    part = Trial(RIA, (1.0, 2.0, 3.0), (4, 5, 6), 7.0).on([0, 2])
    assert (part.losses, part.tokens) == ((1.0, 3.0), (4, 6))
