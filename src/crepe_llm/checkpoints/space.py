"""Whether a checkpoint can be written to a place, known before the work, and how much room it takes."""

import tempfile
from math import prod
from pathlib import Path
from typing import Any

from crepe_llm.checkpoints.folders import check_space, refuse_model, resolved
from crepe_llm.checkpoints.reading import QUANTIZATION_SUFFIXES, Checkpoint
from crepe_llm.checkpoints.two_of_four import is_linear_weight

__all__ = ["check_destination", "least_bytes", "least_packed_bytes", "plain_bytes"]

# Packing replaces one shard at a time, so a packed one is on the disk beside all the dense ones. Of a shard, unless
# the run says otherwise:
_SHARD_BYTES = 20 * 10**9
_PACKED = 0.6


def check_destination(
    destination: str | Path, dense_bytes: int, beside: int = 0, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Raise OSError if no model of `dense_bytes` can be written to a folder: no folder, no permission, no space, or one
    that holds a model.

    The run writes so many bytes `beside` it, too, before it writes the model, in files of at most `shard_bytes`.
    """
    if not str(destination):
        raise NotADirectoryError("the output folder is an empty text: name a folder to save to")
    destination = resolved(Path(destination))
    refuse_model(destination)
    parent = next(folder for folder in (destination, *destination.parents) if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file: name a folder to save to")
    try:
        tempfile.TemporaryDirectory(prefix=".crepe-", dir=parent).cleanup()
    except OSError as error:
        raise OSError(f"{destination} cannot be written ({error.strerror}): name another folder") from error
    check_space(parent, beside + dense_bytes + round(_PACKED * min(dense_bytes, shard_bytes)))


def least_bytes(model: Any) -> int:
    """The least number of bytes that a model takes on disk while it is saved, before its layers are packed."""
    from compressed_tensors.offload import disable_onloading

    with disable_onloading():
        bits = {
            id(module.weight): module.quantization_scheme.weights.num_bits
            for module in model.modules()
            if getattr(getattr(module, "quantization_scheme", None), "weights", None) and hasattr(module, "weight")
        }
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        return sum(
            weight.numel() * min(8 * weight.element_size(), bits.get(id(weight), 64)) // 8
            for name, weight in model.named_parameters()
            if name not in tied and not name.endswith(QUANTIZATION_SUFFIXES)
        )


def least_packed_bytes(checkpoint: Checkpoint, name: str) -> int:
    """The bytes of a tensor that stays as it is, or of its packed form if it can be that of a 2:4 layer."""
    stored = checkpoint.tensors[name]
    if not is_linear_weight(checkpoint, name):
        return stored.size
    return stored.size // 2 + prod(stored.shape) // 8


def plain_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of a checkpoint's tensors once its layers are unpacked."""
    parts = {f"{layer}.{part}" for layer, packed in checkpoint.layers.items() for part in packed.format.parts}
    plain = sum(stored.size for name, stored in checkpoint.tensors.items() if name not in parts)
    return plain + sum(prod(layer.shape) * layer.dtype.itemsize for layer in checkpoint.layers.values())
