"""A mask and the weights under it, found together by the alternating direction method of multipliers (ADMM)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.functional.masks import keep_unstructured
from crepe_llm.functional.products import Symmetric, inverse_in_place
from crepe_llm.functional.rows import row_blocks

__all__ = ["ADMMOptions", "Reconstruction", "admm"]


class Reconstruction(NamedTuple):
    """What :func:`admm` finds.

    Attributes:
        keep: bool [d_out, d_in], the mask.
        weight: fp32 [d_out, d_in], zero outside the mask.
    """

    keep: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class ADMMOptions:
    """How :func:`admm` goes on.

    Attributes:
        dampening: added to the diagonal of H.
        penalty: how strongly weights are drawn to the mask.
        rounds: how often the mask is chosen.
        iterations: of ADMM, at least `rounds`; each costs a product of the weight and the Gram matrix.
        refinement: iterations of conjugate gradients at the end.

    Raises:
        ValueError: if `penalty` is not positive, `dampening` negative, or not 1 <= `rounds` <= `iterations`.
    """

    dampening: float = 0.01
    penalty: float = 1.0
    rounds: int = 15
    iterations: int = 20
    refinement: int = 10

    def __post_init__(self) -> None:
        if not (self.penalty > 0 and self.dampening >= 0):
            raise ValueError(f"penalty={self.penalty} must be positive and dampening={self.dampening} not negative")
        if not 1 <= self.rounds <= self.iterations:
            raise ValueError(f"rounds={self.rounds} must be at least 1 and at most iterations={self.iterations}")


def admm(
    dense: torch.Tensor,
    gram: torch.Tensor,
    scores: Callable[[torch.Tensor], torch.Tensor],
    mask: Callable[[torch.Tensor], torch.Tensor],
    options: ADMMOptions = ADMMOptions(),
) -> Reconstruction:
    """Prune step by step, the weights making up for what is lost between the steps and the mask following them.

    With H the Gram matrix of the inputs divided by their norms, so that its diagonal is 1, dampened, W0 the dense
    weight with its columns multiplied by these norms, and P(.) setting what is outside the mask to zero, each iteration
    is

        Z = P(W + U),  U <- W + U - Z,  W <- (W0 H + penalty (Z - U)) (H + penalty I)^-1

    from W = W0 and U = 0. In round t of the first `rounds` iterations the mask is chosen anew: W + U is scored, `mask`
    says what would be pruned in the end, and of that the share 1 - (1 - t / rounds)³ with the lowest scores is. The
    last mask stays, and its weights are refined by :func:`crepe_llm.functional.compensation.conjugate_gradients`, from
    Z.

    Args:
        dense: [d_out, d_in], any floating dtype; computed with in fp32.
        gram: [d_in, d_in], X^T X up to a positive factor, symmetric; not changed.
        scores: of a weight [d_out, d_in], in the units of `dense`, its importance scores; larger is more important.
        mask: of scores, the final mask, bool [d_out, d_in].
        options: iterations, dampening and penalty.

    Returns:
        The mask, exactly one that `mask` gives, and the weights.

    Raises:
        ValueError: if shapes do not fit.
        torch.linalg.LinAlgError: if the dampened H with the penalty is not positive definite.

    Source: ADMM-Grad, arXiv 2401.02938 (normalisation, schedule, 15 and 20 iterations, penalty 1), with any score in
    place of its magnitudes, and the refinement of ALPS, arXiv 2406.07831. That shares are of the whole layer, also
    where weights compete within rows or groups, is ours.
    """
    if dense.dim() != 2 or gram.shape != (dense.shape[1],) * 2:
        raise ValueError(f"gram {list(gram.shape)} must be [d_in, d_in] of a weight [d_out, d_in], {list(dense.shape)}")

    def chosen(found: torch.Tensor, iteration: int) -> torch.Tensor:
        keep = mask(found)
        return keep if iteration == options.rounds else _in_part(found, keep, 1 - (1 - iteration / options.rounds) ** 3)

    keep, weight = _alternated(dense, gram, scores, chosen, options)
    weight = conjugate_gradients(
        dense, keep, gram, start=weight, dampening=options.dampening, iterations=options.refinement
    )
    return Reconstruction(keep, weight)


def _alternated(
    dense: torch.Tensor,
    gram: torch.Tensor,
    scores: Callable[[torch.Tensor], torch.Tensor],
    chosen: Callable[[torch.Tensor, int], torch.Tensor],
    options: ADMMOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the weights before refinement. A function of its own, so that its matrices are gone after it.

    `chosen` gives the mask of a round from the scores of W + U in the units of `dense`.
    """
    norms = gram.float().diagonal().sqrt()
    norms = torch.where(norms > 0, norms, 1)  # A channel that is never active; nothing depends on its weights.
    inverse = _penalised_inverse(gram, norms, options)
    total = dense.float() * norms  # W + U
    target = torch.empty_like(total)  # W0 H (H + penalty I)^-1, in one product
    for rows in row_blocks(total):
        inverse.times(-total[rows], add=total[rows], out=target[rows])
    for iteration in range(1, options.iterations + 1):
        if iteration <= options.rounds:
            keep = chosen(scores(total / norms), iteration)
        if iteration == options.iterations:
            break
        for rows in row_blocks(total):
            # Inside the mask Z - U is W + U, outside it is the negative of that.
            dual = total[rows].masked_fill(keep[rows], 0)
            difference = total[rows].sub(dual, alpha=2)
            inverse.times(difference, add=target[rows], out=total[rows]).add_(dual)
    return keep, total.mul_(keep).div_(norms)


def _penalised_inverse(gram: torch.Tensor, norms: torch.Tensor, options: ADMMOptions) -> Symmetric:
    """penalty (H + penalty I)^-1 of the normalised and dampened Gram matrix H."""
    hessian = gram.float() / norms[:, None]
    hessian.div_(norms).diagonal().fill_(1 + options.dampening + options.penalty)
    return Symmetric(inverse_in_place(hessian).mul_(options.penalty))


def _in_part(scores: torch.Tensor, keep: torch.Tensor, share: float) -> torch.Tensor:
    """A mask that prunes only the given share, with the lowest scores, of what `keep` does."""
    pruned = ~keep
    return keep.masked_scatter(pruned, keep_unstructured(scores[pruned][None], share, "matrix"))
