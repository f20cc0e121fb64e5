"""From importance scores [d_out, d_in] to boolean masks of what is kept.

Counts are exact, also where scores tie: of equal scores the ones at the lower positions (row-major) are
pruned first. "N:M" means N pruned of every M consecutive input channels, as in llm-compressor.
"""

import math
from typing import Literal, get_args

import numpy as np
import torch

__all__ = [
    "ComparisonGroup",
    "keep_mask",
    "keep_n_of_m",
    "keep_unstructured",
    "nonzero",
    "parse_mask_structure",
    "prune_count",
]

ComparisonGroup = Literal["row", "matrix"]

# Beyond this group size, sorting each group is cheaper than comparing all pairs.
_LARGEST_PAIRWISE_GROUP = 16
_BLOCK_ELEMENTS = 1 << 18


def parse_mask_structure(mask_structure: str) -> tuple[int, int] | None:
    """Read "N:M" (N pruned of every M); "0:0" means unstructured and gives None.

    Raises:
        ValueError: if the text is not of that form or not 0 < N < M.
    """
    pruned, separator, group = mask_structure.partition(":")
    if not (separator and pruned.strip().isdecimal() and group.strip().isdecimal()):
        raise ValueError(f'mask_structure="{mask_structure}" must have the form "N:M", such as "2:4", or "0:0"')
    n, m = int(pruned), int(group)
    if (n, m) == (0, 0):
        return None
    if not 0 < n < m:
        raise ValueError(
            f'mask_structure="{mask_structure}" prunes {n} of every {m} weights, which needs 0 < N < M; '
            'use "0:0" for unstructured sparsity'
        )
    return n, m


def prune_count(numel: int, sparsity: float) -> int:
    """The number of weights to prune of `numel`: floor(numel * sparsity), forgiving binary fractions (0.29 * 100)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and below 1")
    return math.floor(numel * sparsity + 1e-6)


def nonzero(weight: torch.Tensor) -> torch.Tensor:
    """Infer a mask from a weight's zeros: the one function that does so.

    It is for weights that come from outside, whose mask nobody has: it takes a kept weight that is exactly 0 for a
    pruned one.

    Args:
        weight: of any shape and dtype, float8 included; a negative zero counts as zero.

    Returns:
        bool of the weight's shape, True where it is not zero.
    """
    if weight.dtype == torch.float8_e4m3fn:  # not every device compares float8: all bits but the sign are looked at
        return (weight.view(torch.uint8) & 0x7F) != 0
    return weight != 0


def keep_mask(
    scores: torch.Tensor,
    sparsity: float,
    mask_structure: str = "0:0",
    comparison_group: ComparisonGroup = "row",
) -> torch.Tensor:
    """Mask of the weights to keep, for a structure as recipes name it.

    Args:
        scores: [d_out, d_in], larger is more important.
        sparsity: fraction to prune; N:M structures imply theirs and ignore this.
        mask_structure: "N:M" (N pruned of every M consecutive input channels) or "0:0" for unstructured.
        comparison_group: for unstructured masks, see :func:`keep_unstructured`.

    Returns:
        bool [d_out, d_in], True where the weight is kept.

    Raises:
        ValueError: for a structure, sparsity or group out of range, scores with NaN, or d_in not divisible by M.
    """
    structure = parse_mask_structure(mask_structure)
    if structure is not None:
        return keep_n_of_m(scores, *structure)
    return keep_unstructured(scores, sparsity, comparison_group)


def keep_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Prune the `n` lowest scores of every `m` consecutive input channels of each row.

    Args:
        scores: [d_out, d_in], larger is more important.
        n: how many of every group are pruned.
        m: group size; must divide d_in.

    Returns:
        bool [d_out, d_in], True where the weight is kept: exactly m - n in every group.

    Raises:
        ValueError: if d_in is not divisible by m, not 0 < n < m, or a score is NaN.
    """
    _check(scores)
    if not 0 < n < m:
        raise ValueError(f"{n}:{m} prunes {n} of every {m} weights, which needs 0 < N < M")
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"{columns} input channels cannot be cut into groups of {m} for {n}:{m} sparsity")
    groups = scores.reshape(rows, columns // m, m)
    if m > _LARGEST_PAIRWISE_GROUP:
        order = groups.argsort(dim=-1, stable=True)
        keep = torch.ones_like(groups, dtype=torch.bool)
        return keep.scatter_(-1, order[..., :n], False).view(rows, columns)
    keep = torch.empty(groups.shape, dtype=torch.bool, device=scores.device)
    step = max(1, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        # Member by member, so that comparisons run along contiguous memory in the processor's cache.
        members = groups[start : start + step].permute(2, 0, 1).contiguous()
        # A weight's rank in its group is the number of members pruned before it: those with a lower score, and
        # those to its left with the same.
        ranks = torch.zeros_like(members, dtype=torch.uint8)
        for left in range(m):
            for right in range(left + 1, m):
                left_goes_first = members[left] <= members[right]
                ranks[right] += left_goes_first
                ranks[left] += left_goes_first.logical_not_()
        keep[start : start + step] = (ranks >= n).permute(1, 2, 0)
    return keep.view(rows, columns)


def keep_unstructured(scores: torch.Tensor, sparsity: float, comparison_group: ComparisonGroup = "row") -> torch.Tensor:
    """Prune the lowest fraction of the scores of each comparison group.

    Args:
        scores: [d_out, d_in], larger is more important.
        sparsity: fraction to prune, at least 0 and below 1; the count is floor(size of the group * sparsity).
        comparison_group: "row" compares within each output row (Wanda's choice), "matrix" over the whole layer
            (RIA's).

    Returns:
        bool [d_out, d_in], True where the weight is kept.

    Raises:
        ValueError: if an argument is out of range or a score is NaN.
    """
    _check(scores)
    prune_count(0, sparsity)
    rows, columns = scores.shape
    if comparison_group == "row":
        return _keep_largest_per_row(scores, sparsity)
    if comparison_group == "matrix":
        return _keep_largest_per_row(scores.reshape(1, -1), sparsity).view(rows, columns)
    raise ValueError(f'comparison_group="{comparison_group}" must be one of {", ".join(get_args(ComparisonGroup))}')


def _keep_largest_per_row(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    scores, count = scores.detach(), prune_count(scores.shape[1], sparsity)
    if count == 0 or scores.numel() == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = _kth_smallest(scores, count)
    keep = scores > threshold
    surplus = (scores.shape[1] - count) - keep.sum(dim=1)
    for row in surplus.nonzero().flatten().tolist():
        # Scores tie at the threshold: the last of them are kept too, until the count is exact.
        tied = (scores[row] == threshold[row]).nonzero().flatten()
        keep[row, tied[len(tied) - int(surplus[row]) :]] = True
    return keep


def _kth_smallest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest value (from 1) of each row, [rows, 1]."""
    if scores.device.type == "cpu":
        # numpy's vectorised selection is over ten times faster than torch's on CPUs. It knows no bfloat16; fp32 holds
        # that and fp16 exactly, and would not hold fp64 or int64.
        exact = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
        partitioned = np.partition(exact.numpy(), k - 1, axis=1)
        return torch.from_numpy(partitioned[:, k - 1 : k].copy())
    return scores.kthvalue(k, dim=1, keepdim=True).values


def _check(scores: torch.Tensor) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores must be a matrix [d_out, d_in], got shape {list(scores.shape)}")
    if scores.numel() and torch.isnan(scores.aminmax().min):
        raise ValueError("scores contain NaN, so nothing can be ranked: check the weight and the activations")
