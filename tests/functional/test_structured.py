"""CFSP's mathematics against naive loops, identities and the released code's form."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.structured import (
    SLOPE,
    BlockImportance,
    angular_distance,
    channel_importance,
    keep_ratios,
    kept_channels,
    kept_widths,
    recovery_ranks,
)

importances = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Coarse importance


def test_angular_distance_is_the_angle_token_by_token():
    inputs, outputs = random(3, 5, 8), random(3, 5, 8, seed=1)
    measured = angular_distance(inputs, outputs)
    for batch in range(3):
        for token in range(5):
            a, b = inputs[batch, token].tolist(), outputs[batch, token].tolist()
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            assert measured[batch, token].item() == pytest.approx(math.acos(cosine) / math.pi, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_parallel_states_have_no_distance_and_opposite_ones_the_largest(dtype):
    # Many vectors, of which unclamped cosines would exceed 1 and give NaN.
    states = random(500, 64).to(dtype)
    assert angular_distance(states, states).max() < 1e-3
    assert angular_distance(states, -states).min() > 1 - 1e-3
    assert torch.isfinite(angular_distance(states, 3 * states)).all()


def test_a_state_of_zeros_has_the_releases_cosine_and_nan_stays_nan():
    zero, other = torch.zeros(1, 4), torch.ones(1, 4)
    for pair in ((zero, other), (other, zero), (zero, zero)):
        assert angular_distance(*pair).item() == pytest.approx(math.acos(0.5) / math.pi)
    assert angular_distance(other * torch.nan, other).isnan().all()


def test_block_importance_is_the_mean_over_real_tokens():
    inputs, outputs = random(4, 6, 8), random(4, 6, 8, seed=1)
    mask = torch.ones(4, 6)
    mask[1:3, 2:] = 0
    importance = BlockImportance()
    importance.update(inputs[:2], outputs[:2], mask[:2])
    importance.update(inputs[2:3], outputs[2:3], mask[2:3].flatten())
    importance.update(inputs[3:], outputs[3:])
    expected = angular_distance(inputs, outputs)[mask.bool()]
    assert importance.tokens == mask.sum()
    assert importance.mean == pytest.approx(expected.mean().item(), abs=1e-12)
    with pytest.raises(ValueError, match="no calibration token"):
        _ = BlockImportance().mean


# Keep ratios


def released_keep_ratios(sums, sparsity, a=1.0):
    """The released code's ratios, from sums over 128 x 1024 tokens."""
    mean = sum(sums) / len(sums)
    u = [1 / (1 + math.exp(-a * (value - mean) / 1e4)) for value in sums]
    centre = sum(u) / len(u)
    if max(u) / centre * (1 - sparsity) >= 1:
        factor = centre * (1 / (1 - sparsity) - 1) / (max(u) - centre) / 1.05
        u = [centre + (value - centre) * factor for value in u]
    return [value / centre * (1 - sparsity) for value in u]


@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.5, 0.9])
def test_keep_ratios_are_the_released_ones(sparsity):
    importance = [0.31, 0.12, 0.05, 0.055, 0.08, 0.29]
    expected = released_keep_ratios([value * 128 * 1024 for value in importance], sparsity)
    assert keep_ratios(importance, sparsity) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None)
@given(importances, st.floats(0, 0.9), st.floats(0, 100), st.floats(0.01, 0.1), st.randoms())
def test_keep_ratios_average_to_the_target_within_their_bounds(importance, sparsity, slope, low, order):
    widths = [order.choice([96, 128, 1000]) for _ in importance]
    ratios = keep_ratios(importance, sparsity, widths=widths, slope=slope, low=low)
    mean = sum(ratio * width for ratio, width in zip(ratios, widths, strict=True)) / sum(widths)
    assert mean == pytest.approx(1 - sparsity, abs=1e-9)
    assert all(low - 1e-9 <= ratio <= 1 + 1e-9 for ratio in ratios)
    ranked = sorted(zip(importance, ratios, strict=True))
    assert all(a[1] <= b[1] + 1e-9 for a, b in pairwise(ranked))


def test_equal_blocks_and_no_slope_give_equal_ratios():
    assert keep_ratios([0.2] * 4, 0.3) == pytest.approx([0.7] * 4)
    assert keep_ratios([0.1, 0.5], 0.3, slope=0) == pytest.approx([0.7, 0.7])
    assert keep_ratios([0.1, 0.5], 0.0) == pytest.approx([1.0, 1.0])


def test_keep_ratios_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match="no finite importance"):
        keep_ratios([0.1, math.nan], 0.2)
    for sparsity in (-0.1, 0.995, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"must be from 0 to 0\.99"):
            keep_ratios([0.1, 0.2], sparsity)


# Widths


@settings(deadline=None)
@given(st.lists(st.floats(0.3, 1), min_size=1, max_size=12), st.sampled_from([1, 7, 8, 128]), st.randoms())
def test_widths_are_multiples_near_their_share_and_right_in_total(ratios, multiple, order):
    widths = [multiple * order.randint(4, 20) for _ in ratios]
    kept = kept_widths(ratios, widths, multiple)
    shares = [ratio * width for ratio, width in zip(ratios, widths, strict=True)]
    for count, share, width in zip(kept, shares, widths, strict=True):
        assert count % multiple == 0 and 0 < count <= width
        assert abs(count - share) < multiple + 1e-3
    assert abs(sum(kept) - sum(shares)) <= multiple / 2 + 1e-3


def test_those_that_lose_most_by_rounding_down_are_rounded_up():
    # 1.9 + 2.5 + 3.2 = 7.6 multiples, so that 8 are given out: 6 whole ones, then to the remainders 0.9 and 0.5.
    assert kept_widths([0.19, 0.25, 0.32], [80, 80, 80], 8) == [16, 24, 24]
    assert kept_widths([0.7], [10], 1) == [7]
    # 212 channels hold one multiple of 128 and no more.
    assert kept_widths([1.0, 1.0], [212, 212], 128) == [128, 128]


def test_widths_refuse_to_empty_a_block_or_to_round_to_more_than_there_is():
    with pytest.raises(ValueError, match=r"block 1 would keep 10.0% of its 256 .* lower sparsity"):
        kept_widths([1.0, 0.1], [256, 256], 128)
    with pytest.raises(ValueError, match="round_to=128 is larger than the FFN of block 0, which has 48"):
        kept_widths([0.8], [48], 128)
    with pytest.raises(ValueError, match="round_to=0 must be a positive"):
        kept_widths([0.8], [48], 0)


# Fine importance


def naive_relative(norm, output, inputs):
    hidden, width = output.shape
    scores = []
    for j in range(width):
        score = 0.0
        for h in range(hidden):
            whole = sum(abs(output[h, k].item()) * norm[k].item() for k in range(width))
            score += abs(output[h, j].item()) * norm[j].item() / whole if whole else 0.0
            for matrix in inputs:
                whole = sum(abs(matrix[k, h].item()) for k in range(width))
                score += abs(matrix[j, h].item()) / whole if whole else 0.0
        scores.append(score)
    return scores


def released_activation(norm, output, inputs):
    """The released code's `three_w_one_wa`, with b = c = 1: every matrix is divided by its column sums."""
    output = output.abs() * norm
    total = output / output.sum(dim=0) + sum(m.abs().T / m.abs().T.sum(dim=0) for m in inputs)
    return (total * norm).mean(dim=0)


@pytest.mark.parametrize("gated", [True, False])
def test_relative_importance_is_the_sum_of_shares(gated):
    norm, output = random(7).abs(), random(5, 7, seed=1)
    inputs = [random(7, 5, seed=seed) for seed in ((2, 3) if gated else (2,))]
    output[2] = 0
    inputs[0][:, 1] = 0
    measured = channel_importance("relative", norm, output, inputs)
    assert measured.tolist() == pytest.approx(naive_relative(norm, output, inputs), abs=1e-12)


def test_wanda_importance_is_the_mean_of_its_scores_down_a_column():
    norm, output = random(7).abs(), random(5, 7, seed=1)
    measured = channel_importance("wanda", norm, output, [random(7, 5)])
    for j in range(7):
        assert measured[j].item() == pytest.approx(sum(abs(w) for w in output[:, j].tolist()) * norm[j].item() / 5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_activation_importance_ranks_as_the_released_score_which_is_the_norm(seed):
    norm, output = random(24, seed=seed).abs() + 1e-3, random(6, 24, seed=seed + 1)
    inputs = [random(24, 6, seed=seed + 2), random(24, 6, seed=seed + 3)]
    ours = channel_importance("activation", norm, output, inputs)
    released = released_activation(norm, output, inputs)
    assert torch.equal(ours, norm)
    assert torch.allclose(released, norm * 3 / 6, rtol=1e-12)
    for count in (1, 8, 23):
        assert set(kept_channels(released, count).tolist()) == set(kept_channels(ours, count).tolist())


@pytest.mark.parametrize("mode", ["activation", "relative", "wanda"])
def test_half_precision_is_scored_in_fp32_and_silent_channels_come_last(mode):
    norm, output = random(16).abs().float(), random(8, 16, seed=1).bfloat16()
    inputs = [random(16, 8, seed=2).bfloat16()]
    norm[3] = 0
    output[:, 3] = 0
    inputs[0][3] = 0
    scores = channel_importance(mode, norm, output, inputs)
    assert scores.dtype == torch.float32 and scores.argmin() == 3 and scores[3] == 0
    assert torch.equal(scores, channel_importance(mode, norm, output.float(), [inputs[0].float()]))


def test_channel_importance_refuses_other_modes_and_shapes():
    norm, output, inputs = torch.ones(4), torch.ones(3, 4), [torch.ones(4, 3)]
    with pytest.raises(ValueError, match="importance=magnitude must be one of activation, relative, wanda"):
        channel_importance("magnitude", norm, output, inputs)
    for broken in ((norm[:3], output, inputs), (norm, output.T, inputs), (norm, output, [output])):
        with pytest.raises(ValueError, match="do not fit"):
            channel_importance("wanda", *broken)


def test_kept_channels_are_the_highest_in_order_and_ties_never_keep_more():
    assert kept_channels(torch.tensor([3.0, 9.0, 1.0, 7.0]), 2).tolist() == [1, 3]
    assert kept_channels(torch.ones(300), 128).tolist() == list(range(128))


# Recovery ranks


@settings(deadline=None)
@given(importances, st.integers(1, 32), st.sampled_from(["important", "unimportant", "uniform"]))
def test_ranks_average_to_the_target_and_follow_the_importance(importance, mean_rank, allocation):
    ranks = recovery_ranks(importance, mean_rank, allocation)
    raised = sum(rank == 1 for rank in ranks)
    assert mean_rank * len(ranks) <= sum(ranks) <= mean_rank * len(ranks) + raised
    assert min(ranks) >= 1
    ordered = [rank for _, rank in sorted(zip(importance, ranks, strict=True))]
    if allocation == "uniform":
        assert set(ranks) == {mean_rank}
    else:
        steps = pairwise(ordered)
        assert all((b - a if allocation == "important" else a - b) >= -1 for a, b in steps)


def test_ranks_share_out_by_the_sigmoid():
    importance = [0.1, 0.2, 0.4]
    weights = [1 / (1 + math.exp(-SLOPE * (value - 0.7 / 3))) for value in importance]
    exact = [24 * weight / sum(weights) for weight in weights]
    ranks = recovery_ranks(importance, 8, "important")
    assert sum(ranks) == 24 and all(abs(rank - share) < 1 for rank, share in zip(ranks, exact, strict=True))
    assert recovery_ranks(importance, 8, "unimportant")[0] > 8


def test_ranks_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match="mean rank of 0"):
        recovery_ranks([0.1], 0, "important")
    with pytest.raises(ValueError, match="allocation least must be one of"):
        recovery_ranks([0.1], 8, "least")
