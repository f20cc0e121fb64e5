"""Masks [rows, columns] as bits: column 8 b + j of a row is bit j, least significant first, of its byte b; 1 is kept.

A two-of-four bitmask keeps exactly two of every four consecutive columns. The order of the bits is that of
compressed-tensors' `sparse-24-bitmask`.
"""

import torch

from crepe_llm.functional.rows import row_blocks

__all__ = ["RECORDED", "kept_columns", "pack_bits", "unpack_bits", "wrong_byte", "zero_pruned_"]

# The attribute of a module in which its mask is kept, 1 bit a weight, from the step that makes it, or the file that has
# it, to training and saving.
RECORDED = "kept_weights"

# Rows are handled in blocks of about this many bytes, so that the temporaries stay small beside the bitmask.
_BLOCK_BYTES = 1 << 21
# Entries of a weight that are masked at once on a CPU.
_BLOCK_ENTRIES = 1 << 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# The eight mask entries of every byte, as the bytes of one number, so that they are looked up at once.
_EIGHTS = (torch.arange(256)[:, None] >> torch.arange(8) & 1).to(torch.uint8).view(torch.int64).flatten()
# The two columns (0 to 3) of a group of four whose bits are set in a nibble; 0 where not exactly two are.
_PAIRS = [[column for column in range(4) if nibble >> column & 1] for nibble in range(16)]
_COLUMNS = torch.tensor([pair if len(pair) == 2 else [0, 0] for pair in _PAIRS], dtype=torch.uint8)


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """Pack a mask, bool [rows, columns], into uint8 [rows, ceil(columns / 8)]; bits beyond the last column are 0."""
    rows, columns = keep.shape
    keep = keep.contiguous()
    if columns % 8:
        keep = torch.nn.functional.pad(keep, (0, 8 - columns % 8))
    eight = keep.view(torch.uint8).view(rows, -(-columns // 8), 8)
    packed = eight[..., 0].clone()
    for position in range(1, 8):
        packed |= eight[..., position] << position
    return packed


def unpack_bits(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack uint8 [rows, ceil(columns / 8)] into a mask, bool [rows, columns]: the inverse of :func:`pack_bits`."""
    eights = _EIGHTS.to(bitmask.device).index_select(0, bitmask.flatten().int())
    return eights.view(torch.bool).view(bitmask.shape[0], 8 * bitmask.shape[1])[:, :columns]


def zero_pruned_(weight: torch.Tensor, bitmask: torch.Tensor) -> None:
    """Set all entries of a matrix outside its mask to +0.0 in place, infinities and NaN included.

    Args:
        weight: [rows, columns], or [..., rows, columns] whose dimensions but the last are rows; any dtype.
        bitmask: uint8 [rows, ceil(columns / 8)].
    """
    if weight.numel() == 0:
        return
    if weight.dim() > 2:
        for part, bits in zip(weight, bitmask.chunk(max(1, len(weight))), strict=True):
            zero_pruned_(part, bits)
        return
    # As integers, so that one "and" clears an entry whatever it is; block by block, so that masks stay in the caches.
    integers = weight.view(_INTEGERS[weight.element_size()])
    for rows in row_blocks(weight, _BLOCK_ENTRIES if weight.device.type == "cpu" else _BLOCK_ENTRIES << 10):
        keep = unpack_bits(bitmask[rows], weight.shape[1]).view(torch.int8)
        integers[rows].bitwise_and_(keep.neg_().to(integers.dtype))


def kept_columns(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Name the two kept columns of every group of four of a two-of-four bitmask.

    `bitmask` is uint8 [rows, ceil(columns / 8)], `columns` a multiple of 4. The result is uint8 [rows, columns / 4, 2],
    ascending, each 0 to 3. The bitmask is not checked: see :func:`wrong_byte`.
    """
    of_nibble = _COLUMNS.to(bitmask.device)
    found = torch.empty(bitmask.shape[0], columns // 4, 2, dtype=torch.uint8, device=bitmask.device)
    for rows in row_blocks(bitmask, _BLOCK_BYTES // 8):
        block = bitmask[rows]
        nibbles = torch.stack((block & 15, block >> 4), dim=-1).view(len(block), -1)[:, : columns // 4]
        found[rows] = of_nibble[nibbles.int()]
    return found


def wrong_byte(bitmask: torch.Tensor, columns: int) -> tuple[int, int] | None:
    """Find the first byte (row, index in the row) of a bitmask that is not two-of-four, or None.

    `bitmask` is uint8 [rows, ceil(columns / 8)], `columns` a multiple of 4. A byte is wrong if one of its groups does
    not have exactly two bits set, or if it sets a bit beyond the last column.
    """
    byte = torch.arange(256, device=bitmask.device)
    counts = torch.stack(
        [(byte[:, None] >> torch.arange(4 * half, 4 * half + 4, device=byte.device) & 1).sum(1) for half in range(2)]
    )
    good = (counts == 2).all(0)
    good_last = (counts[0] == 2) & (counts[1] == 0) if columns % 8 else good
    for rows in row_blocks(bitmask, _BLOCK_BYTES):
        block = bitmask[rows].int()
        wrong = torch.cat((~good[block[:, :-1]], ~good_last[block[:, -1:]]), dim=1)
        if wrong.any():
            row, index = wrong.nonzero()[0].tolist()
            return rows.start + row, index
    return None
