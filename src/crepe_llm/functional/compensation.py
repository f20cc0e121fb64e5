"""Updates of the kept weights of a pruned linear layer y = W x, its mask staying as it is.

Every update is a pure function of the dense weight [d_out, d_in] and a boolean mask of what is kept, returns fp32
weights that are zero outside the mask, and computes in fp32 whatever the weight's dtype. Those that look at
activations lower the squared error of the layer's outputs, which :func:`output_error` measures. For that they take the
Gram matrix X^T X [d_in, d_in] of the layer's inputs, up to a positive factor, or each channel's mean and variance.
:func:`asymmetric_target` is what they may take for the dense weight where the inputs are not the dense model's.
"""

import torch

from crepe_llm.functional.products import Symmetric, cholesky_in_place, inverse_in_place
from crepe_llm.functional.rows import row_blocks

__all__ = [
    "asymmetric_target",
    "conjugate_gradients",
    "energy_compensation",
    "mean_compensation",
    "output_error",
    "sparsegpt_update",
]

# Of the dense energy, added to the pruned one: the scale of what lost everything is then finite.
_EPSILON = 1e-8
# Of the Gram matrix, whose products are computed in one piece.
_COLUMNS = 512


def output_error(dense: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Squared error of each output over the calibration tokens: ‖X (w_i - w'_i)‖² for each row i.

    Args:
        dense: [d_out, d_in], the weight before the change.
        changed: [d_out, d_in], the weight after it.
        gram: [d_in, d_in], X^T X.

    Returns:
        fp32 [d_out], at least 0, in the units of `gram` times squared weights.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check(dense, changed, gram)
    matrix, columns = gram.float(), dense.shape[1]
    difference = dense.float() - changed.float()
    error = torch.zeros(len(dense), dtype=torch.float32, device=dense.device)
    for start in range(0, columns, _COLUMNS):
        # The Gram matrix is symmetric: what it says of two channels is computed once and counts twice.
        stop = min(start + _COLUMNS, columns)
        block = difference[:, start:stop]
        error += torch.mm(block, matrix[start:stop, start:stop]).mul_(block).sum(dim=1)
        if start:
            error += torch.mm(difference[:, :start], matrix[:start, start:stop]).mul_(block).sum(dim=1).mul_(2)
    # A sum of rounded products can come out below zero where the error is nearly none.
    return error.clamp_min_(0)


def asymmetric_target(
    dense: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, *, share: float, dampening: float = 0.01
) -> torch.Tensor:
    """The dense weight, changed to make up for a share of what earlier pruning has done to the layer's inputs.

    With X the inputs that the layer is given, X0 those that it has in the dense model, H = X^T X and C = X0^T X,

        W + share W (C - H) (H + dampening mean(diag H) I)^-1

    which for a share of 1 has the outputs on X that are closest to the dense model's, ‖X0 W^T - X V^T‖² + the damped
    distance to W. All of it overfits where there are few calibration tokens.

    Args:
        dense: [d_out, d_in], any floating dtype; computed with in fp32.
        gram: [d_in, d_in], H; not changed.
        cross: [d_in, d_in], C, of the same tokens.
        share: from 0, the dense weight itself, to 1.
        dampening: added to the diagonal of H, as a fraction of its mean.

    Returns:
        fp32 [d_out, d_in].

    Raises:
        ValueError: if the shapes do not fit.
        torch.linalg.LinAlgError: if the dampened `gram` is not positive definite.

    Source: the asymmetric calibration of GPTAQ, arXiv 2504.02692, there of quantized weights; as a target that any
    method may fit, and with a share, it is ours.
    """
    _check(dense, dense, gram)
    _check(dense, dense, cross)
    weight = dense.float()
    shift = weight @ (cross.float() - gram.float())  # before there is a factor, which is as large as the difference
    factor = cholesky_in_place(_dampened(gram, dampening))
    # Not torch.cholesky_solve, which copies the factor.
    for triangle, upper in ((factor.mT, True), (factor, False)):
        torch.linalg.solve_triangular(triangle, shift, upper=upper, left=False, out=shift)
    return shift.mul_(share).add_(weight)


def energy_compensation(
    dense: torch.Tensor,
    keep: torch.Tensor,
    *,
    clamp: tuple[float, float] = (0.5, 2.0),
) -> torch.Tensor:
    """Scale each column, and then each row, so that it regains the energy about its dense mean that pruning took.

    With mu_j the mean of column j of the dense weight, its energies before and after pruning (zeros included) are
    E_j = sum_i (W_ij - mu_j)² and the same of the pruned weight. The pruned weight becomes (W' - mu_j) s_j + mu_j with
    s_j the root of the energies' ratio, clamped, and the mask is applied again; rows follow in the same way. As the
    mask and the row step follow, the energies of columns are matched only nearly. A 1e-8th of the dense energy is added
    to that of the pruned weight.

    Args:
        dense: [d_out, d_in], any floating dtype.
        keep: bool [d_out, d_in], False where the result must be zero.
        clamp: smallest and largest scale.

    Returns:
        fp32 [d_out, d_in]. What lost nothing is not scaled.

    Raises:
        ValueError: if the shapes do not fit or the clamp is no interval of positive numbers.

    Source: arXiv 2602.07375, which gives neither the clamp nor what is added: those are ours.
    """
    _check(dense, keep, None)
    if not 0 < clamp[0] <= clamp[1]:
        raise ValueError(f"clamp={clamp} must be two positive numbers, the smaller first, such as (0.5, 2.0)")
    original = dense.float()
    changed = original.masked_fill(~keep, 0)
    for dim in (0, 1):
        mean = original.mean(dim=dim, keepdim=True)
        energy = (original - mean).square_().sum(dim=dim, keepdim=True)
        centred = changed - mean
        remaining = centred.square().sum(dim=dim, keepdim=True)
        # A constant row or column has no energy to regain, and 0 / 0 is not a scale.
        scale = torch.where(energy > 0, (energy / (remaining + _EPSILON * energy)).sqrt_().clamp_(*clamp), 1)
        changed = centred.mul_(scale).add_(mean).masked_fill_(~keep, 0)
    return changed


def mean_compensation(
    dense: torch.Tensor,
    keep: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    dampening: float = 0.01,
) -> torch.Tensor:
    """Give each row's kept weights what the pruned ones added to the mean of its output.

    Least squares as if channels did not vary together: with m the means, v the variances, D = diag(v) + dampening
    mean(v + m²) I, and so D + m m^T in the place of the Gram matrix, the change of a row's kept weights k that
    minimises the squared error of its outputs has the closed form

        d_k = m_k / D_kk * (sum over pruned j of w_j m_j) / (1 + sum over kept i of m_i² / D_ii)

    Args:
        dense: [d_out, d_in], any floating dtype.
        keep: bool [d_out, d_in], False where the result must be zero.
        mean: [d_in], of each input channel over tokens.
        variance: [d_in], likewise, biased.
        dampening: added to the variances, as a fraction of the mean of all squared inputs.

    Returns:
        fp32 [d_out, d_in]. Where all means are zero, the kept weights as they are.

    Raises:
        ValueError: if the shapes do not fit.

    Source: ours. That the mean of what is lost is worth restoring is FLAP's, arXiv 2312.11983, which adds it to biases;
    the layers of most language models have none.
    """
    _check(dense, keep, None)
    for name, given in (("mean", mean), ("variance", variance)):
        if given.shape != dense.shape[1:]:
            raise ValueError(f"{name} must be [d_in], {list(dense.shape[1:])}, got {list(given.shape)}")
    means, spread = mean.double(), variance.double()
    spread = spread + dampening * (spread + means.square()).mean()
    # Channels are all zero where not even that is above zero.
    per_unit = torch.where(spread > 0, means / spread, 0)
    original, kept = dense.float(), keep.float()
    lost = original.masked_fill(keep, 0) @ means.float()
    share = lost / (1 + kept @ (means * per_unit).float())
    return (original + share[:, None] * per_unit.float()).masked_fill_(~keep, 0)


def sparsegpt_update(
    dense: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    *,
    dampening: float = 0.01,
    block_size: int = 128,
) -> torch.Tensor:
    """Prune column by column, what each column loses being made up for by the columns to its right.

    Args:
        dense: [d_out, d_in], any floating dtype.
        keep: bool [d_out, d_in], False where the result must be zero.
        gram: [d_in, d_in], X^T X up to a positive factor, symmetric; not changed.
        dampening: added to the diagonal of `gram`, as a fraction of its mean.
        block_size: columns whose updates to the rest are gathered into one product.

    Returns:
        fp32 [d_out, d_in].

    Raises:
        ValueError: if the shapes do not fit.
        torch.linalg.LinAlgError: if the dampened `gram` is not positive definite.

    Source: SparseGPT, arXiv 2301.00774, algorithm 1, with the mask given instead of chosen.
    """
    _check(dense, keep, gram)
    factor = cholesky_in_place(inverse_in_place(_dampened(gram, dampening)), upper=True)
    work = dense.float().clone()
    width = work.shape[1]
    for start in range(0, width, block_size):
        stop = min(start + block_size, width)
        errors = torch.empty((len(work), stop - start), dtype=torch.float32, device=work.device)
        for column in range(start, stop):
            lost = work[:, column].masked_fill(keep[:, column], 0)
            error = lost / factor[column, column]
            work[:, column] -= lost
            work[:, column + 1 : stop] -= error[:, None] * factor[column, column + 1 : stop]
            errors[:, column - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work.masked_fill_(~keep, 0)


def conjugate_gradients(
    dense: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    *,
    start: torch.Tensor | None = None,
    dampening: float = 0.01,
    iterations: int = 10,
    tolerance: float = 1e-3,
) -> torch.Tensor:
    """Least-squares weights on the mask: the kept weights whose outputs come closest to the dense layer's.

    Each row is a problem of its own, and rows are solved together, some at a time, by conjugate gradients
    preconditioned with the diagonal, from the dense values of what is kept or from other ones. Every iteration lowers
    every row's dampened error.

    Args:
        dense: [d_out, d_in], any floating dtype.
        keep: bool [d_out, d_in], False where the result must be zero.
        gram: [d_in, d_in], X^T X up to a positive factor, symmetric; not changed.
        start: [d_out, d_in], the values to start from, of which those outside the mask count as zero; not changed.
        dampening: added to the diagonal of `gram`, as a fraction of its mean.
        iterations: at most so many; each costs a product of `dense` and `gram`.
        tolerance: a row is done when its preconditioned residual has shrunk to this fraction.

    Returns:
        fp32 [d_out, d_in].

    Raises:
        ValueError: if the shapes do not fit.

    Source: the refinement on a fixed support of ALPS, arXiv 2406.07831; step lengths for each row are ours.
    """
    _check(dense, keep, gram)
    if start is not None:
        _check(start, keep, None)
    hessian, original = Symmetric(_dampened(gram, dampening)), dense.float()
    solution = (original if start is None else start.float()).masked_fill(~keep, 0)
    for rows in row_blocks(solution):
        _descend(solution[rows], original[rows], ~keep[rows], hessian, iterations, tolerance)
    return solution


def _descend(
    solution: torch.Tensor,
    dense: torch.Tensor,
    pruned: torch.Tensor,
    hessian: Symmetric,
    iterations: int,
    tolerance: float,
) -> None:
    """The iterations of :func:`conjugate_gradients` on some rows, which change `solution`."""
    inverse = hessian.diagonal.reciprocal()
    residual = hessian.times(dense - solution, out=torch.empty_like(solution)).masked_fill_(pruned, 0)
    direction = residual * inverse
    size = (residual * direction).sum(dim=1, keepdim=True)
    target = size * tolerance**2
    image, scratch = torch.empty_like(direction), torch.empty_like(direction)
    for _ in range(iterations):
        # A row that is done keeps still: further steps would only divide rounding errors by each other.
        active = size > target
        if not bool(active.any()):
            break
        hessian.times(direction, out=image).masked_fill_(pruned, 0)
        curvature = torch.mul(direction, image, out=scratch).sum(dim=1, keepdim=True)
        step = torch.where(active & (curvature > 0), size / curvature, 0)
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        preconditioned = torch.mul(residual, inverse, out=image)
        following = torch.mul(residual, preconditioned, out=scratch).sum(dim=1, keepdim=True)
        direction.mul_(torch.where(active, following / size, 0)).add_(preconditioned)
        size = torch.where(active, following, size)


def _dampened(gram: torch.Tensor, dampening: float) -> torch.Tensor:
    hessian = gram.float().clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    # A channel that is never active; nothing depends on its weights.
    diagonal[diagonal == 0] = 1
    diagonal += dampening * mean
    return hessian


def _check(dense: torch.Tensor, other: torch.Tensor, gram: torch.Tensor | None) -> None:
    columns = dense.shape[-1]
    if dense.dim() != 2 or other.shape != dense.shape:
        raise ValueError(
            f"the dense weight {list(dense.shape)} and what goes with it {list(other.shape)} must both be [d_out, d_in]"
        )
    if gram is not None and gram.shape != (columns, columns):
        raise ValueError(
            f"gram must be [d_in, d_in], [{columns}, {columns}] for a weight {list(dense.shape)}, "
            f"got {list(gram.shape)}"
        )
