import numpy as np
import pytest

from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, WANDA, SearchSpace
from crepe_llm.search.surrogate import Surrogate
from crepe_llm.search.trials import Trial
from searches import bowl, study


def trials_of(loss, count=16, noise=0.0, settings=None):
    """Trials of the look around, RIA first."""
    generator = np.random.default_rng(0)
    result = search(loss, settings or study(), candidates=64)
    return [
        Trial(c.coefficients, (c.value + noise * generator.normal(),) * 2, (1, 1), 0.0)
        for c in result.candidates[:count]
    ]


def apart(space, candidates):
    points = np.array([space.point(each) for each in candidates])
    return min(np.abs(a - b).max() for n, a in enumerate(points) for b in points[:n])


def test_proposals_come_nearer_to_the_minimum():
    tried = trials_of(bowl())
    best = min(trial.loss for trial in tried)
    for seed in range(2):
        proposed = Surrogate(SearchSpace(), tried).propose(4, seed)
        assert len(proposed) == 4
        # All are apart, so that no two give nearly the same mask.
        assert apart(SearchSpace(), proposed) > 0.1
        points = [SearchSpace().point(trial.coefficients) for trial in tried]
        assert all(np.abs(np.array(points) - SearchSpace().point(c)).max(axis=1).min() > 0.1 for c in proposed)
        tried += [Trial(c, (bowl()(c),) * 2, (1, 1), 0.0) for c in proposed]
    assert min(trial.loss for trial in tried) < best / 3


def test_a_surrogate_tells_good_places_from_bad_ones():
    tried = trials_of(bowl(), 40)
    new = [c for c in trials_of(bowl(), 65) if c.coefficients not in {trial.coefficients for trial in tried}]
    good = [trial for trial in new if trial.loss < 0.3]
    expected = Surrogate(SearchSpace(), tried).expected([trial.coefficients for trial in good])
    assert len(good) > 4
    assert np.abs(expected - [trial.loss for trial in good]).mean() < 0.03


def test_a_lucky_candidate_is_no_finalist():
    """Noise makes one candidate the best of all where its neighbours are bad."""
    tried = trials_of(bowl(), 40, noise=0.01)
    bad = max(tried, key=lambda trial: trial.loss)
    lucky = Trial(bad.coefficients, (min(trial.loss for trial in tried) - 0.02,) * 2, (1, 1), 0.0)
    near = [c for c in trials_of(bowl(), 65) if c.loss > 0.5][:6]
    surrogate = Surrogate(SearchSpace(), [*tried, *near, lucky])
    assert lucky.coefficients not in surrogate.finalists(3)


def test_finalists_are_the_first_and_good_ones_that_differ():
    tried = trials_of(bowl(), 65)
    finalists = Surrogate(SearchSpace(), tried).finalists(4)
    assert finalists[0] == RIA
    assert len(finalists) == 4
    assert apart(SearchSpace(), finalists[1:]) >= 0.2
    assert max(bowl()(each) for each in finalists[1:]) < 0.25
    # All there are, where there are fewer, though they be near.
    few = [tried[0], Trial(WANDA, (1.0, 1.0), (1, 1), 0.0)]
    assert Surrogate(SearchSpace(), few).finalists(4) == [RIA, WANDA]


def test_fixed_axes_stay_fixed():
    space = SearchSpace(kernel_sizes=(5,), column=(2.0, 2.0))
    proposed = Surrogate(space, trials_of(bowl(space=space), settings=study(space=space))).propose(4, 0)
    assert [(each.kernel_size, each.column) for each in proposed] == [(5, pytest.approx(2.0))] * 4


def test_equal_losses_make_a_flat_surface():
    tried = [Trial(trial.coefficients, (1.0, 1.0), (1, 1), 0.0) for trial in trials_of(bowl(), 8)]
    assert Surrogate(SearchSpace(), tried).expected([RIA, WANDA]) == pytest.approx([1.0, 1.0])
