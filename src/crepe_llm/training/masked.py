"""Masks that hold while a model trains: pruned weights stay exactly zero, whatever the loop and the optimiser.

Gradients are masked as soon as they are accumulated, so that the optimiser never hears of a pruned weight: its state
stays zero there, and gradient norms count kept weights only. After each step of an optimiser the pruned weights are set
to zero, so that an update that mixes a matrix's entries (Muon) or a state from elsewhere cannot bring them back.
"""

import warnings
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from crepe_llm.functional.bitmask import pack_bits, unpack_bits, zero_pruned_
from crepe_llm.functional.masks import nonzero
from crepe_llm.models.linear import is_transposed
from crepe_llm.pruning.layer import recorded_mask

__all__ = ["KeptMasks", "find_masks", "held_masks", "keep_masks", "sparse_layer"]

# A dense model holds few exact zeros, one dequantised from 4 bit up to 11 % a layer (Gemma-3-270M), a pruned one more.
_SPARSE = 0.25

# By model the masks that hold in it, so that a caller need not keep what `keep_masks` returns.
_HELD: "weakref.WeakKeyDictionary[torch.nn.Module, KeptMasks]" = weakref.WeakKeyDictionary()


def keep_masks(model: torch.nn.Module, masks: Mapping[str, torch.Tensor] | None = None) -> "KeptMasks":
    """Make every step of any optimiser leave the pruned weights of a model exactly zero.

    Call it once, before training. It holds for weights in bf16 or with fp32 masters, under gradient accumulation and
    checkpointing, after a resume, under torch.compile, DDP and FSDP2, whether it was called before or after the model
    was wrapped. Masks take 1 bit a weight; under FSDP2 each process keeps those of its own rows.

    Args:
        model: what trains. Weights outside their masks are set to zero at once.
        masks: by the name of a linear layer bool [d_out, d_in], or by the name of another parameter bool of its shape;
            True where the weight is kept. None for those of :func:`find_masks`.

    Returns:
        What holds the masks; it can check and remove them. Another call for the same model takes its place.

    Warns:
        UserWarning: masked layers have adapters of PEFT whose product is dense, which merging adds to all weights.

    Raises:
        ValueError: the model has no masks, or a mask is of no parameter or of another shape.
    """
    model = _unwrapped(model)
    bits = find_masks(model) if masks is None else _packed(model, masks)
    _warn_of_adapters(model, bits)
    previous = _HELD.pop(model, None)
    if previous is not None:
        previous.remove()
    held = KeptMasks(model, [_Kept(name, *_place(model, name), kept) for name, kept in bits.items()])
    _HELD[model] = held
    return held


def held_masks(model: torch.nn.Module) -> "KeptMasks | None":
    """What holds a model's masks since :func:`keep_masks` was called for it, else None."""
    held = _HELD.get(_unwrapped(model))
    return None if held is None or held.is_removed else held


def find_masks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The masks of a pruned model: those that were recorded when it was pruned, else what is not zero.

    In a model in which no mask was recorded and no matrix is zero to over a quarter, nothing was pruned. In any other
    all zeros count, those of barely pruned layers included. A matrix of nothing but zeros is one that has yet to learn,
    as a LoRA adapter's second is, and not pruned.

    Args:
        model: its embeddings, and matrices that share their weights, are left out.

    Returns:
        By name the packed masks, uint8 [rows, ceil(columns / 8)] of the parameter as it is stored; of parameters of
        more dimensions all but the last are rows. Parameters without pruned weights are left out.

    Raises:
        ValueError: nothing was pruned.
    """
    found: dict[str, torch.Tensor] = {}
    pruned, most, where = False, 0.0, "none"
    for name, module, attribute in _matrices(model):
        weight = _whole(getattr(module, attribute))
        recorded = _recorded(module, weight) if attribute == "weight" and weight.dim() == 2 else None
        keep = nonzero(weight) if recorded is None else recorded
        zeros = 1 - int(keep.count_nonzero()) / max(1, keep.numel())
        if recorded is None and zeros == 1:
            continue
        if zeros > most:
            most, where = zeros, name
        pruned |= zeros > _SPARSE or (recorded is not None and zeros > 0)
        if zeros:
            found[name] = pack_bits(keep.flatten(0, -2))
    if not pruned:
        cure = "Prune it first, or give masks"
        if any(_adds_product(module) for module in model.modules()):
            cure = (
                "If it was pruned before its adapters were added, their start took the zeros (init_lora_weights "
                "pissa, olora and others change the weights): add them with init_lora_weights=True, or give masks, "
                "those found before"
            )
        raise ValueError(
            f"the model has no masks: none were recorded, and no matrix is zero to over {_SPARSE:.0%} "
            f"(the most is {most:.1%}, {where}). {cure}"
        )
    return found


def sparse_layer(layers: Mapping[str, torch.nn.Module]) -> tuple[str, float] | None:
    """The first of the layers that has so many zeros that it was pruned, and its share of them; None if none has.

    One of nothing but zeros has yet to learn.
    """
    for name, module in layers.items():
        weight = getattr(module, "weight", None)
        zeros = 0.0 if weight is None else 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        if _SPARSE < zeros < 1:
            return name, zeros
    return None


class KeptMasks:
    """Masks that hold in a model, made by :func:`keep_masks`."""

    def __init__(self, model: torch.nn.Module, layers: "list[_Kept]") -> None:
        self._model = weakref.ref(model)
        self._every = layers
        self.is_removed = False
        self.apply()
        itself = weakref.ref(self)
        self._hooks = [
            register_optimizer_step_pre_hook(lambda optimizer, *_: _call(itself, KeptMasks._before_step, optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: _call(itself, KeptMasks._after_step, optimizer)),
        ]
        weakref.finalize(self, _remove, self._hooks)
        self.attach()

    @property
    def _layers(self) -> "list[_Kept]":
        """Those whose modules are still there: a model may lose some, to adapters that merge, for one."""
        return [layer for layer in self._every if not layer.is_gone]

    @property
    def bits(self) -> dict[str, torch.Tensor]:
        """By name the packed masks, uint8 [rows, ceil(columns / 8)], of the part that this process holds."""
        return {layer.name: layer.bits for layer in self._layers}

    def attach(self) -> None:
        """Mask the gradients of weights that have taken the place of others since, as FSDP2 makes them.

        Each optimiser step does so by itself. Called between wrapping a model and its first step, it keeps the norm of
        the first gradient free of pruned weights, too.
        """
        for layer in self._layers:
            layer.attach()

    def apply(self) -> None:
        """Set all pruned weights to zero."""
        for layer in self._layers:
            layer.zero_weight()

    def broken(self) -> list[str]:
        """The names of the layers in which a pruned weight is not zero; of FSDP2's shards those of this process."""
        return [layer.name for layer in self._layers if layer.is_broken()]

    def check(self) -> None:
        """Raise ValueError, naming the layers, if a pruned weight is not zero."""
        broken = self.broken()
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(self._layers)} layers have pruned weights that are not zero, the first being "
                f"{broken[0]}: something other than an optimiser's step wrote to them after the last one"
            )

    def remove(self) -> None:
        """Let the weights go. Idempotent."""
        self.is_removed = True
        _remove(self._hooks)
        for layer in self._layers:
            layer.detach()

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        for layer in self._trained_by(optimizer):
            if layer.attach():
                layer.zero_gradient()
            layer.clean_state(optimizer)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for layer in self._trained_by(optimizer):
            layer.zero_weight()

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> "list[_Kept]":
        """The layers that an optimiser trains: all, where it has none of the model's parameters but copies of them,
        from which it may write into the model."""
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        layers = self._layers
        found = [layer for layer in layers if id(layer.weight) in trained]
        model = self._model()
        if found or model is None or any(id(parameter) in trained for parameter in model.parameters()):
            return found
        return layers


class _Kept:
    """One masked parameter: where it is, its mask as bits, and the hook on its gradient."""

    def __init__(self, name: str, module: torch.nn.Module, attribute: str, bits: torch.Tensor) -> None:
        self.name = name
        # Weakly, as what holds the masks lives as long as the model.
        self._module = weakref.ref(module)
        self._attribute = attribute
        self._shape = tuple(self._parameter().shape)
        self._shard: DTensor | None = None
        self._hooked: torch.Tensor | None = None
        self._hook: Any = None
        self._cleaned: weakref.ref[torch.optim.Optimizer] | None = None
        self.bits = bits

    @property
    def is_gone(self) -> bool:
        return self._module() is None

    @property
    def weight(self) -> torch.Tensor:
        """The parameter; of FSDP2's two the sharded one, even while its place holds the gathered one."""
        weight = self._parameter()
        if self._shard is not None and not isinstance(weight, DTensor):
            return self._shard
        if tuple(weight.shape) != self._shape:
            raise ValueError(
                f"{self.name} has become {list(weight.shape)}, its mask is {list(self._shape)}: FSDP 1 and ZeRO 3 "
                "flatten weights; take FSDP2 (fsdp_version: 2) or DDP"
            )
        if isinstance(weight, DTensor):
            if self._shard is None:
                self._cut(weight)
            self._shard = weight
        return weight

    def attach(self) -> bool:
        """Mask the gradient of the parameter that is there now; whether that is new."""
        weight = self.weight
        if weight is self._hooked or not weight.requires_grad:
            return False
        self.detach()
        # Before DDP reduces a gradient, after FSDP2 has done so, and in both cases before norms are taken.
        self._hook = weight.register_post_accumulate_grad_hook(lambda trained: self._zero(trained.grad))
        self._hooked = weight
        return True

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._hooked = None

    def zero_gradient(self) -> None:
        if self.weight.grad is not None:
            self._zero(self.weight.grad)

    def zero_weight(self) -> None:
        self._zero(self.weight)

    def clean_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Before an optimiser's first step, free its state of pruned weights: it may come from a dense training."""
        if self._cleaned is not None and self._cleaned() is optimizer:
            return
        self._cleaned = weakref.ref(optimizer)
        for value in optimizer.state.get(self.weight, {}).values():
            local = _local(value) if isinstance(value, torch.Tensor) else None
            if type(local) is torch.Tensor and local.is_floating_point() and value.shape == self.weight.shape:
                self._zero(local)

    @torch.no_grad()
    def is_broken(self) -> bool:
        weight = _local(self.weight)
        keep = unpack_bits(self._bits_at(weight.device), weight.shape[-1]).view(weight.shape)
        return bool((nonzero(weight) & ~keep).any())

    def _parameter(self) -> torch.Tensor:
        return getattr(self._module(), self._attribute)

    def _cut(self, weight: DTensor) -> None:
        """Keep the mask of those entries alone that this process holds."""
        shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        keep = unpack_bits(self.bits, self._shape[-1]).view(self._shape)
        for dimension, (size, start) in enumerate(zip(shape, offset, strict=True)):
            keep = keep.narrow(dimension, min(start, keep.shape[dimension] - size), size)
        self.bits = pack_bits(keep.flatten(0, -2)).to(_local(weight).device)

    def _bits_at(self, device: torch.device) -> torch.Tensor:
        if self.bits.device != device:
            self.bits = self.bits.to(device)
        return self.bits

    @torch.no_grad()
    def _zero(self, tensor: torch.Tensor) -> None:
        tensor = _local(tensor).detach()
        zero_pruned_(tensor, self._bits_at(tensor.device))


def _call(reference: "weakref.ref[KeptMasks]", method: Any, optimizer: torch.optim.Optimizer) -> None:
    held = reference()
    if held is not None:
        method(held, optimizer)


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds, which is all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _recorded(module: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor | None:
    """The mask that was recorded with a layer, in the shape of its weight as it is stored."""
    if is_transposed(module):
        keep = recorded_mask(module, weight.T)
        return None if keep is None else keep.T
    return recorded_mask(module, weight)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside of torch.compile's and DDP's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, torch.nn.Module):
            model = inner
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _adds_product(module: torch.nn.Module) -> bool:
    """Whether it is a layer in adapters of PEFT whose update is a whole matrix, as LoRA's and LoHa's is."""
    return hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")


def _warn_of_adapters(model: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Warn, once for all layers, if merging adapters would fill the zeros of masked layers."""
    layers = [module for module in model.modules() if _adds_product(module)]
    adapted = {id(part) for layer in layers for part in (layer, layer.base_layer)}
    count = sum(id(_place(model, name)[0]) in adapted for name in masks) if adapted else 0
    if count:
        warnings.warn(
            f"{count} masked layers have adapters whose product is dense: the masks hold in the weights beneath, but "
            "not after merging. Leave the adapters unmerged, or train with `crepe recover --method lora`, whose "
            "updates keep the masks",
            stacklevel=3,
        )


def _matrices(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str]]:
    """Name, module and attribute of every parameter of two or more dimensions that no embedding has a part in."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    seen = set(tables)
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            whole = name if attribute == "weight" else f"{name}.{attribute}" if name else attribute
            yield whole, module, attribute


def _place(model: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The module and the attribute that a mask's name stands for: a layer's weight, or a parameter."""
    modules = dict(model.named_modules())
    if isinstance(getattr(modules.get(name), "weight", None), torch.Tensor):
        return modules[name], "weight"
    parent, _, attribute = name.rpartition(".")
    if isinstance(getattr(modules.get(parent), attribute, None), torch.Tensor):
        return modules[parent], attribute
    raise ValueError(f'masks["{name}"] is of no layer or parameter of {type(model).__name__}: take a name in it')


def _packed(model: torch.nn.Module, masks: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Given masks as bits of the parameters as they are stored."""
    if not masks:
        raise ValueError("masks is empty: leave it out for those that the model has")
    found: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}  # of the parameters: modules may share one
    for name, keep in masks.items():
        module, attribute = _place(model, name)
        other = names.setdefault(id(getattr(module, attribute)), name)
        if other != name:
            raise ValueError(f'masks["{other}"] and masks["{name}"] are of one parameter: give one')
        if not isinstance(keep, torch.Tensor):
            raise ValueError(f'masks["{name}"] is a {type(keep).__name__}; expected a bool tensor')
        shape = list(getattr(module, attribute).shape)
        if attribute == "weight" and is_transposed(module):
            keep = keep.T
        if keep.dtype != torch.bool or list(keep.shape) != shape or len(shape) < 2:
            raise ValueError(
                f'masks["{name}"] is {str(keep.dtype).removeprefix("torch.")} {list(keep.shape)}; expected bool {shape}'
            )
        found[name] = pack_bits(keep.flatten(0, -2))
    return found
