import numpy as np
import pytest
from scipy import stats

from crepe_llm.search.space import RIA, WANDA
from crepe_llm.search.trials import Stage, Trial

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
