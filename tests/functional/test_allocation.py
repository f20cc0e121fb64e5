"""Allocation of sparsity to blocks, against the published formulas and what they promise."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.allocation import (
    alpha_pruning,
    atp,
    dlp,
    mixed_n_of_m,
    outlier_ratio,
    owl,
    plot_allocation,
    tail_exponent,
    typical_score,
    water_fill,
)

METHODS = {
    "owl": lambda values, weights, target: owl(values, target),
    "dlp": lambda values, weights, target: dlp(values, target),
    "alphapruning": alpha_pruning,
    "atp": lambda values, weights, target: atp(len(values), target),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
blocks = st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 10**6)), min_size=1, max_size=12)


@every_method
@settings(max_examples=60, deadline=None)
@given(blocks=blocks, target=st.floats(0.05, 0.95))
def test_the_weighted_target_is_met_within_the_bounds(method, blocks, target):
    values, weights = map(list, zip(*blocks, strict=True))
    low, high = target / 2, (1 + target) / 2
    found = water_fill(method(values, weights, target), weights, target, low=low, high=high)
    assert all(low <= sparsity <= high for sparsity in found)
    mean = sum(sparsity * count for sparsity, count in zip(found, weights, strict=True)) / sum(weights)
    assert mean == pytest.approx(target, abs=1e-9)


@pytest.mark.parametrize("name", ["owl", "dlp", "alphapruning"])
def test_equal_blocks_get_equal_sparsities(name):
    assert METHODS[name]([3.0] * 4, [1, 2, 3, 4], 0.6) == pytest.approx([0.6] * 4)


def test_water_filling_keeps_what_already_fits():
    assert water_fill([0.5, 0.6, 0.7], [2, 2, 2], 0.6) == pytest.approx([0.5, 0.6, 0.7])


def test_water_filling_by_hand():
    """0.9 is cut to 0.8; the other two rise by 0.05 each to make up for it."""
    assert water_fill([0.3, 0.6, 0.9], [1, 1, 1], 0.6, high=0.8) == pytest.approx([0.35, 0.65, 0.8])
    assert water_fill([0.2, 0.8], [3, 1], 0.5) == pytest.approx([0.35, 0.95])


def test_owl_spans_twice_lambda_and_keeps_outliers():
    found = owl([1.0, 4.0, 2.0], 0.7, spread=0.08)
    assert max(found) - min(found) == pytest.approx(0.16)
    assert found.index(min(found)) == 1
    # density: (LOD - min) / (max - min) * 2 lambda, less its mean, plus 1 - S
    densities = [0.0, 0.16, 0.16 / 3]
    shift = 0.3 - sum(densities) / 3
    assert found == pytest.approx([1 - density - shift for density in densities])


def test_outlier_ratio_counts():
    assert outlier_ratio(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 13]]), threshold=5) == pytest.approx(12.5)
    assert outlier_ratio(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 13]]), threshold=6) == 0
    assert outlier_ratio(torch.zeros(4, 4)) == 0


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 10.0, 7.0], [3.0, 1.0, 2.0, 10.0]])
def test_typical_scores_by_sorting(values):
    assert typical_score(torch.tensor(values)) == sorted(values)[(len(values) - 1) // 2]
    assert typical_score(torch.tensor(values), "mean") == pytest.approx(sum(values) / len(values))


def test_the_mean_of_many_scores_does_not_drift():
    assert typical_score(torch.full((1 << 24,), 0.1), "mean") == pytest.approx(0.1, rel=1e-7)


def test_dlp_by_the_papers_formula():
    scores, target, alpha = [1.0, 2.0, 5.0], 0.7, 0.15
    importance = [1 - score / sum(scores) for score in scores]
    low, high = min(importance), max(importance)
    densities = [(value - low) / (high - low) * 2 * alpha for value in importance]
    shift = (1 - target) - sum(densities) / 3
    assert dlp(scores, target, alpha) == pytest.approx([1 - density - shift for density in densities])


def test_alpha_pruning_by_the_papers_formula():
    exponents, weights, target, epsilon = [2.0, 3.0, 6.0], [10, 20, 30], 0.6, 0.3
    ratios = [(value - 2) / 4 * 0.6 + 0.7 for value in exponents]
    factor = target * sum(weights) / sum(w * r for w, r in zip(weights, ratios, strict=True))
    assert alpha_pruning(exponents, weights, target, epsilon) == pytest.approx([r * factor for r in ratios])


def test_atp_is_the_papers_line():
    assert atp(5, 0.7, 0.05) == pytest.approx([0.7 - 0.05 * 4 / 2 + 0.05 * block for block in range(5)])
    assert atp(1, 0.7) == [0.7]
    assert atp(1, 0.7, spread=0.1) == [0.7]
    assert atp(3, 0.7) == pytest.approx([0.55, 0.7, 0.85])
    for blocks in (2, 5, 30):
        found = atp(blocks, 0.7, spread=0.1)
        assert found == pytest.approx(atp(blocks, 0.7, 0.2 / (blocks - 1))) and found[-1] == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"slope of 0\.5 takes 3 blocks.*use at most 0\.3"):
        atp(3, 0.7, 0.5)
    with pytest.raises(ValueError, match=r"spread=0\.25 takes blocks of mean sparsity 0\.8.*use at most 0\.2$"):
        atp(3, 0.8, spread=0.25)
    with pytest.raises(ValueError, match=r"slope=0\.1 and spread=0\.1 say the same"):
        atp(3, 0.8, 0.1, spread=0.1)


@pytest.mark.parametrize("tail", ["peak", "middle"])
@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_the_exponent_of_a_pareto_spectrum_is_recovered(exponent, tail):
    """A rotated diagonal matrix whose squared singular values are the quantiles of x^-exponent from 1."""
    count = 400
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    eigenvalues = (1 - quantiles) ** (1 / (1 - exponent))
    rotation = torch.linalg.qr(torch.randn(count, count, generator=torch.Generator().manual_seed(0)).double()).Q
    weight = (rotation * eigenvalues.sqrt()).float()
    assert tail_exponent(weight, tail) == pytest.approx(exponent, rel=0.05)
    assert tail_exponent(3 * weight.T, tail) == pytest.approx(exponent, rel=0.05)


def test_spectra_without_a_tail():
    for weight in (torch.zeros(4, 6), torch.eye(5)):
        for tail in ("peak", "middle"):
            assert tail_exponent(weight, tail) == math.inf
    with pytest.raises(ValueError, match="no finite measure"):
        alpha_pruning([math.inf, 2.0], [1, 1], 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sparsities": [math.nan], "parameters": [1], "target": 0.5}, "must be finite"),
        ({"sparsities": [0.5], "parameters": [1], "target": 0.5, "high": 0.4}, "target=0.5 and high=0.4 must ascend"),
        ({"sparsities": [0.5], "parameters": [1], "target": 0.5, "low": 0.6}, "low=0.6"),
    ],
)
def test_water_filling_refuses_what_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        water_fill(**fields)


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 60)), min_size=1, max_size=7),
    group=st.integers(3, 16),
)
def test_n_of_m_is_the_best_of_all_roundings(blocks, group):
    # From 1 of M to M - 1 of M.
    exact = [round(1 + position / 1000 * (group - 2), 6) for position, _ in blocks]
    sparsities, weights = [x / group for x in exact], [weight for _, weight in blocks]

    def badness(rounded):
        off = abs(sum(w * (n - x) for w, n, x in zip(weights, rounded, exact, strict=True)))
        return off, sum(w * (n - x) ** 2 for w, n, x in zip(weights, rounded, exact, strict=True))

    choices = [{math.floor(x), math.ceil(x)} for x in exact]
    best = min((badness(rounded) for rounded in itertools.product(*choices)), key=lambda b: (round(b[0], 4), b[1]))
    found = mixed_n_of_m(sparsities, weights, group)
    assert all(1 <= n < group for n in found)
    assert badness(found) == pytest.approx(best, abs=1e-3)


def test_equal_blocks_miss_the_target_by_half_a_step_at_most():
    sparsities = water_fill([0.62 + 0.01 * block for block in range(30)], [5] * 30, 0.7)
    found = mixed_n_of_m(sparsities, [5] * 30, 8)
    assert abs(sum(found) / 30 / 8 - 0.7) <= 0.5 / 30 / 8 + 1e-9
    assert found == sorted(found)
    assert mixed_n_of_m([0.5] * 30, [7] * 30, 8) == [4] * 30


def test_many_blocks_of_a_few_sizes_are_quick():
    sizes = [1 << 20, 3 << 18, 5 << 17] * 40
    found = mixed_n_of_m([0.3 + 0.003 * block for block in range(120)], sizes, 16)
    mean = sum(n * size for n, size in zip(found, sizes, strict=True)) / sum(sizes) / 16
    wanted = sum((0.3 + 0.003 * block) * size for block, size in enumerate(sizes)) / sum(sizes)
    assert mean == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("sparsity", [0.1, 0.9, 1.0])
def test_what_no_n_of_m_can_be_is_refused(sparsity):
    with pytest.raises(ValueError, match=f"sparsity of {sparsity} is not from 1 of 8 to 7 of 8"):
        mixed_n_of_m([0.5, sparsity], [1, 1], 8)


def test_the_plot_is_drawn(tmp_path):
    plot_allocation([0.6, 0.7, 0.8], 0.7, tmp_path / "plot.png", "owl")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
