"""Packing of one tensor in the `sparse-24-bitmask` format: byte for byte as in docs/formats.md.

A 2:4 weight [d_out, d_in] becomes `compressed` [d_out, d_in / 2], the two kept values of every group of four
consecutive columns, and `bitmask` uint8 [d_out, ceil(d_in / 8)], whose bit j (least significant first) of byte b is
set where column 8b + j is kept. Of experts that lie in one weight [experts, d_out, d_in] all three are of each expert,
one after the other: ours, compressed-tensors packs no such weight.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from crepe_llm.checkpoints.formats.base import CheckpointFormat, FormatError, StoredTensor
from crepe_llm.functional.bitmask import pack_bits, unpack_bits, wrong_byte
from crepe_llm.functional.masks import nonzero

__all__ = ["DTYPES", "SPARSE_24_BITMASK", "is_2of4", "pack", "read_shape", "unpack", "validate_bitmask"]

_STORED_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}
DTYPES = tuple(_STORED_DTYPES.values())
"""The weight dtypes that the format stores."""

_INTEGER_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_FP8_NEGATIVE_ZERO = -128  # the byte 0x80 read as int8
# Rows are handled in blocks of at most this many weights, so that the temporaries stay small beside the weight.
_BLOCK_ELEMENTS = 1 << 24


def is_2of4(weight: torch.Tensor) -> bool:
    """Say whether `weight` can be packed: two-dimensional, of a supported dtype, its columns a multiple of four and
    at most two non-zeros in every group of four consecutive columns.

    `weight` is [d_out, d_in]; the result is a plain bool. Raises nothing.
    """
    if weight.ndim != 2 or weight.dtype not in DTYPES or weight.shape[1] % 4 or weight.numel() == 0:
        return False
    return all(_first(_group_counts(nonzero(block.contiguous())) > 2) is None for _, block in _row_blocks(weight))


def pack(weight: torch.Tensor, keep: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack a 2:4 weight into its kept values and their bitmask.

    `weight` is [d_out, d_in], bf16, fp16, fp32, int8 or float8_e4m3fn, on any device, with d_in a multiple of 4. The
    result is `(compressed, bitmask)` on the same device: [d_out, d_in / 2] of the same dtype and uint8
    [d_out, ceil(d_in / 8)]. Every kept value keeps its bytes. A negative zero counts as a zero.

    `keep` is the weight's mask, bool [d_out, d_in], True at exactly two of every four columns: these are kept, also
    where a value is exactly 0. Without it the mask is inferred from the zeros. Exactly two positions are then kept in
    each group of four also where fewer than two values are non-zero: the ones that compressed-tensors 0.14.0.1 would
    keep, so that the two writers agree bit for bit.

    Raises FormatError if the shape or dtype is not supported, at the first group with more than two non-zeros, and
    with `keep` at the first group that does not keep two or has a non-zero outside of the mask; the group is named.
    Format: compressed-tensors `sparse-24-bitmask`; cost O(d_out * d_in).
    """
    _check_packable(weight)
    if keep is not None and (keep.dtype != torch.bool or keep.shape != weight.shape):
        raise FormatError(
            f"the mask is {keep.dtype} {tuple(keep.shape)}; a weight of shape {tuple(weight.shape)} needs torch.bool "
            "of that shape"
        )
    rows, columns = weight.shape
    compressed = torch.empty((rows, columns // 2), dtype=weight.dtype, device=weight.device)
    bitmask = torch.empty((rows, math.ceil(columns / 8)), dtype=torch.uint8, device=weight.device)
    for start, block in _row_blocks(weight):
        block, stop = block.contiguous(), start + block.shape[0]
        kept = _inferred(block, start) if keep is None else _checked(keep[start:stop].to(block.device), block, start)
        integers = block.view(_INTEGER_VIEW[weight.element_size()])
        compressed[start:stop] = integers[kept].view(weight.dtype).view(block.shape[0], columns // 2)
        bitmask[start:stop] = pack_bits(kept)
    return compressed, bitmask


def unpack(compressed: torch.Tensor, bitmask: torch.Tensor, shape: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Rebuild the dense weight from its kept values and their bitmask, the inverse of :func:`pack`.

    `compressed` is [d_out, d_in / 2] of any dtype that :func:`pack` takes, `bitmask` uint8 [d_out, ceil(d_in / 8)],
    `shape` the dense (d_out, d_in) as two integers or as the stored int64 tensor [2, 1]. The result is
    [d_out, d_in] of the dtype and on the device of `compressed`; kept values keep their bytes, all others are +0.

    Raises FormatError if dtypes and shapes disagree or the bitmask does not hold exactly two bits a group, before
    anything of the dense size is allocated.
    """
    rows, columns = read_shape(shape)
    if compressed.dtype not in DTYPES:
        raise FormatError(f"compressed values of dtype {compressed.dtype} are not supported; the format has {DTYPES}")
    if tuple(compressed.shape) != (rows, columns // 2):
        raise FormatError(
            f"compressed has shape {tuple(compressed.shape)}, but a weight of shape {(rows, columns)} "
            f"needs {(rows, columns // 2)}"
        )
    if bitmask.shape[:1] != (rows,):
        raise FormatError(f"bitmask has shape {tuple(bitmask.shape)}, but the weight has {rows} rows")
    validate_bitmask(bitmask, columns)
    view = _INTEGER_VIEW[compressed.element_size()]
    weight = torch.zeros((rows, columns), dtype=view, device=compressed.device)
    for start, block in _row_blocks(weight):
        stop = start + block.shape[0]
        kept = unpack_bits(bitmask[start:stop], columns).to(compressed.device)
        block.masked_scatter_(kept, compressed[start:stop].contiguous().view(view))
    return weight.view(compressed.dtype)


def validate_bitmask(bitmask: torch.Tensor, columns: int) -> None:
    """Check that a bitmask keeps exactly two of every four columns.

    `bitmask` is uint8 [d_out, ceil(columns / 8)]; `columns` is d_in, a multiple of 4. Raises FormatError, naming the
    first offending row and its columns, for another dtype or shape, for a group of other than two bits, and for a
    bit set beyond the last column.
    """
    if bitmask.dtype != torch.uint8:
        raise FormatError(f"bitmask has dtype {bitmask.dtype}, not torch.uint8")
    width = math.ceil(columns / 8)
    if bitmask.ndim != 2 or bitmask.shape[1] != width:
        raise FormatError(f"bitmask has shape {tuple(bitmask.shape)}, but {columns} columns need {width} bytes a row")
    wrong = wrong_byte(bitmask, columns)
    if wrong is not None:
        row, byte = wrong
        raise FormatError(
            f"bitmask row {row}, byte {byte} (columns {8 * byte} to {min(8 * byte + 7, columns - 1)}) is "
            f"{int(bitmask[row, byte]):#010b}: it must keep exactly two of every four columns and none beyond the last"
        )


def read_shape(shape: Sequence[int] | torch.Tensor) -> tuple[int, int]:
    """Read a stored dense shape, two positive integers of which the second is a multiple of 4.

    `shape` is a sequence of two integers or an integer tensor of two elements ([2, 1] on disk). Returns
    (d_out, d_in); raises FormatError otherwise.
    """
    if isinstance(shape, torch.Tensor):
        if shape.is_floating_point() or shape.is_complex() or shape.dtype == torch.bool:
            raise FormatError(f"the stored shape has dtype {shape.dtype}, not torch.int64")
        if shape.numel() != 2:
            raise FormatError(f"the stored shape has {shape.numel()} elements, not 2")
        shape = shape.flatten().tolist()
    if len(shape) != 2:
        raise FormatError(f"the dense shape {tuple(shape)} does not have two dimensions")
    rows, columns = int(shape[0]), int(shape[1])
    if rows < 1 or columns < 1:
        raise FormatError(f"the dense shape {(rows, columns)} is not positive")
    if columns % 4:
        raise FormatError(f"the dense shape {(rows, columns)} has columns that are not a multiple of 4")
    return rows, columns


def _check_packable(weight: torch.Tensor) -> None:
    if weight.ndim != 2:
        raise FormatError(f"a weight of shape {tuple(weight.shape)} cannot be packed: it must be two-dimensional")
    if weight.dtype not in DTYPES:
        raise FormatError(f"a weight of dtype {weight.dtype} cannot be packed; the format has {DTYPES}")
    if weight.shape[0] < 1 or weight.shape[1] < 1 or weight.shape[1] % 4:
        raise FormatError(
            f"a weight of shape {tuple(weight.shape)} cannot be packed: its columns must be a multiple of 4"
        )


def _row_blocks(matrix: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    step = max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    return [(start, matrix[start : start + step]) for start in range(0, matrix.shape[0], step)]


def _group_counts(flags: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, columns / 4]: how many of each group of four flags are set."""
    four = flags.view(torch.uint8).view(flags.shape[0], -1, 4)
    return four[..., 0] + four[..., 1] + four[..., 2] + four[..., 3]


def _first(groups: torch.Tensor) -> tuple[int, int] | None:
    """The first (row, group) that is True of bool [rows, columns / 4]."""
    if not groups.any():
        return None
    row, group = groups.nonzero()[0].tolist()
    return row, group


def _values(weight: torch.Tensor, row: int, group: int) -> list[float]:
    return weight[row, 4 * group : 4 * group + 4].float().tolist()


def _inferred(weight: torch.Tensor, start: int) -> torch.Tensor:
    """The mask of rows `start`.. of a weight that comes without one."""
    kept = nonzero(weight)
    crowded = _first(_group_counts(kept) > 2)
    if crowded is not None:
        row, group = crowded
        raise FormatError(
            f"the weight is not 2:4: row {start + row}, columns {4 * group} to {4 * group + 3} hold "
            f"{_values(weight, row, group)}, more than two non-zeros; prune it to 2:4 or leave it dense"
        )
    return _fill_to_two(weight, kept)


def _checked(keep: torch.Tensor, weight: torch.Tensor, start: int) -> torch.Tensor:
    """The given mask of rows `start`.. of a weight, if it is one."""
    keep = keep.contiguous()
    uneven = _first(_group_counts(keep) != 2)
    if uneven is not None:
        row, group = uneven
        raise FormatError(
            f"the mask is not 2:4: it keeps {int(keep[row, 4 * group : 4 * group + 4].sum())} of columns {4 * group} "
            f"to {4 * group + 3} of row {start + row}, not two"
        )
    outside = _first(_group_counts(nonzero(weight) & ~keep) != 0)
    if outside is not None:
        row, group = outside
        raise FormatError(
            f"the mask does not belong to the weight: row {start + row}, columns {4 * group} to {4 * group + 3} hold "
            f"{_values(weight, row, group)}, a non-zero outside of the mask"
        )
    return keep


def _fill_to_two(weight: torch.Tensor, nonzero: torch.Tensor) -> torch.Tensor:
    """The kept positions: all non-zeros, and in groups with fewer than two of them as many zeros as are missing."""
    few = _group_counts(nonzero) < 2
    if not few.any():
        return nonzero
    kept = nonzero.clone()
    # compressed-tensors ranks the magnitudes of a group with topk on the CPU and takes float8 by its bytes, where
    # abs(-128) is -128, which ranks a negative zero below a zero. The same call on the same ranking ties alike.
    rank = nonzero.view(nonzero.shape[0], -1, 4)[few].to(torch.int8)
    if weight.dtype == torch.float8_e4m3fn:
        rank -= (weight.view(torch.int8).view(nonzero.shape[0], -1, 4)[few] == _FP8_NEGATIVE_ZERO).to(torch.int8)
    positions = rank.cpu().topk(2, dim=1).indices.to(weight.device)
    kept.view(nonzero.shape[0], -1, 4)[few] = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, positions, True)
    return kept


class Sparse24Bitmask(CheckpointFormat):
    """compressed-tensors' `sparse-24-bitmask`: `compressed`, `bitmask` and `shape`; also with an axis of experts."""

    name = "sparse-24-bitmask"
    version = "0.14.0.1"
    parts = ("compressed", "bitmask", "shape")
    values = "compressed"
    pattern = "bitmask"

    def fits(self, weight: torch.Tensor) -> bool:
        return weight.ndim in (2, 3) and is_2of4(weight.flatten(0, -2))

    def pack(self, weight: torch.Tensor, keep: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        experts = weight.shape[:-2]
        if len(experts) == 1 and (keep is None or keep.shape == weight.shape):
            compressed, bitmask = pack(weight.flatten(0, 1), None if keep is None else keep.flatten(0, 1))
        else:
            compressed, bitmask = pack(weight, keep)
        shape = torch.tensor(weight.shape, dtype=torch.int64).reshape(-1, 1)
        rows = (*experts, weight.shape[-2], -1)
        return {"compressed": compressed.view(rows), "bitmask": bitmask.view(rows), "shape": shape}

    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        compressed, bitmask, stored = (parts[part] for part in self.parts)
        experts, (rows, columns) = _split_shape(stored)
        if not experts:
            return unpack(compressed, bitmask, (rows, columns))
        for part, found in (("compressed", compressed), ("bitmask", bitmask)):
            if tuple(found.shape[:-1]) != (*experts, rows):
                raise FormatError(f"{part} has shape {tuple(found.shape)}, not of {experts[0]} experts of {rows} rows")
        shape = experts[0] * rows, columns
        return unpack(compressed.flatten(0, 1), bitmask.flatten(0, 1), shape).view(*experts, rows, columns)

    def read_layer(
        self, layer: str, stored: Mapping[str, StoredTensor], load: Callable[[str], torch.Tensor]
    ) -> tuple[torch.dtype, tuple[int, ...]]:
        compressed, bitmask, shape = (stored[part] for part in self.parts)
        if shape.dtype != "I64" or math.prod(shape.shape) not in (2, 3):
            raise FormatError(
                f"{shape.file}: tensor {layer}.shape is {shape.dtype} {list(shape.shape)}, not two integers of type "
                "I64, or three of experts in one tensor"
            )
        if compressed.dtype not in _STORED_DTYPES:
            raise FormatError(
                f"{compressed.file}: tensor {layer}.compressed has dtype {compressed.dtype}, not one of "
                f"{list(_STORED_DTYPES)}"
            )
        try:
            experts, (rows, columns) = _split_shape(load("shape"))
        except FormatError as error:
            raise FormatError(f"{shape.file}: tensor {layer}.shape: {error}") from None
        for part, found, dtype, expected in (
            ("compressed", compressed, compressed.dtype, (*experts, rows, columns // 2)),
            ("bitmask", bitmask, "U8", (*experts, rows, (columns + 7) // 8)),
        ):
            if found.dtype != dtype or found.shape != expected:
                raise FormatError(
                    f"{found.file}: tensor {layer}.{part} is {found.dtype} {list(found.shape)}, but the stored shape "
                    f"{[*experts, rows, columns]} needs {dtype} {list(expected)}"
                )
        return _STORED_DTYPES[compressed.dtype], (*experts, rows, columns)

    def validate(self, pattern: torch.Tensor, shape: tuple[int, ...]) -> None:
        validate_bitmask(pattern.flatten(0, -2), shape[-1])


def _split_shape(shape: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, int]]:
    """A stored shape: the number of experts, if there is one, and (rows, columns) of each; FormatError if malformed."""
    if shape.numel() != 3:
        return (), read_shape(shape)
    experts, matrix = int(shape.flatten()[0]), shape.flatten()[1:]
    if experts < 1:
        raise FormatError(f"the dense shape {tuple(shape.flatten().tolist())} is not positive")
    return (experts,), read_shape(matrix)


SPARSE_24_BITMASK = Sparse24Bitmask()
