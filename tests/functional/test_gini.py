import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.gini import gini_index

values_lists = st.lists(st.floats(min_value=0, max_value=1e6, width=32), min_size=2, max_size=40)
positive_lists = st.lists(st.floats(min_value=2**-10, max_value=2**10, width=32), min_size=2, max_size=40)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def mean_absolute_difference(values):
    """GI as half the relative mean absolute difference, by all pairs."""
    total = sum(values)
    pairs = sum(abs(a - b) for a in values for b in values)
    return pairs / (2 * len(values) * total) if total else 0.0


@given(values_lists)
def test_equals_half_the_relative_mean_absolute_difference(values):
    assert gini_index(tensor(values)) == pytest.approx(mean_absolute_difference(values), abs=1e-9)


@given(values_lists)
def test_equals_the_definition_of_hurley_and_rickard(values):
    n, total = len(values), sum(values)
    defined = 1 - 2 * sum(c / total * (n - k + 0.5) / n for k, c in enumerate(sorted(values), 1)) if total else 0.0
    assert gini_index(tensor(values)) == pytest.approx(defined, abs=1e-9)


@given(positive_lists, st.floats(2**-20, 2**20))
def test_scale_invariance(values, scale):
    assert gini_index(tensor(values) * scale) == pytest.approx(gini_index(tensor(values)), abs=1e-12)


@given(positive_lists, st.integers(2, 5))
def test_cloning_invariance(values, copies):
    assert gini_index(tensor(values * copies)) == pytest.approx(gini_index(tensor(values)), abs=1e-12)


@given(positive_lists, st.floats(0.05, 0.95))
def test_robin_hood_lowers(values, share):
    poorest, richest = values.index(min(values)), values.index(max(values))
    gap = values[richest] - values[poorest]
    if gap < 1e-3:
        return
    after = list(values)
    after[richest] -= share * gap / 2
    after[poorest] += share * gap / 2
    assert gini_index(tensor(after)) < gini_index(tensor(values))


@given(positive_lists, st.floats(0.01, 100))
def test_rising_tide_lowers(values, raised):
    before = gini_index(tensor(values))
    after = gini_index(tensor(values) + raised)
    assert after < before if before > 1e-6 else after <= before + 1e-12


@given(positive_lists, st.integers(1, 5))
def test_babies_raise(values, zeros):
    assert gini_index(tensor(values + [0.0] * zeros)) > gini_index(tensor(values))


@given(positive_lists, st.integers(0, 39))
def test_bill_gates_raises(values, position):
    rich = list(values)
    # Hurley and Rickard: from some wealth on, more of it raises the index; being the richest by far is enough.
    rich[position % len(rich)] = 10 * sum(values)
    richer = list(rich)
    richer[position % len(rich)] *= 2
    assert gini_index(tensor(richer)) > gini_index(tensor(rich))


@given(positive_lists, st.integers(0, 30))
def test_masking_identity(kept, zeros):
    s = zeros / (len(kept) + zeros)
    masked = gini_index(tensor(kept + [0.0] * zeros))
    assert masked == pytest.approx(s + (1 - s) * gini_index(tensor(kept)), abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_extremes(n):
    single = torch.zeros(n)
    single[n // 2] = 3.0
    assert gini_index(single) == pytest.approx(1 - 1 / n, abs=1e-12)
    assert gini_index(torch.full((n,), 0.7)) == pytest.approx(0, abs=1e-12)
    assert gini_index(torch.zeros(n)) == 0


def test_closed_forms_of_distributions():
    # Quantiles at cell centres approximate the distribution; its index is known in closed form.
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert gini_index(p) == pytest.approx(1 / 3, abs=1e-6)  # uniform on [0, 1]
    assert gini_index(-torch.log1p(-p)) == pytest.approx(1 / 2, abs=1e-4)  # exponential
    alpha = 3.0
    assert gini_index((1 - p) ** (-1 / alpha)) == pytest.approx(1 / (2 * alpha - 1), abs=1e-3)  # Pareto
    sigma = 0.5
    lognormal = torch.exp(sigma * torch.special.ndtri(p))
    assert gini_index(lognormal) == pytest.approx(math.erf(sigma / 2), abs=1e-4)


def test_first_integers():
    assert gini_index(torch.arange(1, 101)) == pytest.approx((100 - 1) / (3 * 100), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_dtype_and_shape_do_not_matter(dtype):
    values = torch.randint(0, 100, (8, 9, 10), generator=torch.Generator().manual_seed(0))
    assert gini_index(values.to(dtype)) == pytest.approx(gini_index(values.double().flatten()), abs=1e-12)


def test_fp32_values_are_summed_in_fp64():
    values = torch.rand(1 << 21, generator=torch.Generator().manual_seed(1))
    assert gini_index(values) == pytest.approx(gini_index(values.double()), abs=1e-12)


@pytest.mark.parametrize("magnitude", [1e-38, 1e38])
def test_very_small_and_very_large_values(magnitude):
    values = torch.rand(1000, generator=torch.Generator().manual_seed(2))
    assert gini_index(values * magnitude) == pytest.approx(gini_index(values), abs=1e-5)


def test_sampling_is_seeded_and_close():
    values = torch.randn(1_000_000, generator=torch.Generator().manual_seed(3)).abs()
    exact = gini_index(values)
    assert exact == pytest.approx(math.sqrt(2) - 1, abs=1e-3)  # half-normal
    sampled = [gini_index(values, samples=100_000, seed=seed) for seed in (0, 0, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert all(abs(value - exact) < 5e-3 for value in sampled)
    assert gini_index(values, samples=1_000_000) == exact


def test_input_is_left_alone():
    values = torch.tensor([3.0, 1.0, 2.0])
    gini_index(values)
    assert values.tolist() == [3.0, 1.0, 2.0]


@settings(deadline=None)
@given(st.sampled_from([[-1.0, 2.0], [math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0]]))
def test_refuses_what_has_no_index(values):
    with pytest.raises(ValueError, match="finite and at least 0"):
        gini_index(tensor(values))


def test_refuses_empty_values_and_bad_samples():
    with pytest.raises(ValueError, match="empty"):
        gini_index(torch.empty(0))
    with pytest.raises(ValueError, match="samples=0"):
        gini_index(torch.ones(3), samples=0)
