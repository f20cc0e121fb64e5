"""Re-pruning: another mask of the same sparsity, whose expected outputs come closer to the dense layer's.

With m and v the mean and variance of the input channels, the expected error of row i is e_i = sum_j (W_ij - W'_ij) m_j,
where W is the dense and W' the pruned weight. In each cycle every row whose \\|e_i\\| is above its threshold makes one
swap. It grows one of the pruned weights whose contribution W_ij m_j has the sign of e_i: the one with the largest
\\|W_ij m_j\\| / v_j^p. What it prunes depends on the mask:

- unstructured, the kept weight of the lowest score among those whose contribution has the other sign;
- under N:M, the kept weight of the lowest score in the group of the one that grows. If that takes e_i further away,
  nothing is swapped, and the next pruned weight is looked at.

No weight takes part in two swaps. A row is done when it has no such weights left. As steps overshoot, it ends with the
mask, of all it went through, at which \\|e_i\\| was smallest. That may be the first, and then the row is as it was.
Rows keep their number of weights, groups theirs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["DSnoTOptions", "Repruned", "dsnot"]

_TINY = torch.finfo(torch.float32).tiny
# Variances below this fraction of their mean count as so large: a channel that hardly varies comes first, but finitely.
_SMALLEST_VARIANCE = 1e-6


@dataclass(frozen=True)
class DSnoTOptions:
    """How :func:`dsnot` swaps.

    Attributes:
        group: M, for N:M masks, or None for unstructured ones.
        max_cycles: at most so many swaps a row.
        threshold: a row is done when \\|e_i\\| is at most this fraction of sum_j \\|W_ij m_j\\|.
        variance_exponent: p; 0 leaves variances out.

    Raises:
        ValueError: if a number is out of its range.
    """

    group: int | None = None
    max_cycles: int = 50
    threshold: float = 0.01
    variance_exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.max_cycles < 1:
            raise ValueError(f"max_cycles={self.max_cycles} must be at least 1")
        for name in ("threshold", "variance_exponent"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")


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
    options: DSnoTOptions = DSnoTOptions(),
) -> Repruned:
    """Grow pruned weights back and prune kept ones in their place, so that each expected output nears the dense one.

    Args:
        weight: [d_out, d_in], the pruned weight, zero where not `keep`; the kept values may differ from the dense ones.
        dense: [d_out, d_in], what grows back.
        keep: bool [d_out, d_in], the mask to start from.
        scores: [d_out, d_in], larger is more important: the order in which kept weights are pruned.
        input_mean: [d_in], signed mean of each input channel over the calibration tokens.
        input_variance: [d_in], non-negative variance of the same; may have zeros.
        options: the mask's structure, and when a row is done.

    Raises:
        ValueError: if shapes do not fit, or d_in is not divisible by the group.

    Source: DSnoT, arXiv 2310.08915, and its released code: the orders (with Wanda's scores), one swap a cycle,
    max_cycles and p. Ours: any scores; a threshold relative to the row (the code's 0.1 is absolute, on sums over a
    sequence's tokens); variances over all tokens, with a floor (the code averages those of batches, and divides by
    zero); no swap that moves e_i further away (the code grows weights of the wrong sign when the right ones are used
    up, and asks no sign of what it prunes under N:M); the best mask on the way (the code takes the last, and under N:M
    stops before the first change of sign).
    """
    _check_shapes(weight, {"dense": dense, "keep": keep, "scores": scores}, options.group)
    _check_channels(weight, {"input_mean": input_mean, "input_variance": input_variance})
    mean = input_mean.to(weight.device, torch.float32)
    held, offered = weight.float() * mean, dense.float() * mean
    limit = options.threshold * offered.abs().sum(dim=1, dtype=torch.float64)
    depth = min(options.max_cycles, weight.shape[1])
    growth = _growth(offered.masked_fill(keep, 0), input_variance, options.variance_exponent, depth)
    pruning = (
        _FromRows(scores, keep, held, depth) if options.group is None else _FromGroups(scores, keep, options.group)
    )
    swaps = _Swaps((offered - held).sum(dim=1, dtype=torch.float64), options.max_cycles)
    while swaps.cycle(growth, pruning, held, offered, limit):
        pass
    return swaps.result(keep)


class _Queues:
    """Columns of each row in the order in which they are to be taken.

    A row has two queues: [0] for when its error is negative, [1] for when it is positive.
    """

    def __init__(self, columns: list[torch.Tensor], present: list[torch.Tensor]) -> None:
        """Columns int64 [rows, depth], of which those `present`, bool [rows, depth], count: the first ones of a row."""
        self._columns = torch.stack(columns)
        self._counts = torch.stack([these.sum(dim=1) for these in present])
        self._next = torch.zeros_like(self._counts)
        self._rows = torch.arange(self._counts.shape[1], device=self._counts.device)

    def first(self, direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row's queue, whether there is a column left (bool [rows]), and the first of them (int64 [rows])."""
        place = self._next[direction, self._rows]
        left = place < self._counts[direction, self._rows]
        return left, self._columns[direction, self._rows, place.clamp_max(self._columns.shape[2] - 1)]

    def advance(self, direction: torch.Tensor, which: torch.Tensor) -> None:
        """Drop the first column of the queues of some rows, bool [rows]."""
        self._next[direction[which], self._rows[which]] += 1


def _growth(contributions: torch.Tensor, variance: torch.Tensor, exponent: float, depth: int) -> _Queues:
    """Which weights grow: those whose contribution has the error's sign, by size relative to the channel's variance."""
    relative = variance.to(contributions.device, torch.float32)
    relative = (relative / relative.mean().clamp_min(_TINY)).clamp_min_(_SMALLEST_VARIANCE).pow_(exponent)
    keys = contributions / relative
    found = [(-keys).topk(depth, dim=1), keys.topk(depth, dim=1)]
    return _Queues([each.indices for each in found], [each.values > 0 for each in found])


class _FromRows:
    """Which weights are pruned for those that grow, in unstructured masks: any of the row, by score."""

    def __init__(self, scores: torch.Tensor, keep: torch.Tensor, held: torch.Tensor, depth: int) -> None:
        found = [
            scores.float().masked_fill(other_sign.logical_not_(), torch.inf).topk(depth, dim=1, largest=False)
            for other_sign in (keep & (held > 0), keep & (held < 0))
        ]
        self._queues = _Queues([each.indices for each in found], [each.values < torch.inf for each in found])

    def find(self, direction: torch.Tensor, grow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each row whether it goes on (bool), whether it has a weight to prune (bool), and which column's."""
        left, prune = self._queues.first(direction)
        return left, left, prune

    def take(self, direction: torch.Tensor, prune: torch.Tensor, which: torch.Tensor) -> None:
        """Prune what was found in some rows, bool [rows]."""
        self._queues.advance(direction, which)


class _FromGroups:
    """The same for N:M masks: the weight of the lowest score in the group of the one that grows."""

    def __init__(self, scores: torch.Tensor, keep: torch.Tensor, group: int) -> None:
        self._group = group
        self._remaining = scores.float().masked_fill(~keep, torch.inf).view(len(scores), -1, group)
        self._rows = torch.arange(len(scores), device=scores.device)

    def find(self, direction: torch.Tensor, grow: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of :class:`_FromRows`; a row goes on, as another group may have a weight to prune."""
        lowest, member = self._remaining[self._rows, grow // self._group].min(dim=1)
        present = lowest < torch.inf
        return torch.ones_like(present), present, grow // self._group * self._group + member

    def take(self, direction: torch.Tensor, prune: torch.Tensor, which: torch.Tensor) -> None:
        """As of :class:`_FromRows`."""
        pruned = prune[which]
        self._remaining[self._rows[which], pruned // self._group, pruned % self._group] = torch.inf


class _Swaps:
    """The swaps of every row, and how many of them leave it with the smallest error."""

    def __init__(self, error: torch.Tensor, max_cycles: int) -> None:
        self._before, self._error, self._after = error, error.clone(), error.clone()
        self._rows = torch.arange(len(error), device=error.device)
        self._made, self._best = torch.zeros_like(self._rows), torch.zeros_like(self._rows)
        self._grown = torch.zeros((len(error), max_cycles), dtype=torch.int64, device=error.device)
        self._pruned = torch.zeros_like(self._grown)
        self._cycles = 0

    def cycle(
        self,
        growth: _Queues,
        pruning: _FromRows | _FromGroups,
        held: torch.Tensor,
        offered: torch.Tensor,
        limit: torch.Tensor,
    ) -> bool:
        """Make one swap in each row that is not done; False when there is none, or no cycle is left."""
        if self._cycles == self._grown.shape[1]:
            return False
        self._cycles += 1
        direction = (self._error > 0).long()
        left, grow = growth.first(direction)
        goes_on, present, prune = pruning.find(direction, grow)
        active = (self._error.abs() > limit) & left & goes_on
        if not bool(active.any()):
            return False
        change = (held[self._rows, prune] - offered[self._rows, grow]).double()
        swapped = active & present & (change * self._error < 0)
        growth.advance(direction, active)
        pruning.take(direction, prune, swapped)
        moved = self._rows[swapped]
        self._grown[moved, self._made[moved]] = grow[moved]
        self._pruned[moved, self._made[moved]] = prune[moved]
        self._error[moved] += change[moved]
        self._made[moved] += 1
        better = self._error.abs() < self._after.abs()
        self._best = torch.where(better, self._made, self._best)
        self._after = torch.where(better, self._error, self._after)
        return True

    def result(self, keep: torch.Tensor) -> Repruned:
        """The mask after each row's best swaps."""
        made = torch.arange(self._grown.shape[1], device=keep.device) < self._best[:, None]
        row = made.nonzero()[:, 0]
        result = keep.clone()
        result[row, self._grown[made]] = True
        result[row, self._pruned[made]] = False
        return Repruned(result, self._best, self._before, self._after)


def _check_shapes(weight: torch.Tensor, matrices: dict[str, torch.Tensor], group: int | None) -> None:
    for name, matrix in matrices.items():
        if weight.dim() != 2 or matrix.shape != weight.shape:
            raise ValueError(
                f"the pruned weight {list(weight.shape)} and {name} {list(matrix.shape)} must both be [d_out, d_in]"
            )
    if group is not None and (group < 2 or weight.shape[1] % group):
        raise ValueError(f"{weight.shape[1]} input channels cannot be cut into groups of {group}")


def _check_channels(weight: torch.Tensor, vectors: dict[str, torch.Tensor]) -> None:
    columns = weight.shape[1]
    for name, vector in vectors.items():
        if vector.shape != (columns,):
            raise ValueError(f"{name} must have one entry per input channel, [{columns}], got {list(vector.shape)}")
