"""Checkpoints that record plain or 4-bit 2:4 weights (``sparsity_config.format: dense``): found, and packed at load."""

from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import torch
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf

from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK
from crepe_llm.checkpoints.reading import Checkpoint, read_strictly
from crepe_llm.checkpoints.saving import int4_2of4, plain_2of4

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
