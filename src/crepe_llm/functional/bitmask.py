"""Masks [rows, columns] as bits: column 8 b + j of a row is bit j, least significant first, of its byte b; 1 is kept.

A two-of-four bitmask keeps exactly two of every four consecutive columns. The order of the bits is that of
compressed-tensors' `sparse-24-bitmask`.
"""

import torch

__all__ = ["kept_columns", "pack_bits", "unpack_bits", "wrong_byte"]

# Rows are handled in blocks of about this many bytes, so that the temporaries stay small beside the bitmask.
_BLOCK_BYTES = 1 << 21
# The two columns (0 to 3) of a group of four whose bits are set in a nibble; 0 where not exactly two are.
_PAIRS = [[column for column in range(4) if nibble >> column & 1] for nibble in range(16)]
_COLUMNS = torch.tensor([pair if len(pair) == 2 else [0, 0] for pair in _PAIRS], dtype=torch.uint8)


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """Pack a mask, bool [rows, columns], into uint8 [rows, ceil(columns / 8)]; bits beyond the last column are 0."""
    rows, columns = keep.shape
    keep = keep.contiguous()
    if columns % 8:
        keep = torch.nn.functional.pad(keep, (0, 8 - columns % 8))
    eight = keep.view(torch.uint8).view(rows, -1, 8)
    packed = eight[..., 0].clone()
    for position in range(1, 8):
        packed |= eight[..., position] << position
    return packed


def unpack_bits(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Unpack uint8 [rows, ceil(columns / 8)] into a mask, bool [rows, columns]: the inverse of :func:`pack_bits`."""
    bits = torch.empty((*bitmask.shape, 8), dtype=torch.uint8, device=bitmask.device)
    for position in range(8):
        bits[..., position] = (bitmask >> position) & 1
    return bits.view(bitmask.shape[0], -1)[:, :columns].bool()


def kept_columns(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Name the two kept columns of every group of four of a two-of-four bitmask.

    `bitmask` is uint8 [rows, ceil(columns / 8)], `columns` a multiple of 4. The result is uint8 [rows, columns / 4, 2],
    ascending, each 0 to 3. The bitmask is not checked: see :func:`wrong_byte`.
    """
    nibbles = torch.stack((bitmask & 15, bitmask >> 4), dim=-1).view(bitmask.shape[0], -1)[:, : columns // 4]
    return _COLUMNS.to(bitmask.device)[nibbles.int()]


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
    step = max(1, _BLOCK_BYTES // max(1, bitmask.shape[1]))
    for start in range(0, bitmask.shape[0], step):
        block = bitmask[start : start + step].int()
        wrong = torch.cat((~good[block[:, :-1]], ~good_last[block[:, -1:]]), dim=1)
        if wrong.any():
            row, index = wrong.nonzero()[0].tolist()
            return start + row, index
    return None
