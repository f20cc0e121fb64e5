"""A linear layer while it is pruned, the one thing that every step reads and writes, with its weight and its mask."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from compressed_tensors.utils import align_module_device, update_offload_parameter

from crepe_llm import processes
from crepe_llm.functional.bitmask import RECORDED, pack_bits, unpack_bits
from crepe_llm.functional.masks import nonzero
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.models.linear import is_transposed

__all__ = [
    "Layer",
    "forget_mask",
    "input_channels",
    "linear_outputs",
    "mask_of",
    "record_mask",
    "recorded_mask",
    "recorded_masks",
    "set_weight_matrix",
    "share_layer",
    "weight_matrix",
]


@dataclass
class Layer:
    """One linear layer y = W x while it is pruned.

    Attributes:
        name: the module's name in the model.
        module: holds the weight until the steps are done.
        dense: [d_out, d_in], the weight that outputs are compared with; no step changes it.
        statistics: of the layer's calibration inputs. Layers with the same inputs share one object.
        weight: [d_out, d_in] in the module's dtype, as the steps so far have made it.
        keep: bool [d_out, d_in], the mask; None until a step has made one.
        cross: fp32 [d_in, d_in], sum over tokens of (input in the dense model) (input)^T; None where the two are the
            same or it was not asked for.
        routed: whether only some tokens reach the layer, so that the dense model may route others to it.
    """

    name: str
    module: torch.nn.Module
    dense: torch.Tensor
    statistics: InputStatistics
    weight: torch.Tensor
    keep: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    routed: bool = False

    @property
    def is_pruned(self) -> bool:
        """Whether the mask takes away a weight that the dense layer has."""
        return self.keep is not None and not bool((self.keep | (self.dense == 0)).all())

    @property
    def gram(self) -> torch.Tensor:
        """fp32 [d_in, d_in], X^T X of the inputs; the step that uses it must say that it needs it."""
        assert self.statistics.gram is not None
        return self.statistics.gram


def input_channels(module: torch.nn.Module) -> int:
    """The module's d_in."""
    return cast(torch.Tensor, module.weight).shape[0 if is_transposed(module) else 1]


def weight_matrix(module: torch.nn.Module) -> torch.Tensor:
    """The module's weight as [d_out, d_in], a view. Call it where offloaded weights are on the device."""
    weight = cast(torch.Tensor, module.weight)
    return weight.T if is_transposed(module) else weight


def set_weight_matrix(module: torch.nn.Module, weight: torch.Tensor) -> None:
    """Overwrite the module's weight, wherever it is kept, with one given as [d_out, d_in]."""
    # On the disk it is kept in one piece only.
    update_offload_parameter(module, "weight", (weight.T if is_transposed(module) else weight).contiguous())


@torch.no_grad()
def share_layer(module: torch.nn.Module, owner: int) -> None:
    """Give all processes the weight and the mask that one has made of a layer; nothing where that has made none."""
    if processes.count() == 1:
        return
    bits = processes.from_process(getattr(module, RECORDED, None), owner)
    if bits is None:
        return
    setattr(module, RECORDED, bits)
    with align_module_device(module):
        stored = cast(torch.Tensor, module.weight)
        processes.write_parameter(module, "weight", processes.broadcast(stored, owner), owner)


def linear_outputs(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a linear layer gives for inputs [..., d_in]; its hooks are not called."""
    bias = cast(torch.Tensor | None, getattr(module, "bias", None))
    return torch.nn.functional.linear(inputs.detach(), weight_matrix(module).detach(), bias)


def record_mask(module: torch.nn.Module, keep: torch.Tensor) -> None:
    """Keep a mask (bool [d_out, d_in]) with its module, for later modifiers, training and saving."""
    setattr(module, RECORDED, pack_bits(keep).cpu())


def forget_mask(module: torch.nn.Module) -> None:
    """Take a module's recorded mask back, if it has one: another one is in the zeros of its weight."""
    vars(module).pop(RECORDED, None)


def mask_of(module: torch.nn.Module) -> torch.Tensor:
    """The mask of a pruned layer, bool [d_out, d_in]: the recorded one, else what is not zero.

    A recorded mask counts as long as everything outside of it is zero. Where it does not hold, or there is none, the
    weight comes from elsewhere (a file, llm-compressor's own modifiers), and its zeros are all that is known.
    """
    weight = weight_matrix(module)
    keep = recorded_mask(module, weight)
    return nonzero(weight) if keep is None else keep


def recorded_mask(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor | None:
    """The mask that was recorded with a module, bool [d_out, d_in]; None if there is none or it does not hold.

    It does not hold where `weight`, the module's as [d_out, d_in], has another shape or is not zero outside of it.
    """
    bits = getattr(module, RECORDED, None)
    if bits is None or bits.shape != (weight.shape[0], -(-weight.shape[1] // 8)):
        return None
    keep = unpack_bits(bits, weight.shape[1]).to(weight.device)
    return None if bool((nonzero(weight) & ~keep).any()) else keep


def recorded_masks(model: Any) -> dict[str, torch.Tensor]:
    """By layer name the packed masks (uint8 [d_out, ceil(d_in / 8)]) of layers stored as [d_out, d_in]."""
    return {
        name: getattr(module, RECORDED)
        for name, module in model.named_modules()
        if hasattr(module, RECORDED) and not is_transposed(module)
    }
