"""The experts of a mixture in a checkpoint: stored one matrix an expert, or all experts of a layer in one tensor.

A matrix of an expert is called `G.N.kind`, where G ends in `.experts`: `model.layers.0.mlp.experts.3.up_proj`.
The experts of one G are packed together or not at all, because readers hold them in merged tensors.

GraniteMoE has `block_sparse_moe.input_linear` [experts, 2 d_inner, d], gate over up, and `output_linear`
[experts, d, d_inner].
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from crepe_llm.checkpoints.formats import FormatError
from crepe_llm.checkpoints.reading import Checkpoint, SparseLayer

__all__ = ["Expert", "check_experts", "expert_of", "incomplete", "matrices_of"]

_NAME = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")

_WHOLE = re.compile(r"(.*\bblock_sparse_moe)\.(input_linear|output_linear)")
_MATRICES = {"input_linear": ("gate_proj", "up_proj"), "output_linear": ("down_proj",)}


class Expert(NamedTuple):
    """The place of a matrix: the group of experts, the number of the expert and what of it the matrix is."""

    group: str
    number: int
    kind: str

    @property
    def name(self) -> str:
        """The prefix of its tensors."""
        return f"{self.group}.{self.number}.{self.kind}"


def expert_of(layer: str) -> Expert | None:
    """The place of a layer with this prefix among experts, or None if it is not in one."""
    found = _NAME.fullmatch(layer)
    return Expert(found[1], int(found[2]), found[3]) if found else None


def matrices_of(layer: str) -> tuple[str, ...]:
    """What the rows of each expert are, in equal shares, in a weight of all experts of a layer with this prefix.

    Empty if the name is none of such a weight. It holds the input channels on its last axis.
    """
    found = _WHOLE.fullmatch(layer)
    return _MATRICES[found[2]] if found else ()


def incomplete(layers: Iterable[str]) -> dict[str, list[Expert]]:
    """By group, the matrices that are missing among layers with these prefixes, ascending; only groups with such.

    A group has every kind of matrix that one of its experts has, for all experts up to the last.
    """
    groups: dict[str, set[Expert]] = defaultdict(set)
    for expert in filter(None, map(expert_of, layers)):
        groups[expert.group].add(expert)
    missing = {}
    for group, found in groups.items():
        kinds, last = {expert.kind for expert in found}, max(expert.number for expert in found)
        whole = {Expert(group, number, kind) for number in range(last + 1) for kind in kinds}
        if whole - found:
            missing[group] = sorted(whole - found)
    return missing


def check_experts(checkpoint: Checkpoint) -> None:
    """Raise FormatError if only some matrices of a group of experts are packed, or one kind has several shapes or
    dtypes, or scales of several; it names the matrix."""
    for experts in incomplete(checkpoint.layers).values():
        name = experts[0].name
        what = "is stored plain" if f"{name}.weight" in checkpoint.tensors else "is missing"
        raise FormatError(
            f"{checkpoint.files[0].parent}: {name} {what}, but other experts of {experts[0].group} are packed: the "
            "experts of a layer are packed together or not at all; export the model again"
        )
    first: dict[tuple[str, str], SparseLayer] = {}
    for name, layer in checkpoint.layers.items():
        expert = expert_of(name)
        if expert is None:
            continue
        other = first.setdefault((expert.group, expert.kind), layer)
        if (layer.shape, layer.dtype) != (other.shape, other.dtype):
            raise FormatError(
                f"{checkpoint.files[0].parent}: {name} is packed from {layer.dtype} {list(layer.shape)}, {other.name} "
                f"from {other.dtype} {list(other.shape)}; the experts of a layer have one shape"
            )
        found, wanted = (_scale_of(checkpoint, one.name) for one in (layer, other))
        if found != wanted:
            raise FormatError(
                f"{checkpoint.files[0].parent}: {name}.weight_scale is {found}, {other.name}.weight_scale is {wanted}; "
                "the experts of a layer have scales of one shape: export the model again"
            )


def _scale_of(checkpoint: Checkpoint, layer: str) -> str:
    stored = checkpoint.tensors.get(f"{layer}.weight_scale")
    return "missing" if stored is None else f"{stored.dtype} {list(stored.shape)}"
