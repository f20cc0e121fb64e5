"""Which layers of a checkpoint are 2:4, by what is stored of them."""

import re

import torch

from crepe_llm.checkpoints.experts import matrices_of
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK
from crepe_llm.checkpoints.int4 import int4_kept
from crepe_llm.checkpoints.reading import Checkpoint

__all__ = [
    "FORMAT",
    "has_exponents",
    "int4_2of4",
    "is_2of4_linear",
    "is_linear_weight",
    "plain_2of4",
    "stays_dense",
]

FORMAT = SPARSE_24_BITMASK
"""What 2:4 layers are written in."""

# Weights that are never packed, whatever their zeros: two-dimensional ones of no linear layer. Gemma 3n's layers after
# the last block are named after embeddings, but are none.
_NOT_LINEAR = re.compile(
    r"(^|\.)((wte|wpe)\.|(?!(altup_unembed_projections|embed_out)\.)\w*(embed|norm)\w*(\.\d+)?\.weight$)"
    r"|^(model\.)?shared\.weight$",  # the embedding of an encoder and a decoder
    re.IGNORECASE,
)
# And those of output heads, which share their weights with the embedding where tied, of routers, and of all experts in
# one tensor.
_DENSE = re.compile(r"(^|\.)(lm_head|embed_out|experts(?!\.\d+\.)|router)\.", re.IGNORECASE)
_HEAD = re.compile(r"(^|\.)lm_head\.weight$")


def plain_2of4(checkpoint: Checkpoint) -> list[str]:
    """The prefixes of the linear layers whose plain weights are exactly 2:4; all weights are read, one at a time."""
    return [name.removesuffix(".weight") for name in checkpoint.tensors if is_2of4_linear(checkpoint, name)]


def int4_2of4(checkpoint: Checkpoint) -> list[str]:
    """The prefixes of the layers whose 4-bit weights, in compressed-tensors' pack-quantized form, are exactly 2:4."""
    kept = ((name, int4_kept(checkpoint, name)) for name in checkpoint.tensors)
    return [
        name.removesuffix(".weight_packed")
        for name, bits in kept
        if bits is not None and FORMAT.fits(bits.to(torch.int8))
    ]


def is_2of4_linear(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is the weight of a linear layer and is 2:4."""
    return is_linear_weight(checkpoint, name) and FORMAT.fits(checkpoint.load(name))


def is_linear_weight(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is the weight of a linear layer that may be packed, or of one of each expert."""
    if not name.endswith(".weight") or _NOT_LINEAR.search(name) or _DENSE.search(name):
        return False
    if has_exponents(checkpoint, name):
        return False
    axes = len(checkpoint.tensors[name].shape)
    return axes == 2 or (axes == 3 and bool(matrices_of(name.removesuffix(".weight"))))


def stays_dense(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is the weight of a linear layer that is never packed, other than a head called lm_head."""
    if not name.endswith(".weight") or len(checkpoint.tensors[name].shape) != 2 or _NOT_LINEAR.search(name):
        return False
    return not _HEAD.search(name) and not is_linear_weight(checkpoint, name)


def has_exponents(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is a weight whose scales are stored as exponents of two, bytes."""
    scale = checkpoint.tensors.get(f"{name}_scale")
    return scale is not None and scale.dtype == "U8"
