"""A mask and the weights under it, found together by the alternating direction method of multipliers (ADMM)."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.functional.masks import keep_unstructured

__all__ = ["Reconstruction", "admm"]


class Reconstruction(NamedTuple):
    """What :func:`admm` finds.

    Attributes:
        keep: bool [d_out, d_in], the mask.
        weight: fp32 [d_out, d_in], zero outside the mask.
    """

    keep: torch.Tensor
    weight: torch.Tensor


def admm(
    dense: torch.Tensor,
    gram: torch.Tensor,
    scores: Callable[[torch.Tensor], torch.Tensor],
    mask: Callable[[torch.Tensor], torch.Tensor],
    *,
    dampening: float = 0.01,
    penalty: float = 1.0,
    rounds: int = 15,
    iterations: int = 20,
    refinement: int = 10,
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
        dampening: added to the diagonal of H.
        penalty: how strongly weights are drawn to the mask.
        rounds: how often the mask is chosen.
        iterations: of ADMM, at least `rounds`; each costs a product of `dense` and `gram`.
        refinement: iterations of conjugate gradients at the end.

    Returns:
        The mask, exactly one that `mask` gives, and the weights.

    Raises:
        ValueError: if shapes do not fit, `penalty` is not positive, or not 1 <= `rounds` <= `iterations`.
        torch.linalg.LinAlgError: if the dampened H with the penalty is not positive definite.

    Source: ADMM-Grad, arXiv 2401.02938 (normalisation, schedule, 15 and 20 iterations, penalty 1), with any score in
    place of its magnitudes, and the refinement of ALPS, arXiv 2406.07831. That shares are of the whole layer, also
    where weights compete within rows or groups, is ours.
    """
    if dense.dim() != 2 or gram.shape != (dense.shape[1],) * 2:
        raise ValueError(f"gram {list(gram.shape)} must be [d_in, d_in] of a weight [d_out, d_in], {list(dense.shape)}")
    if not (penalty > 0 and dampening >= 0):
        raise ValueError(f"penalty={penalty} must be positive and dampening={dampening} not negative")
    if not 1 <= rounds <= iterations:
        raise ValueError(f"rounds={rounds} must be at least 1 and at most iterations={iterations}")
    keep, weight = _alternated(dense, gram, scores, mask, dampening, penalty, rounds, iterations)
    weight = conjugate_gradients(dense, keep, gram, start=weight, dampening=dampening, iterations=refinement)
    return Reconstruction(keep, weight)


def _alternated(
    dense: torch.Tensor,
    gram: torch.Tensor,
    scores: Callable[[torch.Tensor], torch.Tensor],
    mask: Callable[[torch.Tensor], torch.Tensor],
    dampening: float,
    penalty: float,
    rounds: int,
    iterations: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the weights before refinement. A function of its own, so that its matrices are gone after it."""
    norms = gram.float().diagonal().sqrt()
    norms = torch.where(norms > 0, norms, 1)  # A channel that is never active; nothing depends on its weights.
    inverse = _penalised_inverse(gram, norms, dampening, penalty)
    weight = dense.float() * norms
    # W0 H (H + penalty I)^-1, in one product.
    target = torch.addmm(weight, weight, inverse, alpha=-1)
    dual, moved = torch.zeros_like(weight), torch.empty_like(weight)
    for iteration in range(1, iterations + 1):
        dual += weight
        if iteration <= rounds:
            found = scores(torch.div(dual, norms, out=weight))
            keep = mask(found)
            if iteration < rounds:
                keep = _in_part(found, keep, 1 - (1 - iteration / rounds) ** 3)
            del found
        torch.mul(dual, keep, out=weight)
        dual -= weight
        if iteration < iterations:
            torch.addmm(target, weight.sub_(dual), inverse, out=moved)
            weight, moved = moved, weight
    return keep, weight.div_(norms)


def _penalised_inverse(gram: torch.Tensor, norms: torch.Tensor, dampening: float, penalty: float) -> torch.Tensor:
    """penalty (H + penalty I)^-1 of the normalised and dampened Gram matrix H."""
    hessian = gram.float() / norms / norms[:, None]
    hessian.diagonal().fill_(1 + dampening + penalty)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian)).mul_(penalty)


def _in_part(scores: torch.Tensor, keep: torch.Tensor, share: float) -> torch.Tensor:
    """A mask that prunes only the given share, with the lowest scores, of what `keep` does. Overwrites the scores."""
    pruned = 1 - keep.sum().item() / keep.numel()
    return keep_unstructured(scores.masked_fill_(keep, torch.inf), share * pruned, "matrix")
