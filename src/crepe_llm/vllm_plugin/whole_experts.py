"""Experts that a checkpoint stores in one tensor: taken apart while vLLM reads them, which then has them by name."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from crepe_llm.checkpoints.experts import matrices_of
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK

__all__ = ["apart", "stored_name", "take_apart"]

_ONE = re.compile(r"(.*)\.experts\.\d+\.(\w+)\.(\w+)")


def apart(tensors: Mapping[str, tuple[int, ...]], part: str) -> dict[str, list[str]]:
    """The names that the matrices of experts in one tensor get, by the prefix of that tensor.

    Args:
        tensors: a checkpoint's tensors, with their shapes.
        part: which of their parts has one matrix an expert: "compressed", or "weight" of those that are plain.
    """
    found = {}
    for tensor, shape in tensors.items():
        layer, _, end = tensor.rpartition(".")
        if end == part and len(shape) == 3 and matrices_of(layer):
            experts = [_expert(layer, number) for number in range(shape[0])]
            found[layer] = [f"{expert}.{kind}" for expert in experts for kind in matrices_of(layer)]
    return found


def take_apart(
    weights: Iterable[tuple[str, torch.Tensor]], layers: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors, the parts of packed ``layers`` that hold all experts turned into those of each matrix."""
    for name, tensor in weights:
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in SPARSE_24_BITMASK.parts:
            yield name, tensor
            continue
        kinds = matrices_of(layer)
        if part == "shape":
            count, rows, columns = tensor.flatten().tolist()
            pieces = [torch.tensor([[rows // len(kinds)], [columns]])] * (count * len(kinds))
        else:
            pieces = [piece for expert in tensor for piece in expert.chunk(len(kinds))]
        for place, piece in enumerate(pieces):
            number, kind = divmod(place, len(kinds))
            yield f"{_expert(layer, number)}.{kinds[kind]}.{part}", piece


def stored_name(name: str, layers: Collection[str]) -> str:
    """The checkpoint's name of a tensor of one expert's matrix, where those of its module are among ``layers``."""
    found = _ONE.fullmatch(name)
    if found:
        for end in ("input_linear", "output_linear"):
            if found[2] in matrices_of(f"{found[1]}.{end}") and any(one.startswith(f"{found[1]}.") for one in layers):
                return f"{found[1]}.{end}.{found[3]}"
    return name


def _expert(layer: str, number: int) -> str:
    return f"{layer.rpartition('.')[0]}.experts.{number}"
