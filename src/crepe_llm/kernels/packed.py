"""2:4 weights taken apart into kept values and columns; the CPU kernels' layout of them, and the way back.

A weight [N, K] is cut into blocks of 16 rows and, within a block, into chunks of 32 columns (8 groups of 4). N and K
are padded with zeros to whole blocks and chunks. A chunk is contiguous and chunks of a block follow each other, so a
row block is one sequential stream of bytes. A chunk holds, little-endian:

======== ================ =======================================================================================
bytes    content          order
======== ================ =======================================================================================
64       metadata         16 x uint32: one word a row, 2 bits a kept value
the rest kept values      [kept values / lane][row 16][lane]: ``lane`` kept values of a row side by side
======== ================ =======================================================================================

The lane is 2 for bf16 (the two kept values of a group), 1 for fp16 and fp32, and 4 for int8 (those of two groups).

In the metadata word the column (0 to 3, within its group) of kept value ``v`` of group ``g`` is at bits ``4 g + 2 v``;
for int8, of kept value ``v`` (0 to 3) of pair of groups ``p``, at bits ``8 v + 2 p``, so that one shift and one mask
spread the four over the four bytes of a lane. Two bits can only name a column of their own group: whatever the metadata
says, a kernel reads no activation outside the group. The layout is ours; what differs between formats is in
:mod:`crepe_llm.kernels.formats`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from crepe_llm.functional.bitmask import kept_columns, wrong_byte
from crepe_llm.functional.masks import nonzero
from crepe_llm.kernels import checks
from crepe_llm.kernels.formats import COLUMN_CHUNK, FORMATS, METADATA_BYTES, ROW_BLOCK, Format, format_of
from crepe_llm.kernels.memory import on_huge_pages

# Bit patterns move as integers: torch has few operations on float8.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

_GROUPS = COLUMN_CHUNK // 4


class Kept(NamedTuple):
    """A 2:4 weight taken apart: kept values [N, K / 4, 2] and their columns in the group (uint8, ascending)."""

    values: torch.Tensor
    columns: torch.Tensor
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        """The dense (N, K)."""
        return (self.values.shape[0], 4 * self.values.shape[1])

    def widened(self) -> "Kept":
        """The same weight in the format that holds all values of its own exactly; it has one."""
        assert self.format.wider is not None
        wider = FORMATS[self.format.wider]
        return Kept(self.values.to(wider.dtype), self.columns, wider)


@dataclass(frozen=True)
class Inputs:
    """How activations are quantized before the product: to ``dtype`` (int8 or float8_e4m3fn), divided by ``scale``.

    ``scale`` None: one scale a token, found at run time.
    """

    dtype: torch.dtype
    scale: float | None = None


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A 2:4 weight in the CPU kernels' layout; made by :func:`crepe_llm.kernels.pack`.

    ``data`` is the layout's bytes (uint8, flat), ``shape`` the dense (N, K), ``scale`` the format's fp32 scales ([N],
    they multiply the outputs), or None, and ``inputs`` how activations are quantized, or None (the int8 kernel
    quantizes them itself, one scale a token).

    Raises ValueError or TypeError where the tensors are not those of such a weight.
    """

    data: torch.Tensor
    shape: tuple[int, int]
    format: Format
    scale: torch.Tensor | None = None
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        (n, k), form = self.shape, self.format
        form.check_shape(n, k)
        checks.part(f"packed data of {n} x {k} {form.name}", self.data, (packed_bytes(n, k, form),), (torch.uint8,))
        checks.part("scale", self.scale, form.scale_shape(n, k), (torch.float32,))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.data,) if self.scale is None else (self.data, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the packed weight takes."""
        return self.data.numel() + (self.scale.nbytes if self.scale is not None else 0)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A dense weight [N, K] (bf16, fp16, fp32 or int8, contiguous) for :func:`crepe_llm.kernels.linear`.

    The tensor is kept as it is, not copied: an embedding can share it. ``scale`` (fp32 [N]) multiplies the outputs; an
    int8 weight has one. Activations are not quantized.

    Raises TypeError for another dtype and ValueError when ``weight`` is no contiguous matrix or ``scale`` does not fit.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(self.weight.shape)}; a matrix [N, K] is needed")
        checks.part("weight", self.weight, self.weight.shape, (*checks.ACTIVATIONS, torch.int8))
        checks.part("scale", self.scale, self.weight.shape[:1], (torch.float32,))
        if self.scale is None and self.dtype == torch.int8:
            raise ValueError("weight is int8 and has no scale; one for each row is needed")

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,) if self.scale is None else (self.weight, self.scale)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def packed_bytes(n: int, k: int, form: Format) -> int:
    """Bytes of the layout of a weight [n, k]."""
    return -(-n // ROW_BLOCK) * -(-k // COLUMN_CHUNK) * form.chunk_bytes


def split(weight: torch.Tensor) -> Kept:
    """Takes a dense 2:4 weight [N, K] apart.

    Raises ValueError when a group holds more than two non-zero values or when K is no positive multiple of 4;
    TypeError for a dtype without a format.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a matrix [N, K] is needed")
    n, k = weight.shape
    form = format_of(weight.dtype)
    form.check_shape(n, k)
    weight = weight.resolve_neg()
    kept = nonzero(weight).reshape(n, k // 4, 4)
    surplus = (kept.sum(-1, dtype=torch.uint8) > 2).nonzero()
    if surplus.numel():
        row, group = surplus[0].tolist()
        raise ValueError(
            f"weight is not 2:4: row {row}, columns {4 * group} to {4 * group + 3} hold "
            f"{int(kept[row, group].sum())} non-zero values; prune it with mask_structure 2:4"
        )
    # Two columns a group: the non-zero ones first, then zeros, in ascending order.
    columns = torch.sort(kept.to(torch.uint8), dim=-1, descending=True, stable=True).indices[..., :2].sort(-1).values
    groups = weight.reshape(n, k // 4, 4).view(INTEGERS[weight.element_size()])
    return Kept(groups.gather(-1, columns).view(weight.dtype), columns.to(torch.uint8), form)


def split_compressed(compressed: torch.Tensor, bitmask: torch.Tensor, shape: tuple[int, int] | torch.Tensor) -> Kept:
    """:func:`split` from the tensors of ``sparse-24-bitmask``, without making the weight dense.

    ``compressed`` is [N, K / 2], ``bitmask`` uint8 [N, ceil(K / 8)] with bit j of byte b set iff column 8 b + j is
    kept, ``shape`` the dense (N, K) (also as a tensor of two values).

    Raises ValueError when the shapes disagree, when a group of the bitmask does not have exactly two bits set, or when
    bits beyond column K are set; TypeError for a dtype without a format.
    """
    n, k = (int(s) for s in (shape.flatten().tolist() if isinstance(shape, torch.Tensor) else shape))
    form = format_of(compressed.dtype)
    form.check_shape(n, k)
    compressed, bitmask = compressed.resolve_neg(), bitmask.resolve_neg()
    if bitmask.dtype != torch.uint8:
        raise TypeError(f"bitmask has dtype {bitmask.dtype}; torch.uint8 is needed")
    if tuple(compressed.shape) != (n, k // 2):
        raise ValueError(f"compressed has shape {tuple(compressed.shape)}; shape ({n}, {k}) needs ({n}, {k // 2})")
    if tuple(bitmask.shape) != (n, -(-k // 8)):
        raise ValueError(f"bitmask has shape {tuple(bitmask.shape)}; shape ({n}, {k}) needs ({n}, {-(-k // 8)})")
    wrong = wrong_byte(bitmask, k)
    if wrong is not None:
        raise ValueError(_damage(bitmask, k, *wrong))
    return Kept(compressed.reshape(n, k // 4, 2), kept_columns(bitmask, k), form)


def _damage(bitmask: torch.Tensor, k: int, row: int, byte: int) -> str:
    """What is wrong with a byte that is not two-of-four."""
    value = int(bitmask[row, byte])
    for group, nibble in ((2 * byte, value & 15), (2 * byte + 1, value >> 4)):
        if 4 * group >= k:
            break
        if nibble.bit_count() != 2:
            return (
                f"bitmask keeps {nibble.bit_count()} of columns {4 * group} to {4 * group + 3} of row {row}; 2:4 needs "
                "exactly 2, the checkpoint is damaged"
            )
    return f"bitmask sets bits beyond column {k - 1} in row {row}; the checkpoint is damaged"


def pack_dense(weight: torch.Tensor, scale: torch.Tensor | None = None) -> DenseWeight:
    """Wraps a dense weight [N, K] (bf16, fp16, fp32 or int8) for :func:`crepe_llm.kernels.linear`; it is not copied.

    ``scale`` ([N] or [N, 1]) multiplies the outputs; an int8 weight needs one.

    Raises TypeError for another dtype and ValueError when ``weight`` is no contiguous matrix or ``scale`` does not fit.
    """
    if scale is not None:
        scale = scale.detach().to(torch.float32).reshape(-1).contiguous()
    return DenseWeight(weight, scale)


def deinterleave(packed: PackedWeight) -> torch.Tensor:
    """The dense weight [N, K] of the CPU kernels' layout, bit for bit what was packed (without the scale)."""
    form, (n, k) = packed.format, packed.shape
    rows, chunks = -(-n // ROW_BLOCK), -(-k // COLUMN_CHUNK)
    data = packed.data.view(rows, chunks, form.chunk_bytes)
    words = data[..., :METADATA_BYTES].contiguous().view(torch.int32)  # [rows, chunks, 16]
    bits = (words[..., None] >> torch.tensor(form.column_shifts, dtype=torch.int32, device=words.device)) & 3
    columns = bits.transpose(1, 2).reshape(rows * ROW_BLOCK, chunks * _GROUPS, 2)
    lanes = data[..., METADATA_BYTES:].contiguous().view(_lane_integer(form))
    ordered = lanes.view(rows, chunks, -1, ROW_BLOCK).permute(0, 3, 1, 2).contiguous()
    values = ordered.view(form.dtype).reshape(rows * ROW_BLOCK, chunks * _GROUPS, 2)
    dense = torch.zeros(*values.shape[:2], 4, dtype=form.dtype, device=values.device)
    dense.scatter_(-1, columns.long(), values)
    return dense.view(rows * ROW_BLOCK, -1)[:n, :k].contiguous()


def interleave(kept: Kept, scale: torch.Tensor | None = None, inputs: Inputs | None = None) -> PackedWeight:
    """The CPU kernels' layout of a weight whose format they know."""
    values, columns, form = kept
    n, k = kept.shape
    rows, chunks = -(-n // ROW_BLOCK), -(-k // COLUMN_CHUNK)
    padding = (0, 0, 0, chunks * _GROUPS - k // 4, 0, rows * ROW_BLOCK - n)
    if any(padding):
        values = torch.nn.functional.pad(values, padding)
        # Padded values are zero, so that their columns do not matter: (0, 0) is as good as (0, 1).
        columns = torch.nn.functional.pad(columns, padding)
    data = on_huge_pages(torch.empty(rows, chunks, form.chunk_bytes, dtype=torch.uint8, device=values.device))
    words = torch.zeros(rows * ROW_BLOCK, chunks, dtype=torch.int32, device=values.device)
    by_chunk = columns.view(rows * ROW_BLOCK, chunks, 2 * _GROUPS)
    for value, shift in enumerate(form.column_shifts):
        words |= by_chunk[:, :, value].to(torch.int32) << shift
    metadata = words.view(rows, ROW_BLOCK, chunks).transpose(1, 2).contiguous()
    data[..., :METADATA_BYTES] = metadata.view(torch.uint8).view(rows, chunks, METADATA_BYTES)
    lanes = values.contiguous().view(rows, ROW_BLOCK, chunks, 2 * _GROUPS).view(_lane_integer(form))
    ordered = lanes.permute(0, 2, 3, 1)
    data[..., METADATA_BYTES:] = ordered.contiguous().view(torch.uint8).view(rows, chunks, -1)
    return PackedWeight(data.view(-1), (n, k), form, scale, inputs)


def _lane_integer(form: Format) -> torch.dtype:
    """An integer as wide as a lane: its values move together."""
    return INTEGERS[form.lane * form.bits // 8]


def fitted_scale(scale: torch.Tensor | None, kept: Kept) -> torch.Tensor | None:
    """A weight's scales, one value or one for each place of the format's scale layout, as fp32 in that layout.

    Raises ValueError when ``scale`` has another number of values.
    """
    if scale is None:
        return None
    shape = kept.format.scale_shape(*kept.shape)
    if scale.numel() not in (1, math.prod(shape)):
        raise ValueError(f"scale has shape {tuple(scale.shape)}; one value or one for each of {shape} is needed")
    scale = scale.detach().resolve_neg().to(kept.values.device, torch.float32)
    return (scale.reshape(()).expand(shape) if scale.numel() == 1 else scale.reshape(shape)).contiguous()
