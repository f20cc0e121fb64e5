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

The lane is 2 for bf16 (the two kept values of a group), 1 for fp16 and fp32, 4 for int8 (those of two groups), and 8
for int4 (those of four groups: a word whose lower half has the first kept value of each, 4 bits a value, whose upper
half has the second). Scales of groups of columns and int4's zero points lie beside the chunks, each
[row block][group of columns][row 16].

In the metadata word the column (0 to 3, within its group) of kept value ``v`` of group ``g`` is at bits ``4 g + 2 v``;
for int8, of kept value ``v`` (0 to 3) of pair of groups ``p``, at bits ``8 v + 2 p``, so that one shift and one mask
spread the four over the four bytes of a lane. Two bits can only name a column of their own group: whatever the metadata
says, a kernel reads no activation outside the group. The layout is ours; what differs between formats is in
:mod:`crepe_llm.kernels.formats`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
# Weights that are taken apart or laid out at once, so that what is computed meanwhile stays small beside the weight.
_SPLIT = 1 << 20
# An int32 of four bytes that are 0 or 1, times this: bit 24 + i is byte i.
_GATHER_BITS = 1 << 24 | 1 << 17 | 1 << 10 | 1 << 3


def _columns_of(nibble: int) -> list[int]:
    """The columns whose bits are set in a nibble, filled up to two by the first others; 4 where more are set."""
    columns = sorted(range(4), key=lambda column: not nibble >> column & 1)
    return [4, 4] if nibble.bit_count() > 2 else sorted(columns[:2])


# Two columns, a byte each, are looked up as one integer.
_COLUMNS_OF = torch.tensor([_columns_of(nibble) for nibble in range(16)], dtype=torch.uint8).view(torch.int16).flatten()


class Kept(NamedTuple):
    """A 2:4 weight taken apart: kept values [N, K / 4, 2] and their columns in the group (uint8, ascending)."""

    values: torch.Tensor
    columns: torch.Tensor
    format: Format

    @property
    def shape(self) -> tuple[int, int]:
        """The dense (N, K)."""
        return (self.values.shape[0], 4 * self.values.shape[1])

    def held_as(self, name: str | None) -> "Kept":
        """The same weight in the format ``name``, which holds all values of its own exactly."""
        assert name is not None
        form = FORMATS[name]
        return Kept(self.values.to(form.dtype), self.columns, form)


@dataclass(frozen=True)
class Inputs:
    """How activations are quantized before the product: to ``dtype`` (int8 or float8_e4m3fn), divided by ``scale``.

    ``scale`` None: one scale a token, found at run time.
    """

    dtype: torch.dtype
    scale: float | None = None


class Operands(NamedTuple):
    """What each call of a CPU kernel needs of a weight, looked up once: its tensors and where they are. Their sizes are
    asked at each call, as `resize_` and `set_` change them."""

    data: torch.Tensor
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    on_cpu: bool

    @classmethod
    def of(cls, data: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None) -> "Operands":
        return cls(data, scale, zero, all(tensor is None or tensor.is_cpu for tensor in (data, scale, zero)))


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A 2:4 weight in the CPU kernels' layout; made by :func:`crepe_llm.kernels.pack`.

    ``data`` is the layout's bytes (uint8, flat), ``shape`` the dense (N, K), ``scale`` the format's scales (fp32 [N],
    they multiply the outputs; for groups of columns bf16, fp16 or fp32 [row blocks, groups, 16]), or None, ``inputs``
    how activations are quantized, or None (the int8 kernel quantizes them itself, one scale a token), and ``zero`` the
    zero points of codes (uint8 [row blocks, groups, 16]), or None: all are the format's.

    Raises ValueError or TypeError where the tensors are not those of such a weight.
    """

    data: torch.Tensor
    shape: tuple[int, int]
    format: Format
    scale: torch.Tensor | None = None
    inputs: Inputs | None = None
    zero: torch.Tensor | None = None

    def __post_init__(self) -> None:
        (n, k), form = self.shape, self.format
        form.check_shape(n, k)
        checks.part(f"packed data of {n} x {k} {form.name}", self.data, (packed_bytes(n, k, form),), (torch.uint8,))
        if form.scale_group is not None and self.scale is None:
            raise ValueError(f"scale is None; a {form.name} weight needs one for each group of columns")
        if form.zero_point is None and self.zero is not None:
            raise ValueError(
                f"zero has shape {tuple(self.zero.shape)}; {form.name} weights need None: they have no codes"
            )
        dtypes = (torch.float32,) if form.scale_group is None else checks.ACTIVATIONS
        checks.part("scale", self.scale, form.packed_scale_shape(n, k), dtypes)
        checks.part("zero", self.zero, form.zero_shape(n, k), (torch.uint8,))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for tensor in (self.data, self.scale, self.zero) if tensor is not None)

    @cached_property
    def operands(self) -> "Operands":
        return Operands.of(self.data, self.scale, self.zero)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the packed weight takes."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The 2:4 weights of ``count`` experts, all of the dense shape (N, K), in the CPU kernels' layout.

    ``data`` is the bytes of one after the other (uint8, flat), ``scale`` their fp32 scales ([count, N], they multiply
    the outputs), or None. Made by :func:`crepe_llm.kernels.experts.pack_experts`.

    Raises ValueError or TypeError where the tensors are not those of such weights.
    """

    data: torch.Tensor
    count: int
    shape: tuple[int, int]
    format: Format
    scale: torch.Tensor | None = None

    def __post_init__(self) -> None:
        (n, k), form = self.shape, self.format
        form.check_shape(n, k)
        if self.count < 1:
            raise ValueError(f"count is {self.count}; at least one expert is needed")
        if form.zero_point is not None:
            raise ValueError(
                f"experts are {form.name}, which has no grouped product; bf16, fp16, fp32 or int8 is needed"
            )
        if form.code is None:
            raise ValueError(f"the CPU has no kernel for {form.name} weights; crepe_llm.kernels.pack widens them")
        name = f"packed data of {self.count} x {n} x {k} {form.name}"
        checks.part(name, self.data, (self.count * packed_bytes(n, k, form),), (torch.uint8,))
        checks.part("scale", self.scale, (self.count, *form.scale_shape(n, k)), (torch.float32,))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.data,) if self.scale is None else (self.data, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the packed weights take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __getitem__(self, expert: int) -> PackedWeight:
        """The weight of one expert; its tensors are views."""
        data = self.data.view(self.count, -1)[expert]
        return PackedWeight(data, self.shape, self.format, None if self.scale is None else self.scale[expert])


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A dense weight [N, K] (bf16, fp16, fp32 or int8, contiguous) for :func:`crepe_llm.kernels.linear`.

    The tensor is kept as it is, not copied: an embedding can share it. ``scale`` (fp32 [N]) multiplies the outputs; an
    int8 weight has one. ``inputs`` says how an int8 weight's activations are quantized, as in
    :func:`crepe_llm.kernels.pack_dense`.

    Raises TypeError for another dtype and ValueError when ``weight`` is no contiguous matrix, ``scale`` does not fit or
    ``inputs`` is another.
    """

    weight: torch.Tensor
    scale: torch.Tensor | None = None
    inputs: str = "exact"

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ValueError(f"weight has shape {tuple(self.weight.shape)}; a matrix [N, K] is needed")
        checks.part("weight", self.weight, self.weight.shape, (*checks.ACTIVATIONS, torch.int8))
        checks.part("scale", self.scale, self.weight.shape[:1], (torch.float32,))
        if self.scale is None and self.dtype == torch.int8:
            raise ValueError("weight is int8 and has no scale; one for each row is needed")
        if self.inputs not in (("exact", "lanes") if self.dtype == torch.int8 else ("exact",)):
            known = "'exact' or 'lanes'" if self.dtype == torch.int8 else "'exact'"
            raise ValueError(f"inputs={self.inputs!r}; of dense {self.dtype} weights {known} is needed")

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.weight,) if self.scale is None else (self.weight, self.scale)

    @cached_property
    def operands(self) -> "Operands":
        return Operands.of(self.weight, self.scale, None)

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
    columns = _two_columns(nonzero(weight))
    groups = weight.reshape(n, k // 4, 4).view(INTEGERS[weight.element_size()])
    return Kept(groups.gather(-1, columns.long()).view(weight.dtype), columns, form)


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """The 4-bit values of contiguous integers, the lowest bits first: uint8 [..., 8 for an int32]."""
    pairs = words.view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def _of_columns(of_groups: torch.Tensor, form: Format, k: int) -> torch.Tensor:
    """What each column of a row has, [N, K], of what each of the row's scale groups has, [N, groups]."""
    if form.scale_group is None:
        return of_groups.expand(-1, k)
    return of_groups.repeat_interleave(form.scale_group, 1)[:, :k]


def _two_columns(kept: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """The columns (0 to 3) of the two values that each group of 4 keeps, ascending: uint8 [N, K / 4, 2].

    ``kept`` bool [N, K]; zeros, in ascending order, fill up where it has fewer. Raises ValueError where it has more;
    the message counts rows from ``first_row``.
    """
    # The four bools of a group are the bytes of an int32; the product has their bits side by side in its highest byte.
    nibbles = (kept.contiguous().view(torch.int32) * _GATHER_BITS >> 24) & 15
    found = _COLUMNS_OF.to(kept.device).index_select(0, nibbles.flatten())
    columns = found.view(torch.uint8).view(*nibbles.shape, 2)
    surplus = (columns[..., 0] > 3).nonzero()
    if surplus.numel():
        row, group = surplus[0].tolist()
        raise ValueError(
            f"weight is not 2:4: row {first_row + row}, columns {4 * group} to {4 * group + 3} hold "
            f"{int(kept[row, 4 * group : 4 * group + 4].sum())} non-zero values; prune it with mask_structure 2:4"
        )
    return columns


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


def pack_dense(weight: torch.Tensor, scale: torch.Tensor | None = None, inputs: str = "exact") -> DenseWeight:
    """Wraps a dense weight [N, K] (bf16, fp16, fp32 or int8) for :func:`crepe_llm.kernels.linear`; it is not copied.

    ``scale`` ([N] or [N, 1]) multiplies the outputs; an int8 weight needs one. ``inputs`` "exact": activations are not
    quantized; "lanes", of int8 weights: they may be, to int8, symmetrically, one scale for 16 columns of a token
    (:func:`crepe_llm.kernels.reference.quantize_per_lane`), and are where that is faster: for up to 256 tokens, on
    processors with AVX-512 VNNI (docs/kernels.md).

    Raises TypeError for another dtype and ValueError when ``weight`` is no contiguous matrix, ``scale`` does not fit or
    ``inputs`` is another.
    """
    if scale is not None:
        scale = scale.detach().to(torch.float32).reshape(-1).contiguous()
    return DenseWeight(weight, scale, inputs)


def deinterleave(packed: PackedWeight) -> torch.Tensor:
    """The dense weight [N, K] of the CPU kernels' layout, bit for bit what was packed (without the scale).

    Of codes: int8, less their zero points.
    """
    form, (n, k) = packed.format, packed.shape
    rows, chunks = -(-n // ROW_BLOCK), -(-k // COLUMN_CHUNK)
    data = packed.data.view(rows, chunks, form.chunk_bytes)
    words = data[..., :METADATA_BYTES].contiguous().view(torch.int32)  # [rows, chunks, 16]
    bits = (words[..., None] >> torch.tensor(form.column_shifts, dtype=torch.int32, device=words.device)) & 3
    columns = bits.transpose(1, 2).reshape(rows * ROW_BLOCK, chunks * _GROUPS, 2)
    lanes = data[..., METADATA_BYTES:].contiguous().view(_lane_integer(form))
    ordered = lanes.view(rows, chunks, -1, ROW_BLOCK).permute(0, 3, 1, 2).contiguous()
    values = _from_lanes(ordered, form).reshape(rows * ROW_BLOCK, chunks * _GROUPS, 2)
    if form.zero_point is not None:
        values = values.to(torch.int8) - _zeros_of_kept(packed)
    dense = torch.zeros(*values.shape[:2], 4, dtype=values.dtype, device=values.device)
    dense.scatter_(-1, columns.long(), values)
    return dense.view(rows * ROW_BLOCK, -1)[:n, :k].contiguous()


def _zeros_of_kept(packed: PackedWeight) -> torch.Tensor | int:
    """The zero points int8 [16 x row blocks, groups of 4 columns, 1] of a weight of codes, or the one that all have."""
    form = packed.format
    if packed.zero is None:
        assert form.zero_point is not None
        return form.zero_point
    by_row = packed.zero.to(torch.int8).transpose(1, 2).flatten(0, 1)
    columns = -(-packed.shape[1] // COLUMN_CHUNK) * COLUMN_CHUNK
    return _of_columns(by_row, form, columns)[:, ::4, None]


def column_scales(packed: PackedWeight) -> torch.Tensor:
    """The fp32 scales [N, K] of a weight whose groups of columns have scales."""
    assert packed.scale is not None
    n, k = packed.shape
    by_row = packed.scale.float().transpose(1, 2).flatten(0, 1)
    return _of_columns(by_row, packed.format, k)[:n]


def interleave(
    kept: Kept, scale: torch.Tensor | None = None, inputs: Inputs | None = None, zero: torch.Tensor | None = None
) -> PackedWeight:
    """The CPU kernels' layout of a weight whose format they know; ``scale`` and ``zero`` lie as there."""
    form, (n, k) = kept.format, kept.shape
    data = _empty_layout(n, k, form, kept.values.device)
    step = _rows_at_once(k)
    for row in range(0, n, step):
        _write_blocks(data, row, kept.values[row : row + step], kept.columns[row : row + step], form)
    return PackedWeight(data.view(-1), (n, k), form, scale, inputs, zero)


def _empty_layout(n: int, k: int, form: Format, device: torch.device) -> torch.Tensor:
    """Memory for the layout of a weight: uint8 [row blocks, chunks, bytes of a chunk]."""
    shape = (-(-n // ROW_BLOCK), -(-k // COLUMN_CHUNK), form.chunk_bytes)
    return on_huge_pages(torch.empty(shape, dtype=torch.uint8, device=device))


def _rows_at_once(k: int) -> int:
    """Rows of whole blocks with about _SPLIT weights."""
    return ROW_BLOCK * max(1, _SPLIT // (ROW_BLOCK * max(1, k)))


def _write_blocks(layout: torch.Tensor, row: int, values: torch.Tensor, columns: torch.Tensor, form: Format) -> None:
    """Writes the kept values of rows from ``row`` on, where a row block begins; the last block may lack rows."""
    data = layout[row // ROW_BLOCK : -(-(row + len(values)) // ROW_BLOCK)]
    blocks, chunks = data.shape[:2]
    padding = (0, 0, 0, chunks * _GROUPS - values.shape[1], 0, blocks * ROW_BLOCK - len(values))
    if any(padding):
        values = torch.nn.functional.pad(values, padding)
        # Padded values meet activations of zero, so that their columns do not matter: (0, 0) is as good as (0, 1).
        columns = torch.nn.functional.pad(columns, padding)
    words = torch.zeros(blocks * ROW_BLOCK, chunks, dtype=torch.int32, device=values.device)
    by_chunk = columns.view(blocks * ROW_BLOCK, chunks, 2 * _GROUPS)
    for value, shift in enumerate(form.column_shifts):
        words |= by_chunk[:, :, value].to(torch.int32) << shift
    metadata = words.view(blocks, ROW_BLOCK, chunks).transpose(1, 2).contiguous()
    data[..., :METADATA_BYTES] = metadata.view(torch.uint8).view(blocks, chunks, METADATA_BYTES)
    lanes = _to_lanes(values.contiguous().view(blocks, ROW_BLOCK, chunks, 2 * _GROUPS), form)
    ordered = lanes.permute(0, 2, 3, 1)
    data[..., METADATA_BYTES:] = ordered.contiguous().view(torch.uint8).view(blocks, chunks, -1)


def interleave_int4(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, shape: Sequence[int], form: Format
) -> PackedWeight:
    """The CPU kernels' layout of a 2:4 weight of 4-bit codes, eight an int32 [N, ceil(K / 8)], the lowest bits first.

    ``scale`` has as many values, and ``zero`` uint8, the codes that stand for zero (None: the format's), the shape that
    :meth:`Format.scale_shape` says. Scales of groups are held in the narrowest of bf16, fp16 and fp32 that holds all of
    them exactly. Rows are taken apart and laid out a piece at a time: nothing as large as the weight is held besides.

    Raises ValueError when a group of 4 holds more than two codes that do not stand for zero, and where shapes disagree.
    """
    n, k = shape
    form.check_shape(n, k)
    checks.part("weight", weight, (n, -(-k // 8)), (torch.int32,))
    checks.part("zero_point", zero, form.scale_shape(n, k), (torch.uint8,))
    data, step = _empty_layout(n, k, form, weight.device), _rows_at_once(k)
    for row in range(0, n, step):
        codes = nibbles(weight[row : row + step])[:, :k]
        of_rows = None if zero is None else zero.view(n, -1)[row : row + step]
        zeros = torch.tensor(form.zero_point) if of_rows is None else _of_columns(of_rows, form, k)
        columns = _two_columns(codes.ne(zeros), row)
        values = codes.reshape(-1, k // 4, 4).gather(-1, columns.long())
        _write_blocks(data, row, values, columns, form)
    scale = _laid_out(scale, form.scale_shape(n, k), weight.device)
    if form.scale_group is not None:
        exact = (dtype for dtype in checks.ACTIVATIONS if torch.equal(scale.to(dtype).float(), scale))
        scale = _by_block(scale.to(next(exact, torch.float32)))
    by_block = None if zero is None else _by_block(zero.view(n, -1))
    return PackedWeight(data.view(-1), (n, k), form, scale, None, by_block)


def _by_block(of_rows: torch.Tensor) -> torch.Tensor:
    """[N, groups] as [row blocks, groups, 16], with zeros to fill up."""
    n, groups = of_rows.shape
    padded = torch.nn.functional.pad(of_rows, (0, 0, 0, -n % ROW_BLOCK))
    return padded.view(-1, ROW_BLOCK, groups).transpose(1, 2).contiguous()


def _to_lanes(values: torch.Tensor, form: Format) -> torch.Tensor:
    """The integers [..., 16 / lane] that hold a row's 16 kept values [..., 16] of a chunk."""
    if form.bits != 4:
        return values.view(_lane_integer(form))
    nibbles = values.unflatten(-1, (-1, form.lane // 2, 2)).transpose(-1, -2).flatten(-2)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous().view(_lane_integer(form)).flatten(-2)


def _from_lanes(lanes: torch.Tensor, form: Format) -> torch.Tensor:
    """The inverse of :func:`_to_lanes`."""
    if form.bits != 4:
        return lanes.view(form.dtype)
    return nibbles(lanes).unflatten(-1, (-1, 2, form.lane // 2)).transpose(-1, -2).flatten(-3)


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
    return _laid_out(scale, shape, kept.values.device)


def _laid_out(scale: torch.Tensor, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Scales, one or as many as the shape has, as fp32 in that shape."""
    scale = scale.detach().resolve_neg().to(device, torch.float32)
    return (scale.reshape(()).expand(shape) if scale.numel() == 1 else scale.reshape(shape)).contiguous()
