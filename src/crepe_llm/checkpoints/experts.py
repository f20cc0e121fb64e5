"""The experts of a mixture in a checkpoint: stored one matrix an expert, merged while transformers reads them.

A matrix of an expert is called `G.N.kind`, where G ends in `.experts`: `model.layers.0.mlp.experts.3.up_proj`.
The experts of one G are packed together or not at all, because readers hold them in merged tensors.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK, FormatError
from crepe_llm.checkpoints.reading import Checkpoint, SparseLayer

__all__ = ["Expert", "UnpackExperts", "check_experts", "expert_of", "incomplete", "unpacking_experts"]

_FORMAT = SPARSE_24_BITMASK
_NAME = re.compile(r"(.*\bexperts)\.(\d+)\.(.+)")
_SCALE = "weight_scale"


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
    dtypes; it names the matrix."""
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


class UnpackExperts(ConversionOps):
    """transformers' conversion of the parts of packed experts into a list of dense weights a kind of matrix.

    It comes before transformers' own merging of these lists. INT8 weights are multiplied by their scales, as merged
    experts are no layers that compressed-tensors could run quantized.

    Args:
        kinds: the patterns of the parts by part and, under "weight_scale", of the scales, one entry a kind of matrix.
    """

    def __init__(self, kinds: Sequence[Mapping[str, str]]) -> None:
        self.kinds = kinds

    def convert(  # type: ignore[override]  # narrower: lists of tensors, as transformers' merging takes them
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        """Unpack the experts that are merged into the parameter `full_layer_name`, in its dtype.

        Raises FormatError, naming the parameter, if parts are malformed.
        """
        dtype = model.get_parameter(full_layer_name).dtype
        made = {}
        for patterns in self.kinds:
            stored = {part: input_dict.pop(patterns[part], []) for part in _FORMAT.parts}
            scales = input_dict.pop(patterns[_SCALE], [])
            weights = []
            for index, parts in enumerate(zip(*stored.values(), strict=True)):
                weight = _unpacked(dict(zip(stored, parts, strict=True)), str(full_layer_name))
                weights.append((weight.float() * scales[index].float() if scales else weight).to(dtype))
            made[patterns[_FORMAT.values]] = weights
        return made


def unpacking_experts(conversions: Sequence[Any], checkpoint: Checkpoint) -> dict[WeightConverter, WeightConverter]:
    """What reads packed experts, by the conversion of `conversions` that reads the same experts where they are plain.

    Empty if the checkpoint has no packed experts.
    """
    if not any(map(expert_of, checkpoint.layers)):
        return {}
    return {
        conversion: _unpacking(conversion)
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        and all(re.search(r"experts\.?\*\.[\w.]+\.weight$", p) for p in conversion._original_source_patterns)
    }


def _unpacking(conversion: WeightConverter) -> WeightConverter:
    stems = [pattern.removesuffix("weight") for pattern in conversion._original_source_patterns]
    kinds = [{part: f"{stem}{part}$" for part in (*_FORMAT.parts, _SCALE)} for stem in stems]
    made = WeightConverter(
        [pattern for patterns in kinds for pattern in patterns.values()],
        list(conversion._original_target_patterns),
        operations=[UnpackExperts(kinds), *conversion.operations],
    )
    made.scope_prefix, made.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return made


def _unpacked(parts: dict[str, torch.Tensor], parameter: str) -> torch.Tensor:
    """The dense weight of the parts; of the right shape where they are empty and a load is only tried."""
    values = parts[_FORMAT.values]
    if values.is_meta:
        return values.new_empty(values.shape[0], 2 * values.shape[1])
    try:
        return _FORMAT.unpack(parts)
    except FormatError as error:
        raise FormatError(f"an expert of {parameter}: {error}") from None
