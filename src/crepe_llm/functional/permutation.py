"""Channel permutation: input channels regrouped so that an N:M mask retains more score, absorbed by other layers.

An order is an int64 vector: position p of the permuted layer holds channel ``order[p]`` of the original one, so that
``scores[:, order]`` are the permuted scores. "N:M" means N pruned of every M consecutive channels.

A site is a set of channels that layers share. Its `heads` are parts of equal width between which channels cannot move;
a reader may hold each of them `repeat` times in succession, as o_proj does under grouped-query attention. A site
without heads has one. Its orders are int64 [heads, width].
"""

import torch

from crepe_llm.functional.masks import keep_n_of_m

__all__ = [
    "allocate_channels",
    "channel_index",
    "permute_channels",
    "refine_channels",
    "retained_score",
    "sample_rows",
    "split_heads",
]

# A sweep over all slots that gains less than this fraction of the retained score is the last.
_SMALLEST_GAIN = 1e-4


def retained_score(scores: torch.Tensor, n: int, m: int) -> float:
    """The sum of the scores that an N:M mask keeps: of every `m` consecutive channels of a row, the m - n largest.

    Args:
        scores: [d_out, d_in], non-negative.
        n: how many of every group are pruned.
        m: group size; must divide d_in.

    Returns:
        The sum, accumulated in fp64.

    Raises:
        ValueError: if d_in is not divisible by m, not 0 < n < m, or a score is NaN.
    """
    return scores.masked_fill(~keep_n_of_m(scores, n, m), 0).sum(dtype=torch.float64).item()


def allocate_channels(scores: torch.Tensor, m: int) -> torch.Tensor:
    """Spread the channels over the groups by importance, so that strong ones do not compete with each other.

    The channels in ascending order of their summed scores are cut into m segments of equal length; every group takes
    one channel of each, every second segment backwards.

    Args:
        scores: [d_out, d_in], non-negative.
        m: group size; must divide d_in.

    Returns:
        The order, int64 [d_in].

    Raises:
        ValueError: if d_in is not divisible by m.

    Source: heuristic channel allocation of RIA, ICLR 2024 (OpenReview Tr0lPx9woF), section 4.
    """
    _check_width(scores.shape[1], m)
    segments = scores.sum(dim=0, dtype=torch.float64).argsort(stable=True).view(m, -1)
    segments[1::2] = segments[1::2].flip(1)
    return segments.T.reshape(-1)


def refine_channels(
    scores: torch.Tensor,
    order: torch.Tensor,
    n: int,
    m: int,
    *,
    sweeps: int = 4,
    block_groups: int = 512,
    seed: int = 0,
) -> torch.Tensor:
    """Raise the retained score of an order by linear sum assignments, slot by slot.

    For one slot of the groups, the other m - 1 channels of every group stay, and the channels in that slot are
    assigned to the groups anew such that most score is retained. With t the (m - n)-th largest score of the others, a
    channel with score x adds max(x, t) = (x + t + \\|x - t\\|) / 2 to its row, so the assignment is the one of the
    largest total L1 distance between channels and thresholds. A sweep does this for every slot.

    Args:
        scores: [d_out, d_in], non-negative.
        order: int64 [d_in], where to start.
        n: how many of every group are pruned.
        m: group size; must divide d_in.
        sweeps: at most so many; it ends earlier when one gains next to nothing.
        block_groups: wider layers are cut at random into blocks of at most so many groups, anew for every slot, between
            which no channel moves, because an assignment of G groups costs O(G^3) and its distances O(G^2 d_out).
        seed: of the cut.

    Returns:
        An order that retains at least as much score as the given one, int64 [d_in]; the same for the same arguments.

    Raises:
        ValueError: if d_in is not divisible by m, not 0 < n < m, or sweeps or block_groups is not positive.

    Source: RIA, ICLR 2024 (OpenReview Tr0lPx9woF), section 4, which makes one sweep in fixed blocks; the L1 distance
    in place of the retained score of every exchange, the sweeps and the random blocks are ours.
    """
    _check_width(scores.shape[1], m)
    for name, value in (("sweeps", sweeps), ("block_groups", block_groups)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    channels = scores.T.contiguous()
    generator = torch.Generator().manual_seed(seed)
    best = order.to(scores.device)
    most = retained_score(scores[:, best], n, m)
    groups = best.view(-1, m).clone()
    for _ in range(sweeps):
        for slot in range(m):
            shuffled = torch.randperm(len(groups), generator=generator).to(scores.device)
            for block in shuffled.tensor_split(-(-len(groups) // block_groups)):
                groups[block, slot] = _assigned(channels, groups[block], slot, n)
        retained = retained_score(scores[:, groups.view(-1)], n, m)
        gain = retained - most
        if gain > 0:
            best, most = groups.view(-1).clone(), retained
        if gain <= _SMALLEST_GAIN * most:
            break
    return best


def _assigned(channels: torch.Tensor, members: torch.Tensor, slot: int, n: int) -> torch.Tensor:
    """Which channel each of some groups, [groups, m], gets in a slot, [groups]; scores by channel, [d_in, d_out]."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('channel permutation needs scipy: pip install ".[compress]" in the checkout') from error
    others = members[:, torch.arange(members.shape[1], device=members.device) != slot]
    thresholds = channels[others].sort(dim=1).values[:, n - 1]
    distance = torch.cdist(thresholds, channels[members[:, slot]], p=1)
    _, assigned = linear_sum_assignment(distance.cpu().numpy(), maximize=True)
    return members[torch.from_numpy(assigned).to(members.device), slot]


def permute_channels(
    scores: torch.Tensor, n: int, m: int, *, sweeps: int = 4, block_groups: int = 512, seed: int = 0
) -> torch.Tensor:
    """Order the channels so that an N:M mask retains more score: allocation by importance, then refinement.

    Refinement starts from the allocation, or from the order as it is where that retains more.

    Args:
        scores: [d_out, d_in], non-negative.
        n, m, sweeps, block_groups, seed: see :func:`refine_channels`.

    Returns:
        An order that retains at least as much score as the channels as they are, int64 [d_in].

    Raises:
        ValueError: as :func:`refine_channels`.
    """
    starts = [torch.arange(scores.shape[1], device=scores.device), allocate_channels(scores, m)]
    start = max(starts, key=lambda order: retained_score(scores[:, order], n, m))
    return refine_channels(scores, start, n, m, sweeps=sweeps, block_groups=block_groups, seed=seed)


def split_heads(scores: torch.Tensor, heads: int, repeat: int = 1) -> torch.Tensor:
    """The scores of a site's reader by head: [heads, d_out * repeat, width] of [d_out, heads * repeat * width].

    The copies of a head are stacked as rows, because one order serves them all.
    """
    rows, columns = scores.shape
    width = columns // (heads * repeat)
    return scores.view(rows, heads, repeat, width).permute(1, 0, 2, 3).reshape(heads, rows * repeat, width)


def channel_index(orders: torch.Tensor, repeat: int = 1) -> torch.Tensor:
    """A site's orders as one over all channels of a layer that holds every head `repeat` times.

    Args:
        orders: int64 [heads, width].
        repeat: copies of every head, one after the other.

    Returns:
        int64 [heads * repeat * width].
    """
    copies = orders.repeat_interleave(repeat, dim=0)
    return (copies + torch.arange(len(copies), device=orders.device)[:, None] * orders.shape[1]).flatten()


def sample_rows(sizes: list[int], count: int, seed: int = 0) -> list[torch.Tensor]:
    """Draw rows of matrices that are stacked, every row with the same chance, none twice.

    Args:
        sizes: rows of each matrix.
        count: rows to draw of all of them together; all rows where there are no more.
        seed: of the draw.

    Returns:
        For each matrix its drawn rows, ascending, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(sum(sizes), generator=generator)[:count].sort().values
    ends = torch.tensor(sizes).cumsum(0)
    parts = drawn.tensor_split(torch.searchsorted(drawn, ends[:-1]))
    return [part - (end - size) for part, end, size in zip(parts, ends.tolist(), sizes, strict=True)]


def _check_width(channels: int, m: int) -> None:
    if channels % m:
        raise ValueError(f"{channels} channels cannot be cut into groups of {m}")
