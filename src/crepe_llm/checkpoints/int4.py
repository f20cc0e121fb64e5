"""4-bit weights in compressed-tensors' pack-quantized form: which of them are zero."""

import torch

from crepe_llm.checkpoints.formats import FormatError
from crepe_llm.checkpoints.reading import Checkpoint

__all__ = ["int4_kept", "word_shape"]

# A packed signed int4 value is stored with this offset, so this nibble is a zero weight where there are no zero points.
_INT4_ZERO = 8


def int4_kept(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """Bool [rows, columns]: which weights of an int4 tensor in compressed-tensors' pack-quantized form are not zero.

    None where the tensor is no such one. A code that is its group's zero point is zero. Raises FormatError, naming the
    tensor, if what says its shape is malformed.
    """
    layer = name.removesuffix("_packed")
    if not name.endswith(".weight_packed") or f"{layer}_shape" not in checkpoint.tensors:
        return None
    if checkpoint.tensors[name].dtype != "I32":
        return None
    packed = checkpoint.load(name)
    rows, columns = word_shape(checkpoint, f"{layer}_shape")
    # Eight values an int32: other widths are not the int4 that this reads.
    if packed.ndim != 2 or packed.shape != (rows, (columns + 7) // 8):
        return None
    codes = _nibbles(packed)[:, :columns]
    if f"{layer}_zero_point" not in checkpoint.tensors:
        return codes != _INT4_ZERO
    zero = _nibbles(checkpoint.load(f"{layer}_zero_point").t()).t()[:rows]
    if zero.shape[0] != rows:
        return None
    if f"{layer}_g_idx" in checkpoint.tensors:  # columns were quantized in another order
        group = checkpoint.load(f"{layer}_g_idx").flatten().long()
        fits = len(group) == columns and bool(((group >= 0) & (group < zero.shape[1])).all())
        return codes != zero[:, group] if fits else None
    if columns % zero.shape[1]:
        return None
    return codes != zero.repeat_interleave(columns // zero.shape[1], 1)


def word_shape(checkpoint: Checkpoint, name: str) -> list[int]:
    """What a tensor `weight_shape` says: [rows, columns] of a weight whose codes are packed in words.

    Raises FormatError, naming file and tensor, if it is not two positive integers.
    """
    found = checkpoint.load(name)
    shape = found.flatten().tolist()
    if found.is_floating_point() or len(shape) != 2 or min(shape) < 1:
        raise FormatError(
            f"{checkpoint.tensors[name].file}: tensor {name} holds {shape} where rows and columns are needed; export "
            "the model again"
        )
    return shape


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The eight values of each int32, ascending: uint8 [rows, 8 * words] of int32 [rows, words]."""
    pairs = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
