"""Bits of masks."""

import torch

__all__ = ["pack_bits", "unpack_bits"]


def pack_bits(keep: torch.Tensor) -> torch.Tensor:
    """TEMP"""
    rows, columns = keep.shape
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -columns % 8)).view(rows, -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """TEMP"""
    found = (bits[..., None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return found.flatten(1)[:, :columns].bool()
