"""Importance scores of the weights of a linear layer y = W x.

Every score is a pure function of the weight [d_out, d_in] and, where it looks at activations, of the L2 norm
of each input channel over the calibration tokens [d_in]; it returns fp32 scores [d_out, d_in] on the weight's
device, larger meaning more important. :mod:`crepe_llm.functional.masks` turns scores into masks.
"""

import itertools
import math
from collections.abc import Iterator

import torch

from crepe_llm.functional.rows import row_blocks

__all__ = ["crepe_scores", "cvr_scores", "magnitude_scores", "wanda_scores", "window_mean"]

# Sums of |W| below this count as zero: an all-zero row, column or window then scores 0 instead of NaN.
_TINY = torch.finfo(torch.float32).tiny
_BLOCK_ELEMENTS = 1 << 18
# Power of ten that no factor of a score may exceed: fp32 ends at 38.
_LARGEST = 36


def magnitude_scores(weight: torch.Tensor) -> torch.Tensor:
    """Score each weight by its absolute value.

    Args:
        weight: [d_out, d_in], any floating dtype.

    Returns:
        fp32 scores [d_out, d_in].
    """
    _check(weight, None)
    return _magnitude(weight)


def wanda_scores(weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """Score each weight by its absolute value times the norm of its input channel: \\|W_ij\\| ‖X_j‖.

    Args:
        weight: [d_out, d_in], any floating dtype.
        input_norm: [d_in], non-negative L2 norm of each input channel over the calibration tokens.

    Returns:
        fp32 scores [d_out, d_in].

    Raises:
        ValueError: if the shapes do not fit.

    Source: Wanda, arXiv 2306.11695, equation 1.
    """
    _check(weight, input_norm)
    return magnitude_scores(weight).mul_(input_norm.to(weight.device, torch.float32))


def crepe_scores(
    weight: torch.Tensor,
    input_norm: torch.Tensor,
    *,
    row: float = 1.0,
    column: float = 1.0,
    neighbourhood: float = 1.0,
    kernel_size: int = 3,
    activation_exponent: float = 0.5,
) -> torch.Tensor:
    """Score each weight relative to its row, its column and its K x K neighbourhood, times the input norm.

    With A = |W|, row sums R, column sums C and M the mean of A over the K x K window centred at (i, j)
    (centre included; at borders the mean is over the entries that exist)::

        s_ij = (row A_ij / R_i + column A_ij / C_j + neighbourhood A_ij / (sqrt(d_out d_in) M_ij)) ‖X_j‖^a

    ``(row, column, neighbourhood, a) = (1, 1, 0, 0.5)`` is RIA; ``(1, 0, 0, 1)`` compared within rows or N:M
    groups is Wanda; ``row`` alone with a = 0 is magnitude within rows. ``kernel_size=1`` makes the
    neighbourhood term constant. Runs in O(numel) for every kernel size.

    Args:
        weight: [d_out, d_in], any floating dtype; arithmetic is in fp32.
        input_norm: [d_in], non-negative L2 norm of each input channel over the calibration tokens.
        row: coefficient of the row term, at least 0.
        column: coefficient of the column term, at least 0.
        neighbourhood: coefficient of the neighbourhood term, at least 0. One coefficient must be positive.
        kernel_size: K, odd and positive; may exceed the layer.
        activation_exponent: a, at least 0.

    Returns:
        fp32 scores [d_out, d_in], non-negative; an all-zero row, column or window contributes 0, never NaN.

    Raises:
        ValueError: if the shapes do not fit or a coefficient is out of its range.

    Source: our reading of CRePE, arXiv 2606.01544, whose full text is not public to us: the paper's abstract
    gives the three terms and the adaptive coefficients; the mean over the window, its treatment at borders and
    the factor sqrt(d_out d_in), which keeps the third term on the scale of the others, are ours.
    """
    _check(weight, input_norm)
    check_coefficients(row, column, neighbourhood, kernel_size, activation_exponent)
    norm_power = input_norm.to(weight.device, torch.float32).pow(activation_exponent)
    column_sum = _column_sums(weight).clamp_min_(_TINY)
    means = _window_means(weight, kernel_size) if neighbourhood > 0 else None
    scores = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    # Block by block, so that every temporary stays in the processor's cache and the scores are the one full copy.
    for block in row_blocks(weight, _BLOCK_ELEMENTS):
        magnitude = _magnitude(weight[block])
        out = scores[block]
        if means is not None:
            torch.div(magnitude, next(means).clamp_min_(_TINY), out=out).mul_(neighbourhood / math.sqrt(weight.numel()))
        else:
            out.zero_()
        if row > 0:
            out.addcdiv_(magnitude, magnitude.sum(dim=1, keepdim=True).clamp_min_(_TINY), value=row)
        if column > 0:
            out.addcdiv_(magnitude, column_sum, value=column)
        out.mul_(norm_power)
    return scores


def cvr_scores(
    weight: torch.Tensor, input_variance: torch.Tensor, *, alpha: float = 1.0, epsilon: float = 1e-8
) -> torch.Tensor:
    """Score each weight by its absolute value relative to the spread of its column, times that of its input channel.

    With v_j the variance of column j of the weight and u_j that of input channel j: |W_ij| (v_j + eps)^(-alpha/2)
    u_j^(1/4). Column variances are taken relative to their mean, which scales all scores alike.

    Args:
        weight: [d_out, d_in], any floating dtype; arithmetic is in fp32.
        input_variance: [d_in], non-negative variance of each input channel over the calibration tokens.
        alpha: at least 0; 0 leaves the columns of the weight as they are.
        epsilon: eps, as a fraction of the mean variance of the columns; positive.

    Returns:
        fp32 scores [d_out, d_in], non-negative and finite.

    Raises:
        ValueError: if the shapes do not fit, alpha is negative or too large, or epsilon is not positive.

    Source: column-variance reweighting, arXiv 2602.07375, which gives neither alpha nor eps: the defaults are ours.
    """
    _check(weight, input_variance)
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha={alpha} must be a finite number of at least 0")
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon={epsilon} must be a finite positive number, such as 1e-8")
    if -alpha / 2 * math.log10(epsilon) > _LARGEST:
        raise ValueError(
            f"alpha={alpha} with epsilon={epsilon} makes scores that fp32 cannot hold: use at most "
            f"{math.floor(-20 * _LARGEST / math.log10(epsilon)) / 10}"
        )
    values = weight.detach().float()
    # By a power of two, which rounds nothing, so that no square is above what fp32 holds.
    exponent = math.frexp(float(values.abs().amax()))[1]
    variance = torch.ldexp(values, torch.tensor(1 - exponent)).var(dim=0, correction=0)
    relative = variance / variance.mean().clamp_min(_TINY)
    factor = relative.add_(epsilon).pow_(-alpha / 2).mul_(input_variance.to(weight.device, torch.float32).pow(0.25))
    return _magnitude(weight).mul_(factor)


def check_coefficients(
    row: float, column: float, neighbourhood: float, kernel_size: int, activation_exponent: float
) -> None:
    """Raise ValueError, naming the field, its value and the fix, where CRePE's coefficients make no score."""
    coefficients = {"row": row, "column": column, "neighbourhood": neighbourhood}
    for name, value in (*coefficients.items(), ("activation_exponent", activation_exponent)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number of at least 0")
    if not any(coefficients.values()):
        raise ValueError(
            "row, column and neighbourhood are all 0, so every score would be 0: make one of them positive"
        )
    if kernel_size == 1 and not (row or column):
        raise ValueError(
            "kernel_size=1 compares each weight with itself alone, so with row=0 and column=0 all scores would be "
            "alike: make one of them positive, or use kernel_size=3"
        )
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(
            f"kernel_size={kernel_size} must be odd and positive, so that the window has a centre: "
            f"use {max(1, kernel_size - 1)} or {max(1, kernel_size + 1)}"
        )


def window_mean(values: torch.Tensor, kernel_size: int) -> torch.Tensor:
    """Mean of |values| over the K x K window centred at each entry, over the entries that exist at borders.

    Costs O(numel) for every K, and no more memory than the result and a small block.

    Args:
        values: [n, m], any floating dtype.
        kernel_size: K, odd and positive; may exceed the matrix.

    Returns:
        fp32 means [n, m].
    """
    means = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    for block, block_means in zip(row_blocks(values, _BLOCK_ELEMENTS), _window_means(values, kernel_size), strict=True):
        means[block] = block_means
    return means


def _magnitude(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.float32, copy=True).abs_()


def _column_sums(weight: torch.Tensor) -> torch.Tensor:
    """fp32 [d_in], the sums of |W| over each column."""
    sums = torch.zeros(weight.shape[1], device=weight.device)
    for block in row_blocks(weight, _BLOCK_ELEMENTS):
        sums += _magnitude(weight[block]).sum(dim=0)
    return sums


def _window_means(values: torch.Tensor, kernel_size: int) -> Iterator[torch.Tensor]:
    """fp32 window means of |values|, one block of :func:`row_blocks` after the other.

    Down the columns a running fp64 sum gains the row that enters the window and loses the one that leaves it; along
    the rows a window is the difference of two fp64 prefix sums.
    """
    rows, columns = values.shape
    half_height, half_width = min(kernel_size // 2, rows), min(kernel_size // 2, columns)
    running = torch.zeros(columns, dtype=torch.float64, device=values.device)

    def magnitude(start: int, stop: int) -> torch.Tensor:
        return values[max(0, start) : max(0, stop)].detach().abs().double()

    running += magnitude(0, half_height).sum(dim=0)
    column = torch.arange(columns, device=values.device)
    widths = (column + half_width + 1).clamp_max_(columns) - (column - half_width).clamp_min_(0)
    per_width = widths.double().reciprocal_()
    for block in row_blocks(values, _BLOCK_ELEMENTS):
        row = torch.arange(block.start, block.stop, device=values.device)
        counts = (row + half_height + 1).clamp_max_(rows) - (row - half_height).clamp_min_(0)
        heights = magnitude(block.start + half_height, block.stop + half_height)
        if len(heights) < len(row):  # no rows enter below the last
            heights = torch.cat([heights, heights.new_zeros(len(row) - len(heights), columns)])
        leaving = magnitude(block.start - half_height - 1, block.stop - half_height - 1)
        heights[len(row) - len(leaving) :] -= leaving
        heights[0] += running
        for above, below in itertools.pairwise(heights.unbind()):
            below += above
        running = heights[-1].clone()
        heights.div_(counts[:, None])
        # prefix[:, half + 1 + j] = heights[:, 0] + ... + heights[:, j], extended flat on both sides, so that every
        # window, cut at a border or not, is the difference of two entries 2 half + 1 apart.
        prefix = heights.new_empty((len(heights), columns + 2 * half_width + 1))
        prefix[:, : half_width + 1] = 0
        torch.cumsum(heights, dim=1, out=prefix[:, half_width + 1 : half_width + 1 + columns])
        prefix[:, half_width + 1 + columns :] = prefix[:, half_width + columns, None]
        torch.sub(prefix[:, 2 * half_width + 1 :], prefix[:, :columns], out=heights)
        yield heights.mul_(per_width).float()


def _check(weight: torch.Tensor, input_norm: torch.Tensor | None) -> None:
    if weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            "weight must be a floating-point matrix [d_out, d_in] with at least one entry, got "
            f"{weight.dtype} {list(weight.shape)}"
        )
    if input_norm is not None and input_norm.shape != weight.shape[1:]:
        raise ValueError(
            f"input_norm must have one entry per input channel, shape [{weight.shape[1]}] for a weight "
            f"{list(weight.shape)}, got {list(input_norm.shape)}"
        )
