"""CFSP: how many FFN channels each decoder block keeps, and which, from what one pass of calibration shows.

Coarse importance is a block's: how far it turns the hidden state. Fine importance is a channel's within its block.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from crepe_llm.functional.allocation import water_fill

__all__ = [
    "SLOPE",
    "BlockImportance",
    "ChannelImportance",
    "RankAllocation",
    "angular_distance",
    "channel_importance",
    "keep_ratios",
    "kept_channels",
    "kept_widths",
    "recovery_ranks",
]

ChannelImportance = Literal["activation", "relative", "wanda"]
RankAllocation = Literal["important", "unimportant", "uniform"]

SLOPE = 13.1072
"""The released code's sigmoid takes the sum of the angles over 128 x 1024 tokens, divided by 10^4; of a mean, this."""

# The release takes this cosine where a hidden state is zero and has no direction.
_NO_DIRECTION = 0.5


def angular_distance(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """Angle between a block's input and its output at every token, as a fraction of pi.

    Args:
        inputs: [..., hidden], the hidden states that enter the block, any floating dtype.
        outputs: the same shape, those that leave it.

    Returns:
        [...], fp32 or better, from 0 to 1; 1/3 where one of the two is a zero vector; NaN where a state is not finite.

    Source: CFSP, arXiv 2409.13199, and its released code, whose cosine exceeds 1 by rounding; here it is clamped.
    """
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    inputs, outputs = inputs.to(dtype), outputs.to(dtype)
    norms = torch.linalg.vector_norm(inputs, dim=-1) * torch.linalg.vector_norm(outputs, dim=-1)
    cosine = ((inputs * outputs).sum(dim=-1) / norms).clamp(-1, 1)
    return torch.where(norms == 0, _NO_DIRECTION, cosine).arccos() / math.pi


class BlockImportance:
    """Streaming mean of :func:`angular_distance` over a block's tokens: CFSP's coarse importance, per token.

    Attributes:
        tokens: number of tokens seen.
        total: sum of the distances.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.total = 0.0

    @property
    def mean(self) -> float:
        """The importance, from 0 to 1.

        Raises:
            ValueError: if no token was seen.
        """
        if not self.tokens:
            raise ValueError("no calibration token was seen, so there is no mean")
        return self.total / self.tokens

    def update(self, inputs: torch.Tensor, outputs: torch.Tensor, token_mask: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            inputs: [..., hidden], what entered the block.
            outputs: the same shape, what left it.
            token_mask: [...]; zero entries are padding and left out. None counts every token.
        """
        distances = angular_distance(inputs.detach(), outputs.detach()).flatten()
        if token_mask is not None:
            distances = distances[token_mask.reshape(-1).to(distances.device, torch.bool)]
        self.tokens += distances.numel()
        self.total += distances.double().sum().item()


def keep_ratios(
    importance: Sequence[float],
    sparsity: float,
    *,
    widths: Sequence[int] | None = None,
    slope: float = SLOPE,
    low: float = 0.01,
) -> list[float]:
    """The fraction of its FFN channels that each block keeps: the more, the more important it is.

    Args:
        importance: of each block, see :class:`BlockImportance`.
        sparsity: fraction of all channels to prune.
        widths: how many channels each block has; the same number where left out.
        slope: of the sigmoid through which importance acts.
        low: smallest ratio of a block.

    Returns:
        One ratio per block, from `low` to 1; their mean, weighted by the widths, is 1 - `sparsity`.

    Raises:
        ValueError: if an importance is not finite, or the sparsity below 0 or above 1 - `low`.

    Source: CFSP, arXiv 2409.13199, and its released code, where importance is a sum over the tokens. The lower bound is
    ours.
    """
    if not 0 <= sparsity <= 1 - low:
        raise ValueError(f"sparsity={sparsity} must be from 0 to {1 - low:g}, the fraction of channels to prune")
    widths = [1] * len(importance) if widths is None else widths
    weights = _sigmoids(importance, slope)
    centre = sum(weight * width for weight, width in zip(weights, widths, strict=True)) / sum(widths)
    deviations = [weight / centre - 1 for weight in weights]
    keep, largest = 1 - sparsity, max(deviations)
    # No block can keep more than it has; the release leaves a margin of 5 % of the way.
    shrink = (1 / keep - 1) / largest / 1.05 if largest > 0 and keep * (1 + largest) >= 1 else 1.0
    ratios = [keep * (1 + shrink * deviation) for deviation in deviations]
    return [1 - pruned for pruned in water_fill([1 - ratio for ratio in ratios], widths, sparsity, high=1 - low)]


def kept_widths(ratios: Sequence[float], widths: Sequence[int], multiple: int) -> list[int]:
    """The number of channels that each block keeps: multiples of one number, in total as near the ratios as they can.

    Args:
        ratios: fraction that each block is to keep, from 0 to 1.
        widths: how many channels each has.
        multiple: every result is a multiple of this number, such as 128.

    Returns:
        One width per block: its share rounded down, or up for those that lose most by it (largest remainders).

    Raises:
        ValueError: if `multiple` is not positive or larger than a block, or if a block would be left empty; naming it.

    Source: ours. The release rounds every block to the nearest multiple, after which the mean is off the target.
    """
    if multiple < 1:
        raise ValueError(f"round_to={multiple} must be a positive number of channels, such as 128")
    for block, width in enumerate(widths):
        if width < multiple:
            raise ValueError(
                f"round_to={multiple} is larger than the FFN of block {block}, which has {width} channels: set a "
                "smaller one, in a recipe of your own where a shipped one leaves it out"
            )
    wanted = [ratio * width / multiple for ratio, width in zip(ratios, widths, strict=True)]
    counts = _apportion(wanted, [width // multiple for width in widths])
    for block, count in enumerate(counts):
        if count == 0:
            raise ValueError(
                f"block {block} would keep {ratios[block]:.1%} of its {widths[block]} FFN channels, which round_to="
                f"{multiple} rounds to none: use a lower sparsity or a smaller round_to"
            )
    return [count * multiple for count in counts]


def channel_importance(
    mode: ChannelImportance, norm: torch.Tensor, output: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Score the channels of one FFN: the higher, the more it would be missed.

    Args:
        mode: `activation`: the norm of the channel's activations alone, which is what the released code's scores
            amount to (its column-normalised matrices add up to the same constant for every channel). `relative`: the
            channel's share among all channels in every row of the output matrix, weighted by the norms, and in every
            column of the input matrices. `wanda`: the mean of |W| x norm down the output matrix's column.
        norm: [width], L2 norm of each channel's activations over the calibration tokens: the inputs of `output`.
        output: [hidden, width], the matrix that reads the channels (`down_proj`, `fc2`).
        inputs: those that write them (`gate_proj` and `up_proj`, or `fc1`), each [width, hidden].

    Returns:
        [width], fp32 or better. A share of a row or column of zeros is 0.

    Raises:
        ValueError: if the mode is unknown or a shape does not fit.

    Source: CFSP, arXiv 2409.13199: `activation` its released code, `relative` its equation 8 normalised across channels
    (ours: as printed, and normalised by sums, its terms for the input matrices are constant), `wanda` the same code's
    option `wanda_base`.
    """
    if mode not in get_args(ChannelImportance):
        raise ValueError(f"importance={mode} must be one of {', '.join(get_args(ChannelImportance))}")
    width = norm.numel()
    if output.shape[1] != width or any(matrix.shape[0] != width for matrix in inputs):
        shapes = [list(matrix.shape) for matrix in (output, *inputs)]
        raise ValueError(f"{width} norms do not fit matrices of shapes {shapes}: width is not {width} in all of them")
    dtype = torch.promote_types(output.dtype, torch.float32)
    norm = norm.to(dtype)
    if mode == "activation":
        return norm
    weighted = output.to(dtype).abs() * norm
    if mode == "wanda":
        return weighted.mean(dim=0)
    scores = _shares(weighted, dim=1).sum(dim=0)
    for matrix in inputs:
        scores += _shares(matrix.to(dtype).abs(), dim=0).sum(dim=1)
    return scores


def kept_channels(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` highest of `scores` [width], ascending, int64 [count]; of ties, the first are kept."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def recovery_ranks(
    importance: Sequence[float], mean_rank: int, allocation: RankAllocation, *, slope: float = SLOPE
) -> list[int]:
    """The LoRA rank of each block in recovery fine-tuning.

    Args:
        importance: of each block, see :class:`BlockImportance`.
        mean_rank: the mean of the result.
        allocation: `important`: in proportion to the weights with which :func:`keep_ratios` keeps channels;
            `unimportant`: to those of the opposite importances, so that what was pruned most may change most;
            `uniform`: the same rank everywhere.
        slope: of the sigmoid.

    Returns:
        One rank per block, at least 1; their mean is `mean_rank`, up to the blocks that have been raised to 1.

    Raises:
        ValueError: if the rank is not positive, an importance not finite, or the allocation unknown.

    Source: CFSP, arXiv 2409.13199, names the idea; it gives no formula, and the release has no code for it. Ours.
    """
    if mean_rank < 1:
        raise ValueError(f"a mean rank of {mean_rank} must be positive, such as 8")
    if allocation not in get_args(RankAllocation):
        raise ValueError(f"the rank allocation {allocation} must be one of {', '.join(get_args(RankAllocation))}")
    weights = _sigmoids(importance, {"important": slope, "unimportant": -slope, "uniform": 0.0}[allocation])
    total = mean_rank * len(weights)
    ranks = _apportion([total * weight / sum(weights) for weight in weights], [total] * len(weights))
    return [max(1, rank) for rank in ranks]


def _sigmoids(importance: Sequence[float], slope: float) -> list[float]:
    if not all(map(math.isfinite, importance)):
        raise ValueError(f"a block has no finite importance: {list(importance)}")
    values = torch.tensor(importance, dtype=torch.float64)
    return torch.sigmoid(slope * (values - values.mean())).tolist()


def _shares(values: torch.Tensor, dim: int) -> torch.Tensor:
    return (values / values.sum(dim=dim, keepdim=True)).nan_to_num(nan=0.0)


def _apportion(wanted: Sequence[float], limits: Sequence[int]) -> list[int]:
    """Round to integers whose sum is that of `wanted`, rounded, where the limits allow it: by largest remainders."""
    # The tolerance takes 0.7 * 10, which is below 7, for what it is meant to be.
    counts = [min(math.floor(value + 1e-6), limit) for value, limit in zip(wanted, limits, strict=True)]
    missing = math.floor(sum(wanted) + 0.5 + 1e-6) - sum(counts)
    by_remainder = sorted(range(len(counts)), key=lambda index: counts[index] - wanted[index])
    for index in by_remainder:
        if missing > 0 and counts[index] < limits[index]:
            counts[index] += 1
            missing -= 1
    return counts
