"""Products with a symmetric matrix, in which solvers spend their time, and its factors, in which they hold memory."""

import functools
from pathlib import Path

import torch

__all__ = ["Symmetric", "cholesky_in_place", "inverse_in_place"]

# Fewer channels are multiplied as torch does it: there is nothing to gain.
_LARGE = 512


class Symmetric:
    """A symmetric matrix that many rows are multiplied with.

    torch multiplies fp32 on CPUs by MKL, which on AMD's processors reaches less than half of their speed; there a large
    matrix is kept as oneDNN wants it. Results differ by rounding.

    Args:
        matrix: fp32 [n, n]; not changed.

    Attributes:
        diagonal: fp32 [n].
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        by_onednn = matrix.device.type == "cpu" and len(matrix) >= _LARGE and _mkl_is_slow()
        self._matrix = matrix.to_mkldnn() if by_onednn else matrix
        self.diagonal = matrix.diagonal().clone()

    def times(self, rows: torch.Tensor, *, out: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        """`rows` [m, n] times the matrix, plus `add` if it is given, written to `out`; all fp32 [m, n]."""
        if self._matrix.is_mkldnn:
            product = torch.nn.functional.linear(rows.contiguous().to_mkldnn(), self._matrix).to_dense()
            return out.copy_(product) if add is None else torch.add(product, add, out=out)
        if add is None:
            return torch.mm(rows, self._matrix, out=out)
        return torch.addmm(add, rows, self._matrix, out=out)


def cholesky_in_place(matrix: torch.Tensor, *, upper: bool = False) -> torch.Tensor:
    """The Cholesky factor of a matrix, in the memory of that.

    Args:
        matrix: [n, n], contiguous, symmetric and positive definite; overwritten.
        upper: whether the upper factor U, with U^T U the matrix, is wanted, instead of the lower L, with L L^T.

    Returns:
        [n, n], a view of `matrix`: its transpose, as the routine wants columns in one piece.

    Raises:
        torch.linalg.LinAlgError: if the matrix is not positive definite.
    """
    factor = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(factor, upper=upper, check_errors=True, out=(factor, info))
    return factor


def inverse_in_place(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of a matrix, in the memory of that; its argument and errors are :func:`cholesky_in_place`'s."""
    factor = cholesky_in_place(matrix)
    return torch.cholesky_inverse(factor, out=factor).mT


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether fp32 is multiplied by MKL on a processor of AMD's."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
