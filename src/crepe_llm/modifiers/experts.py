"""Mixtures of experts: oneshot takes experts apart into linear layers, and these are saved as transformers reads them.

What transformers reads, vLLM reads, too. A family whose checkpoints hold one matrix an expert (Mixtral's w1, w2, w3)
is saved under those names and packed where it is 2:4; in all others the experts are put together again. GraniteMoE's
are then packed in one tensor. GPT-OSS's stay plain: each lies there transposed, with gate and up in turn.
"""

import copy
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from compressed_tensors.utils import match_named_modules, patch_attr
from llmcompressor.modeling.moe.linear_experts import ExpertMLPWithGate, ExpertMLPWithoutGate, LinearExperts2D
from llmcompressor.modeling.moe.linearize import get_linearized_moes
from llmcompressor.modeling.moe.llama4 import Llama4LinearExperts
from loguru import logger
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from crepe_llm.checkpoints import is_2of4
from crepe_llm.checkpoints.expert_conversions import names_of_whole
from crepe_llm.pruning.layer import recorded_masks

__all__ = ["check_experts", "masks_as_stored", "restore_experts", "saves_whole_experts", "take_llama4_apart"]

# How a checkpoint's matrix of each expert is written in transformers' table, and which of our layers are in it.
_EACH = re.compile(r"experts\.?\*\.(\w+)\.weight$")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}


def take_llama4_apart(model: Any) -> None:
    """Take apart the experts of a Llama 4 without its vision tower, at which llm-compressor fails."""
    config = model.config
    if hasattr(config, "text_config"):
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, Llama4TextExperts):
            holder: Any = SimpleNamespace(text_config=config)
            model.set_submodule(name, Llama4LinearExperts.from_experts_module(module, holder))


def check_experts(model: Any, quantizing: list[Any]) -> None:
    """Raise ValueError if experts that oneshot has taken apart cannot be saved such that transformers reads them.

    Args:
        model: in oneshot's hands.
        quantizing: the modifiers of the recipe that quantize.
    """
    apart = _taken_apart(model)
    if not apart:
        return
    quantized = [m for m in quantizing if _matches(model, m, [name for name, _ in apart])]
    if _with_own_names(model) is not None:
        if quantized:
            logger.warning(
                f"{type(quantized[0]).__name__} quantizes the experts of {type(model).__name__}: vLLM reads such a "
                "checkpoint; transformers reads experts that are 2:4, dequantized, and no others"
            )
        return
    name, experts = apart[0]
    if not _comes_apart_again(experts):
        raise ValueError(
            f"the experts {name} of {type(model).__name__} cannot be put together again as transformers reads them, so "
            "this model cannot be pruned in oneshot"
        )
    if quantized and not isinstance(experts, Llama4LinearExperts):
        raise ValueError(
            f"{type(quantized[0]).__name__} would quantize the experts of {type(model).__name__}, which transformers "
            'reads in full precision only: add "re:.*experts.*" to its `ignore`'
        )


def _matches(model: Any, modifier: Any, prefixes: list[str]) -> bool:
    """Whether a modifier that quantizes targets a layer below one of these names."""
    matched = match_named_modules(model, modifier.resolved_targets, modifier.ignore)
    return any(layer.startswith(f"{prefix}.") for layer, _ in matched for prefix in prefixes)


def saves_whole_experts(model: Any) -> bool:
    """Whether the model's checkpoints hold all experts of a layer in one tensor that is not packed."""
    apart = _taken_apart(model)
    if not apart or isinstance(apart[0][1], Llama4LinearExperts) or _with_own_names(model) is not None:
        return False
    return not names_of_whole(get_model_conversion_mapping(model, add_legacy=False))


def restore_experts(model: Any) -> None:
    """Have experts that oneshot has taken apart saved as transformers reads them. Idempotent."""
    apart = _taken_apart(model)
    own = _with_own_names(model) if apart else None
    if own is not None:
        model._weight_conversions = own
        return
    for name, experts in apart:
        if isinstance(experts, Llama4LinearExperts) and (_is_quantized(model) or _will_be_packed(model)):
            continue  # apart they can be packed, and transformers takes them apart where any weight is quantized
        if _is_quantized(experts):
            logger.warning(f"{name} is quantized and stays taken apart: transformers will not read it")
            continue
        model.set_submodule(name, _together(experts))


def masks_as_stored(model: Any) -> dict[str, torch.Tensor]:
    """The recorded masks (uint8 [d_out, ceil(d_in / 8)]) by the names of the layers in the checkpoint of the model."""
    conversions = getattr(model, "_weight_conversions", None) or []
    reverse = [conversion.reverse_transform() for conversion in reversed(conversions)]
    renamings = [one for one in reverse if isinstance(one, WeightRenaming)]
    converters = [one for one in reverse if isinstance(one, WeightConverter)]
    masks = {}
    for name, bits in recorded_masks(model).items():
        stored, _ = rename_source_key(f"{name}.weight", renamings, converters, reverse=True)
        masks[stored.removesuffix(".weight")] = bits
    return masks


class _ExpertName(WeightRenaming):
    """The name of a layer of each expert in a checkpoint."""

    __slots__ = ()


def _taken_apart(model: Any) -> list[tuple[str, LinearExperts2D]]:
    """Experts that oneshot took apart; those that were loaded so have their names already."""
    for _, experts in get_linearized_moes(model):
        if isinstance(experts, Llama4LinearExperts) and not hasattr(experts, "_source_experts_cls"):
            _remember_llama4(experts, model.config.get_text_config())
    return [(name, one) for name, one in get_linearized_moes(model) if hasattr(one, "_source_experts_cls")]


def _remember_llama4(experts: LinearExperts2D, config: Any) -> None:
    """Note what llm-compressor does not of Llama 4: where experts come from, and how that holds them."""
    source: Any = experts
    source._source_experts_cls, source._source_config = Llama4TextExperts, config
    for name in ("is_transposed", "has_bias", "has_gate"):
        setattr(Llama4TextExperts, name, getattr(experts, name))


@torch.no_grad()
def _comes_apart_again(experts: LinearExperts2D) -> bool:
    """Whether experts that are put together hold the same weights."""
    together, again = _together(experts), cast(Any, copy.deepcopy(experts))
    for parameter in again.parameters():
        parameter.zero_()
    for index in range(experts.num_experts):
        again[index].copy_from_experts_module(together, index)
    return all(torch.equal(one, other) for one, other in zip(experts.parameters(), again.parameters(), strict=True))


def _is_quantized(model: torch.nn.Module) -> bool:
    """Whether anything in a model is quantized."""
    return any(hasattr(module, "quantization_scheme") for module in model.modules())


def _will_be_packed(model: Any) -> bool:
    """Whether a layer of the model is 2:4, so that its checkpoint is a compressed one."""
    layers = (m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".experts." not in n)
    return any(is_2of4(layer.weight) for layer in layers)


def _together(experts: LinearExperts2D) -> Any:
    kind: Any = type(experts[0])
    if kind.copy_from_experts_module in (
        ExpertMLPWithGate.copy_from_experts_module,
        ExpertMLPWithoutGate.copy_from_experts_module,
    ):
        return experts.to_experts_module()
    # llm-compressor takes GPT-OSS's interleaved gates apart, but puts them together as halves.
    with patch_attr(kind, "copy_to_experts_module", _interleave(experts.is_transposed)):
        return experts.to_experts_module()


def _interleave(transposed: bool) -> Callable[[ExpertMLPWithGate, Any, int], None]:
    def copy_to(self: ExpertMLPWithGate, experts: Any, index: int) -> None:
        gate_up = torch.stack([self.gate_proj.weight, self.up_proj.weight], 1).flatten(0, 1)
        experts.gate_up_proj[index].copy_(gate_up.T if transposed else gate_up)
        experts.down_proj[index].copy_(self.down_proj.weight.T if transposed else self.down_proj.weight)
        if experts.has_bias:
            experts.gate_up_proj_bias[index].copy_(torch.stack([self.gate_proj.bias, self.up_proj.bias], 1).flatten())
            experts.down_proj_bias[index].copy_(self.down_proj.bias)

    return copy_to


def _with_own_names(model: Any) -> list[WeightTransform] | None:
    """The model's conversions, with names for each expert's layers in the place of those that merge experts.

    None if its checkpoints do not hold each expert by itself.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(conversion, _ExpertName) for conversion in conversions):
        return list(conversions)
    named = [_names_of(conversion) for conversion in conversions]
    if all(names is None for names in named):
        return None
    pairs = zip(conversions, named, strict=True)
    return [new for conversion, names in pairs for new in ([conversion] if names is None else names)]


def _names_of(conversion: WeightTransform) -> list[WeightTransform] | None:
    """Renamings of each expert's layers for a conversion that merges them; None for any other."""
    if not isinstance(conversion, WeightConverter):
        return None
    stored = [_EACH.search(source) for source in conversion._original_source_patterns]
    parts = _PARTS.get(conversion._original_target_patterns[0].rpartition(".")[2], ())
    if len(stored) != len(parts) or not all(stored):
        return None
    renamings: list[WeightTransform] = []
    for match, part in zip(stored, parts, strict=True):
        assert match is not None
        renaming = _ExpertName(rf"\.experts\.(\d+)\.{match[1]}\.", rf".experts.\1.{part}.")
        renaming.scope_prefix, renaming.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
        renamings.append(renaming)
    return renamings
