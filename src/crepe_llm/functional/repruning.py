"""Re-pruning: another mask of the same sparsity, whose expected outputs come closer to the dense layer's.

Pure functions of tensors, like :mod:`crepe_llm.functional.masks`, which makes the masks that these start from.
"""

from typing import NamedTuple

import torch

__all__ = ["Repruned", "dsnot"]

_TINY = torch.finfo(torch.float32).tiny
# Variances below this fraction of their mean count as so large: a channel that hardly varies comes first, but finitely.
_SMALLEST_VARIANCE = 1e-6


class Repruned(NamedTuple):
    """What :func:`dsnot` finds, by row of the weight.

    Attributes:
        keep: bool [d_out, d_in], the new mask.
        swaps: int64 [d_out], how many weights were pruned, and as many grown back.
        before: fp64 [d_out], the expected error of each output, dense minus pruned, in the units of the outputs.
        after: fp64 [d_out], the same with the new mask, nowhere larger in magnitude.
    """

    keep: torch.Tensor
    swaps: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def dsnot(
    weight: torch.Tensor,
    dense: torch.Tensor,
    keep: torch.Tensor,
    scores: torch.Tensor,
    input_mean: torch.Tensor,
    input_variance: torch.Tensor,
    *,
    group: int | None = None,
    max_cycles: int = 50,
    threshold: float = 0.01,
    variance_exponent: float = 1.0,
) -> Repruned:
    """Grow pruned weights back and prune kept ones in their place, so that each expected output nears the dense one.

    With m and v the mean and variance of the input channels, the expected error of row i is e_i = sum_j (W_ij - W'_ij)
    m_j, W the dense and W' the pruned weight. In each cycle every row whose \\|e_i\\| is above its threshold makes one
    swap:

    - it grows, of the pruned weights whose contribution W_ij m_j has the sign of e_i, the one with the largest
      \\|W_ij m_j\\| / v_j^p;
    - unstructured, it prunes the kept weight of the lowest score among those whose contribution has the other sign;
      under N:M, the kept weight of the lowest score in the group of the one that grows, unless that takes e_i further
      away, when nothing is swapped and the next pruned weight is looked at.

    No weight takes part in two swaps. A row is done when it has no such weights left. As steps overshoot, it ends with
    the mask, of all it went through, at which \\|e_i\\| was smallest; that may be the first, and then the row is as it
    was. Rows keep their number of weights, groups theirs.

    Args:
        weight: [d_out, d_in], the pruned weight, zero where not `keep`; the kept values may differ from the dense ones.
        dense: [d_out, d_in], what grows back.
        keep: bool [d_out, d_in], the mask to start from.
        scores: [d_out, d_in], larger is more important: the order in which kept weights are pruned. Wanda's as
            published.
        input_mean: [d_in], signed mean of each input channel over the calibration tokens.
        input_variance: [d_in], non-negative variance of the same; may have zeros.
        group: M, for N:M masks, or None for unstructured ones.
        max_cycles: at most so many swaps a row.
        threshold: a row is done when \\|e_i\\| is at most this fraction of sum_j \\|W_ij m_j\\|.
        variance_exponent: p; 0 leaves variances out.

    Returns:
        The new mask with what it does to each row, see :class:`Repruned`.

    Raises:
        ValueError: if shapes do not fit, d_in is not divisible by `group`, or a number is out of its range.

    Source: DSnoT, arXiv 2310.08915, and its released code: the orders, one swap a cycle, max_cycles and p. Ours: the
    prune order as an argument; a threshold relative to the row (the code's 0.1 is absolute, on sums over a sequence's
    tokens); variances over all tokens, with a floor (the code averages those of batches, and divides by zero); no swap
    that moves e_i further away (the code grows weights of the wrong sign when the right ones are used up, and asks no
    sign of what it prunes under N:M); the best mask on the way (the code takes the last, and under N:M stops before the
    first change of sign).
    """
    _check(weight, dense, keep, scores, input_mean, input_variance, group)
    if max_cycles < 1:
        raise ValueError(f"max_cycles={max_cycles} must be at least 1")
    for name, value in (("threshold", threshold), ("variance_exponent", variance_exponent)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")
    rows, columns = weight.shape
    everyone = torch.arange(rows, device=weight.device)
    mean = input_mean.to(weight.device, torch.float32)
    held, offered = weight.float() * mean, dense.float() * mean
    before = (offered - held).sum(dim=1, dtype=torch.float64)
    limit = threshold * offered.abs().sum(dim=1, dtype=torch.float64)

    # Candidates by direction: [0] for rows whose error is negative, [1] for those where it is positive.
    depth = min(max_cycles, columns)
    relative = input_variance.to(weight.device, torch.float32)
    relative = (relative / relative.mean().clamp_min(_TINY)).clamp_min_(_SMALLEST_VARIANCE).pow_(variance_exponent)
    keys = (offered / relative).masked_fill_(keep, 0)
    growth = [(-keys).topk(depth, dim=1), keys.topk(depth, dim=1)]
    grow_columns = torch.stack([found.indices for found in growth])
    grow_counts = torch.stack([(found.values > 0).sum(dim=1) for found in growth])
    del keys, growth
    if group is None:
        losses = [
            scores.float().masked_fill(other_sign.logical_not_(), torch.inf).topk(depth, dim=1, largest=False)
            for other_sign in (keep & (held > 0), keep & (held < 0))
        ]
        prune_columns = torch.stack([found.indices for found in losses])
        prune_counts = torch.stack([(found.values < torch.inf).sum(dim=1) for found in losses])
        del losses
    else:
        remaining = scores.float().masked_fill(~keep, torch.inf).view(rows, -1, group)

    error = before.clone()
    after = before.clone()
    best, swaps = torch.zeros_like(everyone), torch.zeros_like(everyone)
    grown = torch.zeros((rows, max_cycles), dtype=torch.int64, device=weight.device)
    pruned = torch.zeros_like(grown)
    grow_next, prune_next = torch.zeros_like(grow_counts), torch.zeros_like(grow_counts)
    for _ in range(max_cycles):
        direction = (error > 0).long()
        place = grow_next[direction, everyone]
        active = (error.abs() > limit) & (place < grow_counts[direction, everyone])
        grow = grow_columns[direction, everyone, place.clamp_max(depth - 1)]
        if group is None:
            prune_place = prune_next[direction, everyone]
            active &= prune_place < prune_counts[direction, everyone]
            prune = prune_columns[direction, everyone, prune_place.clamp_max(depth - 1)]
            swapped = active
        else:
            lowest, member = remaining[everyone, grow // group].min(dim=1)
            prune = grow // group * group + member
            swapped = active & (lowest < torch.inf)
        if not bool(active.any()):
            break
        change = (held[everyone, prune] - offered[everyone, grow]).double()
        swapped = swapped & (change * error < 0)
        grow_next[direction[active], everyone[active]] += 1
        moved = everyone[swapped]
        if group is None:
            prune_next[direction[moved], moved] += 1
        else:
            remaining[moved, prune[moved] // group, prune[moved] % group] = torch.inf
        grown[moved, swaps[moved]], pruned[moved, swaps[moved]] = grow[moved], prune[moved]
        error[moved] += change[moved]
        swaps[moved] += 1
        better = error.abs() < after.abs()
        best, after = torch.where(better, swaps, best), torch.where(better, error, after)

    made = torch.arange(max_cycles, device=weight.device) < best[:, None]
    row = made.nonzero()[:, 0]
    result = keep.clone()
    result[row, grown[made]] = True
    result[row, pruned[made]] = False
    return Repruned(result, best, before, after)


def _check(
    weight: torch.Tensor,
    dense: torch.Tensor,
    keep: torch.Tensor,
    scores: torch.Tensor,
    input_mean: torch.Tensor,
    input_variance: torch.Tensor,
    group: int | None,
) -> None:
    for name, matrix in (("dense", dense), ("keep", keep), ("scores", scores)):
        if weight.dim() != 2 or matrix.shape != weight.shape:
            raise ValueError(
                f"the pruned weight {list(weight.shape)} and {name} {list(matrix.shape)} must both be [d_out, d_in]"
            )
    columns = weight.shape[1]
    for name, vector in (("input_mean", input_mean), ("input_variance", input_variance)):
        if vector.shape != (columns,):
            raise ValueError(f"{name} must have one entry per input channel, [{columns}], got {list(vector.shape)}")
    if group is not None and (group < 2 or columns % group):
        raise ValueError(f"{columns} input channels cannot be cut into groups of {group}")
