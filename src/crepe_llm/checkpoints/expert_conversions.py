"""Packed layers that transformers merges or splits while it reads them, as it does with experts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from crepe_llm.checkpoints.experts import expert_of, matrices_of
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK, FormatError
from crepe_llm.checkpoints.llama4 import WHOLE
from crepe_llm.checkpoints.reading import Checkpoint

__all__ = [
    "UnpackExperts",
    "merging_experts",
    "merging_llama4",
    "names_of_whole",
    "unpacking_experts",
    "unpacking_fused",
]

_FORMAT = SPARSE_24_BITMASK
_SCALE = "weight_scale"


class UnpackExperts(ConversionOps):
    """transformers' conversion of the parts of packed layers into a list of dense weights a kind of matrix.

    It comes before transformers' own merging of these lists, or splitting of a list's only weight. INT8 weights are
    multiplied by their scales, as merged experts are no layers that compressed-tensors could run quantized.

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


class _Converter(WeightConverter):
    """A conversion of several parts into one weight or several; the latter transformers allows to its own only."""

    __slots__ = ()

    def __init__(self, sources: list[str], targets: list[str], operations: list[ConversionOps]) -> None:
        WeightTransform.__init__(self, sources, targets)
        self.operations = operations
        self.force_cpu = False


def unpacking_experts(conversions: Sequence[Any], checkpoint: Checkpoint) -> dict[WeightConverter, WeightConverter]:
    """What reads packed experts, by the conversion of `conversions` that reads the same experts where they are plain.

    Empty if the checkpoint has no packed experts.
    """
    if not any(map(expert_of, checkpoint.layers)):
        return {}
    return {conversion: _unpacking(conversion) for conversion in merging_experts(conversions)}


def unpacking_fused(conversions: Sequence[Any], checkpoint: Checkpoint) -> dict[WeightConverter, WeightConverter]:
    """What reads packed layers that a model holds split, such as HRM-Text's queries, keys and values, by the conversion
    of `conversions` that reads the same layers where they are plain.

    Empty if the checkpoint has no such layers, or has them with scales, which nothing splits.
    """
    layers = [name for name in checkpoint.layers if f"{name}.{_SCALE}" not in checkpoint.tensors]
    return {
        conversion: _unpacking(conversion)
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        and len(conversion._original_source_patterns) == 1 < len(conversion._original_target_patterns)
        and any(re.search(f"{conversion._original_source_patterns[0]}$", f"{layer}.weight") for layer in layers)
    }


def merging_experts(conversions: Sequence[Any]) -> list[WeightConverter]:
    """Those of transformers' conversions that merge the plain weights of experts."""
    return [
        conversion
        for conversion in conversions
        if isinstance(conversion, WeightConverter)
        and all(re.search(r"experts\.?\*\.[\w.]+\.weight$", p) for p in conversion._original_source_patterns)
    ]


def names_of_whole(conversions: Sequence[Any]) -> dict[str, WeightRenaming]:
    """The renamings of weights that hold all experts of a layer and can be packed, by the pattern of their prefix."""
    found = {}
    for renaming in conversions:
        if isinstance(renaming, WeightRenaming):
            stem = renaming._original_source_patterns[0].removesuffix(r"\.weight")
            if matrices_of(stem.replace("\\", "")):
                found[stem] = renaming
    return found


def _unpacking(conversion: WeightConverter) -> WeightConverter:
    stems = [pattern.removesuffix("weight") for pattern in conversion._original_source_patterns]
    kinds = [{part: f"{stem}{part}$" for part in (*_FORMAT.parts, _SCALE)} for stem in stems]
    made = _Converter(
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
        raise FormatError(f"a layer that is merged into {parameter} or split: {error}") from None


def merging_llama4() -> list[WeightConverter]:
    """What reads Llama 4's experts that are stored apart into a model that holds them whole."""
    turn = Transpose(dim0=1, dim1=2)
    return [
        WeightConverter(
            [f"experts.*.{part}.weight" for part in parts],
            f"experts.{whole}",
            operations=[MergeModulelist(dim=0), *([Concatenate(dim=1)] if len(parts) > 1 else []), turn],
        )
        for whole, parts in WHOLE.items()
    ]
