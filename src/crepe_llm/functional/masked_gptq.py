"""GPTQ under a fixed mask: quantization with error feedback that leaves pruned weights exactly zero."""

from collections.abc import Callable

import torch

from crepe_llm.functional.products import cholesky_in_place, inverse_in_place

__all__ = ["masked_gptq"]


def masked_gptq(
    weight: torch.Tensor,
    gram: torch.Tensor,
    keep: torch.Tensor,
    quantize: Callable[[torch.Tensor, int], torch.Tensor],
    *,
    dampening: float = 0.01,
    block_size: int = 128,
    activation_order: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a pruned weight column by column, each column's error being made up for by the columns not yet done.

    GPTQ, https://arxiv.org/abs/2210.17323, with one change, which is ours: the only value that a pruned position may
    take is zero. What the feedback puts there is an error like any other when its column comes, and is handed on to
    the kept weights of later columns, as SparseGPT (https://arxiv.org/abs/2301.00774) does with what it prunes.

    Args:
        weight: [d_out, d_in], floating-point; not changed.
        gram: [d_in, d_in], the inputs' second moments X^T X up to a positive factor, symmetric; not changed.
        keep: bool [d_out, d_in], False where the result must be zero.
        quantize: takes a column of values, fp32 [d_out], and its index, and returns the values rounded to the grid.
        dampening: added to the diagonal of `gram`, as a fraction of its mean.
        block_size: columns whose feedback to the rest is gathered into one product.
        activation_order: take the columns by descending diagonal of `gram`, else by index.

    Returns:
        `(quantized, loss)`: fp32 [d_out, d_in], every value the result of `quantize` or zero, and the summed squared
        error, weighted by `gram`, of each row (fp32 [d_out]), up to the factor of `gram` and the dampening.

    Raises:
        ValueError: shapes do not fit.
        torch.linalg.LinAlgError: the dampened `gram` is not positive definite.
    """
    rows, columns = weight.shape
    if gram.shape != (columns, columns) or keep.shape != weight.shape:
        raise ValueError(
            f"weight {tuple(weight.shape)}, gram {tuple(gram.shape)} and keep {tuple(keep.shape)} do not fit: they "
            "must be [d_out, d_in], [d_in, d_in] and [d_out, d_in]"
        )
    order, factor = _order_and_factor(gram, dampening, activation_order)
    work = torch.where(keep, weight.float(), 0)[:, order]
    kept = keep[:, order]
    loss = torch.zeros(rows, dtype=torch.float32, device=weight.device)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.empty((rows, stop - start), dtype=torch.float32, device=weight.device)
        for position in range(start, stop):
            column = work[:, position]
            rounded = torch.where(kept[:, position], quantize(column, int(order[position])), 0)
            error = (column - rounded) / factor[position, position]
            work[:, position:stop] -= error[:, None] * factor[position, position:stop]
            work[:, position] = rounded
            errors[:, position - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
        loss += errors.square().sum(dim=1)
    quantized = torch.empty_like(work)
    quantized[:, order] = work
    return quantized, loss


def _order_and_factor(
    gram: torch.Tensor, dampening: float, activation_order: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the columns, and the upper Cholesky factor of the inverse of the dampened `gram` in that order."""
    hessian = gram.float().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # a channel that is never active; nothing depends on its weights
    order = diagonal.argsort(descending=True) if activation_order else torch.arange(len(gram), device=gram.device)
    diagonal += dampening * diagonal.mean()
    if activation_order:
        hessian = hessian[order][:, order].contiguous()
    return order, cholesky_in_place(inverse_in_place(hessian), upper=True)
