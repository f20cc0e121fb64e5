"""2:4 weights taken apart into kept values and columns; the CPU kernels' layout of them, and the way back.

A weight [N, K] is cut into blocks of 16 rows and, within a block, into chunks of 32 columns (8 groups of 4). N and K
are padded with zeros to whole blocks and chunks. A chunk is contiguous and chunks of a block follow each other, so a
row block is one sequential stream of bytes. A chunk holds, little-endian:

======== =========================================== ================================================================
bytes    content                                     order
======== =========================================== ================================================================
64       metadata, 16 x uint32                       one word a row, 2 bits a kept value
512      bf16: kept values                           [group 8][row 16][2], the two kept values of a group adjacent
512      fp16: kept values                           [group 8][2][row 16]
1024     fp32: kept values                           [group 8][2][row 16]
256      int8: kept values                           [pair of groups 4][row 16][4]
======== =========================================== ================================================================

In the metadata word the column (0 to 3, within its group) of kept value ``v`` of group ``g`` is at bits
``4 g + 2 v``; for int8, of kept value ``v`` (0 to 3) of pair ``p``, at bits ``8 v + 2 p``, so that one shift and one
mask spread the four over the four bytes of a lane. Two bits can only name a column of their own group: whatever the
metadata says, a kernel reads no activation outside the group. The layout is ours.
"""

from dataclasses import dataclass

import torch

from crepe_llm.kernels.memory import on_huge_pages

ROW_BLOCK = 16
COLUMN_CHUNK = 32
METADATA_BYTES = 4 * ROW_BLOCK
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)
# int32 accumulators hold K / 2 products of at most 127 * 128.
MAX_INT8_COLUMNS = 262144
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)

_GROUPS = COLUMN_CHUNK // 4
_FIRST = torch.tensor([0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 0, 0], dtype=torch.uint8)
_SECOND = torch.tensor([0, 0, 0, 1, 0, 2, 2, 0, 0, 3, 3, 0, 3, 0, 0, 0], dtype=torch.uint8)
_IS_PAIR = torch.tensor([n.bit_count() == 2 for n in range(16)])


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

    ``data`` is the layout's bytes (uint8, flat), ``shape`` the dense (N, K), ``dtype`` that of the kept values,
    ``scale`` an fp32 vector [N] that multiplies the outputs, or None, and ``inputs`` how activations are quantized, or
    None (the int8 kernel quantizes them itself, one scale a token).
    """

    data: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    scale: torch.Tensor | None = None
    inputs: Inputs | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the packed weight takes."""
        return self.data.numel() + (self.scale.nbytes if self.scale is not None else 0)


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A dense weight [N, K] (bf16, fp16 or fp32, rows contiguous) for :func:`crepe_llm.kernels.linear`.

    The tensor is kept as it is, not copied: an embedding can share it.
    """

    weight: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return (self.weight.shape[0], self.weight.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the weight takes."""
        return self.weight.nbytes


def chunk_bytes(dtype: torch.dtype) -> int:
    """Bytes of one chunk (16 rows of 32 columns) of a weight of ``dtype``."""
    return METADATA_BYTES + ROW_BLOCK * COLUMN_CHUNK // 2 * dtype.itemsize


def packed_bytes(n: int, k: int, dtype: torch.dtype) -> int:
    """Bytes of the layout of a weight [n, k]."""
    return -(-n // ROW_BLOCK) * -(-k // COLUMN_CHUNK) * chunk_bytes(dtype)


def split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept values [N, K / 4, 2] of a dense 2:4 weight [N, K], and their columns in the group (uint8, ascending).

    Raises ValueError when a group holds more than two non-zero values or when K is no positive multiple of 4;
    TypeError for a dtype without a kernel.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a matrix [N, K] is needed")
    n, k = weight.shape
    _check_shape(n, k)
    _check_dtype(weight.dtype)
    groups = weight.reshape(n, k // 4, 4)
    if weight.dtype == torch.float8_e4m3fn:  # torch compares no float8 with zero and gathers none
        kept, groups = groups.to(torch.float32) != 0, groups.view(torch.uint8)
    else:
        kept = groups != 0
    surplus = (kept.sum(-1, dtype=torch.uint8) > 2).nonzero()
    if surplus.numel():
        row, group = surplus[0].tolist()
        raise ValueError(
            f"weight is not 2:4: row {row}, columns {4 * group} to {4 * group + 3} hold "
            f"{int(kept[row, group].sum())} non-zero values; prune it with mask_structure 2:4"
        )
    # Two columns a group: the non-zero ones first, then zeros, in ascending order.
    columns = torch.sort(kept.to(torch.uint8), dim=-1, descending=True, stable=True).indices[..., :2].sort(-1).values
    return groups.gather(-1, columns).view(weight.dtype), columns.to(torch.uint8)


def split_compressed(
    compressed: torch.Tensor, bitmask: torch.Tensor, shape: tuple[int, int] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`split` from the tensors of ``sparse-24-bitmask``, without making the weight dense.

    ``compressed`` is [N, K / 2], ``bitmask`` uint8 [N, ceil(K / 8)] with bit j of byte b set iff column 8 b + j is
    kept, ``shape`` the dense (N, K) (also as a tensor of two values).

    Raises ValueError when the shapes disagree, when a group of the bitmask does not have exactly two bits set, or when
    bits beyond column K are set; TypeError for a dtype without a kernel.
    """
    n, k = (int(s) for s in (shape.flatten().tolist() if isinstance(shape, torch.Tensor) else shape))
    _check_shape(n, k)
    _check_dtype(compressed.dtype)
    if bitmask.dtype != torch.uint8:
        raise TypeError(f"bitmask has dtype {bitmask.dtype}; torch.uint8 is needed")
    if tuple(compressed.shape) != (n, k // 2):
        raise ValueError(f"compressed has shape {tuple(compressed.shape)}; shape ({n}, {k}) needs ({n}, {k // 2})")
    if tuple(bitmask.shape) != (n, -(-k // 8)):
        raise ValueError(f"bitmask has shape {tuple(bitmask.shape)}; shape ({n}, {k}) needs ({n}, {-(-k // 8)})")
    nibbles = torch.stack((bitmask & 15, bitmask >> 4), dim=-1).reshape(n, -1)
    if nibbles.shape[1] > k // 4:
        if bool((nibbles[:, k // 4 :] != 0).any()):
            raise ValueError(f"bitmask sets bits beyond column {k - 1}; the checkpoint is damaged")
        nibbles = nibbles[:, : k // 4]
    nibbles = nibbles.to(torch.int32)
    wrong = (~_IS_PAIR.to(nibbles.device)[nibbles]).nonzero()
    if wrong.numel():
        row, group = wrong[0].tolist()
        raise ValueError(
            f"bitmask keeps {int(nibbles[row, group]).bit_count()} of columns {4 * group} to {4 * group + 3} of row "
            f"{row}; 2:4 needs exactly 2, the checkpoint is damaged"
        )
    columns = torch.stack((_FIRST.to(nibbles.device)[nibbles], _SECOND.to(nibbles.device)[nibbles]), dim=-1)
    return compressed.reshape(n, k // 4, 2), columns


def pack_dense(weight: torch.Tensor) -> DenseWeight:
    """Wraps a dense weight [N, K] (bf16, fp16 or fp32) for :func:`crepe_llm.kernels.linear`; nothing is copied.

    Raises TypeError for another dtype and ValueError when ``weight`` is no matrix or its rows are not contiguous.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"weight has dtype {weight.dtype}; bfloat16, float16 or float32 is needed")
    if weight.ndim != 2 or not weight.is_contiguous():
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, strides {weight.stride()}; a contiguous matrix is needed"
        )
    return DenseWeight(weight)


def deinterleave(packed: PackedWeight) -> torch.Tensor:
    """The dense weight [N, K] of the CPU kernels' layout, bit for bit what was packed (without the scale)."""
    n, k = packed.shape
    rows, chunks = -(-n // ROW_BLOCK), -(-k // COLUMN_CHUNK)
    data = packed.data.view(rows, chunks, chunk_bytes(packed.dtype))
    words = data[..., :METADATA_BYTES].contiguous().view(torch.int32)  # [rows, chunks, 16]
    bits = (words[..., None, None] >> _metadata_shifts(packed.dtype).to(words.device)) & 3
    columns = bits.permute(0, 2, 1, 3, 4).reshape(rows * ROW_BLOCK, chunks * _GROUPS, 2)
    values = data[..., METADATA_BYTES:].contiguous().view(packed.dtype)
    if packed.dtype == torch.int8:
        values = values.view(rows, chunks, _GROUPS // 2, ROW_BLOCK, 4).permute(0, 3, 1, 2, 4)
    elif packed.dtype == torch.bfloat16:
        values = values.view(rows, chunks, _GROUPS, ROW_BLOCK, 2).permute(0, 3, 1, 2, 4)
    else:
        values = values.view(rows, chunks, _GROUPS, 2, ROW_BLOCK).permute(0, 4, 1, 2, 3)
    values = values.reshape(rows * ROW_BLOCK, chunks * _GROUPS, 2)
    dense = torch.zeros(*values.shape[:2], 4, dtype=packed.dtype, device=values.device)
    dense.scatter_(-1, columns.long(), values)
    return dense.view(rows * ROW_BLOCK, -1)[:n, :k].contiguous()


def interleave(
    values: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor | None = None, inputs: Inputs | None = None
) -> PackedWeight:
    """The CPU kernels' layout of kept values [N, K / 4, 2] and their columns in the group (uint8, likewise).

    Raises ValueError when an int8 weight has too many columns for int32 sums.
    """
    n, k = values.shape[0], 4 * values.shape[1]
    dtype = values.dtype
    if dtype == torch.int8 and k > MAX_INT8_COLUMNS:
        raise ValueError(f"int8 weight has {k} columns; at most {MAX_INT8_COLUMNS} fit int32 accumulation")
    rows, chunks = -(-n // ROW_BLOCK), -(-k // COLUMN_CHUNK)
    padding = (0, 0, 0, chunks * _GROUPS - k // 4, 0, rows * ROW_BLOCK - n)
    if any(padding):
        values = torch.nn.functional.pad(values, padding)
        # Padded values are zero, so that their columns do not matter: (0, 0) is as good as (0, 1).
        columns = torch.nn.functional.pad(columns, padding)
    data = on_huge_pages(torch.empty(rows, chunks, chunk_bytes(dtype), dtype=torch.uint8, device=values.device))
    words = torch.zeros(rows * ROW_BLOCK, chunks, dtype=torch.int32, device=values.device)
    by_chunk = columns.view(rows * ROW_BLOCK, chunks, _GROUPS, 2)
    shifts = _metadata_shifts(dtype)
    for group in range(_GROUPS):
        for value in range(2):
            words |= by_chunk[:, :, group, value].to(torch.int32) << int(shifts[group, value])
    metadata = words.view(rows, ROW_BLOCK, chunks).transpose(1, 2).contiguous()
    data[..., :METADATA_BYTES] = metadata.view(torch.uint8).view(rows, chunks, METADATA_BYTES)
    by_chunk = values.contiguous().view(rows, ROW_BLOCK, chunks, _GROUPS, 2)
    if dtype == torch.int8 or dtype == torch.bfloat16:
        # Values that stay adjacent move as one 32-bit element.
        lanes = by_chunk.view(rows, ROW_BLOCK, chunks, -1).view(torch.int32)
        ordered = lanes.permute(0, 2, 3, 1)
    else:
        ordered = by_chunk.permute(0, 2, 3, 4, 1)
    body = ordered.contiguous().view(torch.uint8).view(rows, chunks, -1)
    data[..., METADATA_BYTES:] = body
    return PackedWeight(data.view(-1), (n, k), dtype, scale, inputs)


def _metadata_shifts(dtype: torch.dtype) -> torch.Tensor:
    """Bit position of a kept value's column in its row's metadata word: int32 [8 groups, 2]."""
    group, value = torch.arange(_GROUPS, dtype=torch.int32)[:, None], torch.arange(2, dtype=torch.int32)
    if dtype == torch.int8:
        return 8 * (2 * (group % 2) + value) + 2 * (group // 2)
    return 4 * group + 2 * value


def per_row(scale: torch.Tensor | None, n: int, device: torch.device) -> torch.Tensor | None:
    """A scale ([N], [N, 1] or one value) as an fp32 vector [N] on ``device``.

    Raises ValueError when it has another size.
    """
    if scale is None:
        return None
    if scale.numel() not in (1, n):
        raise ValueError(f"scale has shape {tuple(scale.shape)}; one value or one a row ({n}) is needed")
    return scale.detach().to(device, torch.float32).reshape(-1).expand(n).contiguous()


def _check_shape(n: int, k: int) -> None:
    if n < 1 or k < 4 or k % 4:
        raise ValueError(f"weight is {n} x {k} (N x K); at least one row and K a positive multiple of 4 are needed")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (*WEIGHT_DTYPES, torch.float8_e4m3fn):
        raise TypeError(f"weight has dtype {dtype}; bfloat16, float16, float32, int8 or float8_e4m3fn is needed")
