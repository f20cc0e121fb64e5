"""Channel permutation against brute force, naive loops and the definition of an N:M mask."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.functional.permutation import (
    allocate_channels,
    channel_index,
    permute_channels,
    refine_channels,
    retained_score,
    sample_rows,
    split_heads,
)

STRUCTURES = [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)]


def skewed_scores(rows, columns, seed=0):
    """Scores whose channels differ as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(columns, generator=generator).exp()
    return torch.randn(rows, columns, generator=generator).abs() * spread


def naive_retained(scores, n, m):
    total = 0.0
    for row in scores.tolist():
        for start in range(0, len(row), m):
            total += sum(sorted(row[start : start + m])[n:])
    return total


def groupings(channels, m):
    """Every way to cut channels into groups of m, order within and between groups left out."""
    if not channels:
        yield []
        return
    first, *rest = channels
    for partners in itertools.combinations(rest, m - 1):
        left = [channel for channel in rest if channel not in partners]
        for others in groupings(left, m):
            yield [first, *partners, *others]


def best_by_brute_force(scores, n, m):
    return max(naive_retained(scores[:, order], n, m) for order in groupings(list(range(scores.shape[1])), m))


@pytest.mark.parametrize(("n", "m"), STRUCTURES)
def test_retained_score_is_the_sum_of_the_largest_of_every_group(n, m):
    scores = skewed_scores(5, 3 * m)
    assert retained_score(scores, n, m) == pytest.approx(naive_retained(scores, n, m), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), STRUCTURES)
def test_allocation_gives_every_group_one_channel_of_each_segment(n, m):
    scores = skewed_scores(7, 6 * m)
    order = allocate_channels(scores, m)
    rank = scores.sum(0).argsort().argsort()
    groups = rank[order].view(6, m)
    assert torch.equal(groups // 6, torch.arange(m).expand(6, m))
    assert torch.equal(groups[:, 0] % 6, torch.arange(6)) and torch.equal(groups[:, 1] % 6, torch.arange(6).flip(0))


@pytest.mark.parametrize(("n", "m", "columns"), [(2, 4, 8), (1, 4, 8), (3, 4, 8), (1, 2, 8), (1, 3, 9)])
def test_small_matrices_come_close_to_the_best_of_all_permutations(n, m, columns):
    reached = []
    for seed in range(10):
        scores = skewed_scores(4, columns, seed)
        order = permute_channels(scores, n, m)
        before, after = naive_retained(scores, n, m), naive_retained(scores[:, order], n, m)
        best = best_by_brute_force(scores, n, m)
        assert before <= after + 1e-5 and after <= best + 1e-5
        reached.append((after - before) / max(best - before, 1e-9))
    assert sum(reached) / len(reached) > 0.7


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_one_slot_is_assigned_as_the_best_of_all_assignments(n, m):
    """One sweep of refinement, redone by trying every assignment of every slot."""
    scores = skewed_scores(6, 4 * m, seed=3)
    groups = torch.arange(4 * m).view(4, m)
    for slot in range(m):
        trials = []
        for assignment in itertools.permutations(range(4)):
            trial = groups.clone()
            trial[:, slot] = groups[list(assignment), slot]
            trials.append(trial)
        groups = max(trials, key=lambda trial: naive_retained(scores[:, trial.view(-1)], n, m))
    order = refine_channels(scores, torch.arange(4 * m), n, m, sweeps=1)
    reached = naive_retained(scores[:, order], n, m)
    assert reached == pytest.approx(naive_retained(scores[:, groups.view(-1)], n, m), rel=1e-6)
    assert reached > naive_retained(scores, n, m)


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from(STRUCTURES),
    st.integers(0, 10_000),
    st.sampled_from(["skewed", "equal", "zeros", "sparse"]),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_never_lowers_the_retained_score(rows, groups, structure, seed, kind, block_groups):
    n, m = structure
    scores = skewed_scores(rows, groups * m, seed)
    if kind == "equal":
        scores = torch.ones_like(scores)
    elif kind == "zeros":
        scores = torch.zeros_like(scores)
    elif kind == "sparse":
        scores = scores * (scores > scores.median())
    order = permute_channels(scores, n, m, block_groups=block_groups, seed=seed)
    assert torch.equal(order.sort().values, torch.arange(groups * m))
    assert retained_score(scores[:, order], n, m) >= retained_score(scores, n, m)
    assert torch.equal(order, permute_channels(scores, n, m, block_groups=block_groups, seed=seed))


def test_refinement_gains_on_allocation_and_blocks_cost_little():
    scores = skewed_scores(64, 256)
    plain, allocated = retained_score(scores, 2, 4), retained_score(scores[:, allocate_channels(scores, 4)], 2, 4)
    refined = retained_score(scores[:, permute_channels(scores, 2, 4)], 2, 4)
    in_blocks = retained_score(scores[:, permute_channels(scores, 2, 4, block_groups=16)], 2, 4)
    assert plain < allocated < in_blocks <= 1.001 * refined
    assert in_blocks - allocated > 0.5 * (refined - allocated)


def test_a_perfect_grouping_is_found():
    """Half of the channels matter and stand together: spread, 2:4 keeps all of them."""
    scores = torch.cat([torch.ones(8, 16), torch.zeros(8, 16)], dim=1)
    assert retained_score(scores, 2, 4) == 64
    assert retained_score(scores[:, permute_channels(scores, 2, 4)], 2, 4) == 128


def test_a_layer_of_one_group_cannot_gain():
    scores = skewed_scores(3, 4)
    assert retained_score(scores[:, permute_channels(scores, 2, 4)], 2, 4) == retained_score(scores, 2, 4)


def test_heads_are_split_and_joined_as_by_a_loop():
    heads, repeat, width, rows = 3, 2, 4, 5
    scores = skewed_scores(rows, heads * repeat * width)
    split = split_heads(scores, heads, repeat)
    assert split.shape == (heads, rows * repeat, width)
    orders = torch.stack([torch.randperm(width, generator=torch.Generator().manual_seed(s)) for s in range(heads)])
    index = channel_index(orders, repeat)
    for head in range(heads):
        stacked = []
        for copy in range(repeat):
            start = (head * repeat + copy) * width
            own = scores[:, start : start + width]
            stacked.append(own)
            assert torch.equal(scores[:, index][:, start : start + width], own[:, orders[head]])
        assert torch.equal(split[head].sort(0).values, torch.cat(stacked).sort(0).values)
    assert split_heads(scores[:0], heads, repeat).shape == (heads, 0, width)
    retained = sum(retained_score(split[head][:, orders[head]], 2, 4) for head in range(heads))
    assert retained == pytest.approx(retained_score(scores[:, index], 2, 4), rel=1e-6)


def test_rows_are_drawn_from_all_matrices_alike():
    sizes = [5, 0, 100, 1]
    drawn = sample_rows(sizes, 40, seed=1)
    assert sum(map(len, drawn)) == 40
    for rows, size in zip(drawn, sizes, strict=True):
        assert torch.equal(rows, rows.unique()) and bool(((rows >= 0) & (rows < size)).all())
    assert all(torch.equal(one, other) for one, other in zip(drawn, sample_rows(sizes, 40, seed=1), strict=True))
    assert [len(rows) for rows in sample_rows(sizes, 1000)] == sizes
    counts = torch.zeros(106)
    offsets = [0, 5, 5, 105]
    for seed in range(400):
        for offset, rows in zip(offsets, sample_rows(sizes, 40, seed), strict=True):
            counts[offset + rows] += 1
    assert bool(((counts / 400 - 40 / 106).abs() < 0.12).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: permute_channels(s, 2, 4), "10 channels cannot be cut into groups of 4"),
        (lambda s: retained_score(s, 2, 4), "10 input channels cannot be cut into groups of 4"),
        (lambda s: permute_channels(s, 2, 2), "0 < N < M"),
        (lambda s: permute_channels(s, 1, 2, sweeps=0), "sweeps=0 must be at least 1"),
        (lambda s: permute_channels(s, 1, 2, block_groups=0), "block_groups=0 must be at least 1"),
        (lambda s: permute_channels(s * float("nan"), 1, 2), "NaN"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(skewed_scores(3, 10))
