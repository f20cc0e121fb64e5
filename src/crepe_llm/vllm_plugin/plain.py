"""Checkpoints that record plain or 4-bit 2:4 weights (``sparsity_config.format: dense``): found, and packed at load."""

from collections.abc import Collection, Container, Iterable, Iterator
from pathlib import Path

import torch
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK, FormatError
from crepe_llm.checkpoints.int4 import word_shape
from crepe_llm.checkpoints.reading import Checkpoint, read_strictly
from crepe_llm.checkpoints.two_of_four import int4_2of4, plain_2of4

PLAIN = "dense"
"""What ``sparsity_config.format`` is called where 2:4 weights are stored with their zeros."""


def read_plain(model_name: str, revision: str | None) -> tuple[Checkpoint, list[str], list[str]]:
    """Returns a checkpoint and the prefixes of its linear layers whose plain, and whose 4-bit, weights are exactly 2:4.

    All weights are read, one at a time. A checkpoint on the hub is downloaded first, into the hub's own cache.

    Raises:
        FormatError: a file of the checkpoint is missing or damaged (named).
    """
    folder = model_name
    if not Path(folder).is_dir():
        folder = download_weights_from_hf(model_name, None, ["*.safetensors"], revision)
    checkpoint = read_strictly(Path(folder))
    return checkpoint, plain_2of4(checkpoint), int4_2of4(checkpoint)


def word_shapes(checkpoint: Checkpoint, bits: Collection[int]) -> dict[str, list[int]]:
    """What weights that are packed in words of 32 bits say of their shape, by layer.

    Args:
        checkpoint: with the layers.
        bits: of the checkpoint's codes; their columns are compared if there is one width.

    Raises:
        FormatError: there is no such shape, or words or scales have another (named).
    """
    shapes = {}
    for tensor, stored in checkpoint.tensors.items():
        layer, _, part = tensor.rpartition(".")
        if part == "weight_packed" and f"{layer}.weight_shape" not in checkpoint.tensors:
            raise FormatError(
                f"{stored.file}: layer {layer} has weight_packed but no weight_shape; export the model again"
            )
        if part != "weight_shape" or f"{layer}.weight_packed" not in checkpoint.tensors:
            continue
        shapes[layer] = rows, columns = word_shape(checkpoint, tensor)
        words = -(-columns // (32 // min(bits))) if len(set(bits)) == 1 else None
        for kind, width in (("weight_packed", words), ("weight_scale", None)):
            if f"{layer}.{kind}" not in checkpoint.tensors:
                continue
            found = checkpoint.tensors[f"{layer}.{kind}"].shape
            if len(found) != 2 or found[0] != rows or (width is not None and found[1] != width):
                raise FormatError(
                    f"{stored.file}: tensor {layer}.{kind} is {list(found)}, but {tensor} says {[rows, columns]}; "
                    "export the model again"
                )
    return shapes


def pack_weights(
    weights: Iterable[tuple[str, torch.Tensor]], modules: Container[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors, the weight of each of ``modules`` turned into the parts of its packed form."""
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        if part == "weight" and module in modules:
            for kind, value in SPARSE_24_BITMASK.pack(tensor).items():
                yield f"{module}.{kind}", value
        else:
            yield name, tensor
