import numpy as np
import pytest

from crepe_llm.search.optimisers import OPTIMISERS
from crepe_llm.search.search import search
from crepe_llm.search.space import SearchSpace
from searches import bowl, study


@pytest.mark.parametrize(("optimiser", "candidates", "reached"), [("cma", 250, 1e-3), ("random", 250, 0.06)])
def test_optimisers_approach_a_known_minimum(optimiser, candidates, reached):
    result = search(bowl(), study(optimiser), candidates=candidates)
    assert result.loss(result.best) < reached < result.loss(result.reference)
    assert result.finished
    assert result.beats_reference


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_direction_is_respected(optimiser):
    loss = bowl()
    lower = search(loss, study(optimiser), candidates=60)
    higher = search(lambda c: -loss(c), study(optimiser, higher_is_better=True), candidates=60)
    assert [c.coefficients for c in lower.candidates] == [c.coefficients for c in higher.candidates]
    assert lower.best.coefficients == higher.best.coefficients


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_seeds_decide_and_global_generators_do_not(optimiser):
    def noisy(candidate):
        np.random.random(3)  # an objective may draw from numpy's generator as it likes
        return bowl()(candidate)

    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    first = search(bowl(), study(optimiser, seed=3), candidates=40)
    assert (np.random.get_state()[1] == state).all()
    np.random.seed(6)
    second = search(noisy, study(optimiser, seed=3), candidates=40)
    other = search(bowl(), study(optimiser, seed=4), candidates=40)
    assert [c.coefficients for c in first.candidates] == [c.coefficients for c in second.candidates]
    assert [c.coefficients for c in first.candidates] != [c.coefficients for c in other.candidates]


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("fixed", [{"kernel_sizes": [9]}, {"column": [1.0, 1.0]}, {"activation_exponent": [0.5, 0.5]}])
def test_equal_bounds_fix_a_dimension(optimiser, fixed):
    space = SearchSpace(**fixed)
    result = search(bowl(space=space), study(optimiser, space=space), candidates=30)
    for candidate in result.candidates[1:]:
        if "kernel_sizes" in fixed:
            assert candidate.coefficients.kernel_size == 9
        if "column" in fixed:
            assert candidate.coefficients.column == pytest.approx(1.0)
        if "activation_exponent" in fixed:
            assert candidate.coefficients.activation_exponent == 0.5


def test_cma_searches_a_single_dimension():
    space = SearchSpace(column=(1.0, 1.0), neighbourhood=(1.0, 1.0), kernel_sizes=(3,))
    result = search(lambda c: (c.activation_exponent - 0.9) ** 2, study(space=space), candidates=60)
    assert result.best.coefficients.activation_exponent == pytest.approx(0.9, abs=0.02)


def test_cma_starts_again_where_it_converged():
    result = search(bowl(), study(), candidates=1500)
    exponents = [c.coefficients.activation_exponent for c in result.candidates]
    last = [exponents[i : i + 8] for i in range(1, len(exponents) - 8, 8)]
    spread = [max(generation) - min(generation) for generation in last]
    tight = next(i for i, width in enumerate(spread) if width < 1e-3)
    assert max(spread[tight:]) > 0.05
