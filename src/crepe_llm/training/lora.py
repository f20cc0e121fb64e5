"""Low-rank updates of masked weights: an update is multiplied by its mask, so that merging leaves the mask as it is."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.nn.utils import parametrize

from crepe_llm.functional.bitmask import unpack_bits

__all__ = ["add_updates", "merge_updates"]

# LoRA's alpha over its rank: what the product of its matrices is multiplied by.
_SCALE = 2


def add_updates(model: torch.nn.Module, masks: Mapping[str, torch.Tensor | None], rank: int) -> None:
    """Give layers a trainable low-rank update: weight + mask * (up @ down), 0 at the start.

    The weights themselves are frozen. LoRA (arXiv 2106.09685); the mask is ours.

    Args:
        model: holds the layers.
        masks: by layer the packed mask of the weight as it is stored, uint8 [rows, ceil(columns / 8)], or None for a
            layer that is not pruned.
        rank: of the updates.
    """
    for name, bits in masks.items():
        module = model.get_submodule(name)
        weight = cast(torch.nn.Parameter, module.weight).requires_grad_(False)
        update = _Update(weight, bits, rank)
        parametrize.register_parametrization(module, "weight", update)


def merge_updates(model: torch.nn.Module, masks: Mapping[str, torch.Tensor | None], state: Mapping[str, Any]) -> None:
    """Add trained updates to the weights of a model that has none, in its precision.

    Args:
        model: as it was before :func:`add_updates`.
        masks: as there.
        state: the updates' matrices by their names in the model that trained.
    """
    for name, bits in masks.items():
        weight = cast(torch.Tensor, model.get_submodule(name).weight)
        up, down = (state[f"{name}.parametrizations.weight.0.{part}"] for part in ("up", "down"))
        with torch.no_grad():
            weight.copy_(_updated(weight.float(), up.to(weight.device), down.to(weight.device), bits))


class _Update(torch.nn.Module):
    """The parametrization of one weight."""

    bits: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bits: torch.Tensor | None, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.up = torch.nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        self.down = torch.nn.Parameter(torch.empty(rank, columns, device=weight.device))
        torch.nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.register_buffer("bits", bits, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, _Masked.apply(weight, self.up, self.down, self.bits))


class _Masked(torch.autograd.Function):
    """weight + mask * (up @ down), of which only the bits of the mask are kept for the way back."""

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, bits: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(up, down, bits)
        return _updated(weight, up, down, bits)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        up, down, bits = ctx.saved_tensors
        with _in_fp32(up):
            gradient = _SCALE * _kept(gradients[0].float(), bits)
            return None, gradient @ down.T, up.T @ gradient, None


def _updated(weight: torch.Tensor, up: torch.Tensor, down: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor:
    with _in_fp32(up):
        return weight + _kept(_SCALE * (up @ down), bits).to(weight.dtype)


def _kept(matrix: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor:
    return matrix if bits is None else torch.where(unpack_bits(bits.to(matrix.device), matrix.shape[1]), matrix, 0.0)


def _in_fp32(tensor: torch.Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
