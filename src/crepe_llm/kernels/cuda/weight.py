"""A 2:4 weight on a GPU: kept values with 2-bit columns, and what the libraries need for sparse tensor cores.

The columns are one int32 word for 8 groups of 4 (32 columns) of a row, little-endian: kept value ``v`` of group ``g``
at bits ``4 g + 2 v``. CUTLASS wants the same bits in another order: :func:`cutlass_metadata` and its inverse.
"""

from dataclasses import dataclass

import torch

from crepe_llm.kernels import checks
from crepe_llm.kernels.formats import Format
from crepe_llm.kernels.packed import INTEGERS, Inputs

_WORD_GROUPS = 8


@dataclass(frozen=True, eq=False)
class CudaWeight:
    """A 2:4 weight for the GPU products; made by :func:`crepe_llm.kernels.pack` from tensors on a GPU.

    ``shape`` is the dense (N, K), ``scale`` the format's fp32 scales ([N], they multiply the outputs), or None, and
    ``inputs`` how activations are quantized, or None. Each of the other tensors is there where a
    product that was chosen needs it:

    - ``values`` [N, K / 2], the kept values row by row, and ``metadata`` int32 [N, ceil(K / 32)], their columns
    - ``cutlass``: the same columns in CUTLASS's order
    - ``cusparselt``: cuSPARSELt's own compressed tensor, of which ``values`` may be a view
    - ``dense`` [N, K]

    Raises ValueError or TypeError where one of them is not of such a weight.
    """

    shape: tuple[int, int]
    format: Format
    values: torch.Tensor | None = None
    metadata: torch.Tensor | None = None
    cutlass: torch.Tensor | None = None
    cusparselt: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        (n, k), form = self.shape, self.format
        form.check_shape(n, k)
        checks.part("values", self.values, (n, k // 2), (form.dtype,))
        checks.part("metadata", self.metadata, metadata_shape(n, k), (torch.int32,))
        checks.part("dense", self.dense, (n, k), (form.dtype,))
        checks.part("scale", self.scale, form.scale_shape(n, k), (torch.float32,))
        # The libraries check the shapes of what they made themselves; these are the sizes that no product may exceed.
        if self.cutlass is not None and self.cutlass.nbytes * 8 < n * k:
            raise ValueError(f"cutlass has {self.cutlass.nbytes} bytes; a weight {n} x {k} needs {-(-n * k // 8)}")
        if self.cusparselt is not None and self.cusparselt.numel() * 2 < n * k:
            raise ValueError(f"cusparselt has {self.cusparselt.numel()} elements; a weight {n} x {k} has more")

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        parts = (self.values, self.metadata, self.cutlass, self.cusparselt, self.dense, self.scale)
        return tuple(tensor for tensor in parts if tensor is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(storages.values())


def metadata_shape(n: int, k: int) -> tuple[int, int]:
    """The shape of the ``metadata`` of a weight [n, k]."""
    return n, -(-k // (4 * _WORD_GROUPS))


def metadata_words(columns: torch.Tensor) -> torch.Tensor:
    """int32 [N, ceil(K / 32)] from the kept values' columns in their group (uint8 [N, K / 4, 2], ascending)."""
    n, groups = columns.shape[:2]
    words = -(-groups // _WORD_GROUPS)
    nibbles = columns[..., 0] | columns[..., 1] << 2
    nibbles = torch.nn.functional.pad(nibbles, (0, words * _WORD_GROUPS - groups)).view(n, words * 4, 2)
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32)


def columns_of(metadata: torch.Tensor, k: int) -> torch.Tensor:
    """uint8 [N, K / 4, 2]: the inverse of :func:`metadata_words`."""
    data = metadata.contiguous().view(torch.uint8)
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).view(metadata.shape[0], -1)[:, : k // 4]
    return torch.stack((nibbles & 3, nibbles >> 2), dim=-1)


def to_dense(weight: CudaWeight) -> torch.Tensor:
    """The dense weight [N, K], bit for bit what was packed (without the scale)."""
    if weight.dense is not None:
        return weight.dense
    assert weight.values is not None and weight.metadata is not None
    n, k = weight.shape
    integer = INTEGERS[weight.format.dtype.itemsize]
    dense = torch.zeros(n, k // 4, 4, dtype=integer, device=weight.values.device)
    columns = columns_of(weight.metadata, k).long()
    dense.scatter_(-1, columns, weight.values.contiguous().view(integer).view(n, k // 4, 2))
    return dense.view(n, k).view(weight.format.dtype)


def cutlass_metadata(metadata: torch.Tensor, form: Format) -> torch.Tensor:
    """``metadata`` in the order that ``torch._sparse_semi_structured_mm`` reads.

    int16 [N, K / 16] for formats of 16 bits (N % 32 == 0, K % 64 == 0), int32 [N, K / 32] for those of 8 (N % 16 == 0,
    K % 64 == 0); the bits are those of ``torch.sparse.SparseSemiStructuredTensorCUTLASS.meta``.
    """
    if form.bits == 8:  # rows: 16 as [a 2][b 8] -> [b][a]; then a changes places with the column's parity
        n, width = metadata.shape
        blocks = metadata.view(n // 16, 2, 8, width // 2, 2).permute(3, 0, 2, 4, 1)
    else:  # rows: 32 as [c 2][a 2][b 8] -> [b][c][a]; likewise
        meta = metadata.contiguous().view(torch.int16)
        n, width = meta.shape
        blocks = meta.view(n // 32, 2, 2, 8, width // 2, 2).permute(4, 0, 3, 1, 5, 2)
    return blocks.reshape(n, width)


def from_cutlass_metadata(meta: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`cutlass_metadata`: int32 [N, K / 32]."""
    n, width = meta.shape
    if meta.dtype == torch.int32:
        blocks = meta.view(width // 2, n // 16, 8, 2, 2).permute(1, 4, 2, 0, 3)
    else:
        blocks = meta.view(width // 2, n // 32, 8, 2, 2, 2).permute(1, 3, 5, 2, 0, 4)
    return blocks.reshape(n, width).view(torch.int32)
