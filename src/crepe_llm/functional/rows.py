"""A matrix in blocks of rows, for work that goes over each block several times while the processor's cache holds it."""

from collections.abc import Iterator

import torch

__all__ = ["row_blocks"]

# In fp32 with a few temporaries of the size, what the last cache of a processor holds.
_ELEMENTS = 1 << 20


def row_blocks(matrix: torch.Tensor, elements: int | None = None) -> Iterator[slice]:
    """Slices of the rows of a matrix [n, m] that cover it in order, each of at most so many elements or one row.

    Where `elements` is left out, as many as a CPU's cache holds, and on other devices all of them.
    """
    rows, columns = matrix.shape
    if elements is None:
        elements = _ELEMENTS if matrix.device.type == "cpu" else matrix.numel()
    step = max(1, elements // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))
