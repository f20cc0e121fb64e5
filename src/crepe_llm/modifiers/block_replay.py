"""Running a decoder block again, once some of its layers have changed, to calibrate those behind them."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device
from compressed_tensors.utils import get_execution_device
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch.utils.hooks import RemovableHandle
from tqdm import tqdm

__all__ = ["CALIBRATED_IN_PARTS", "BlockReplay"]

#: What is said where a block was never run as a whole.
CALIBRATED_IN_PARTS = (
    "true_sequential and asymmetric_calibration run whole decoder blocks, and these are calibrated in parts: leave out "
    "sequential_targets, or set `true_sequential: false` and `asymmetric_calibration: 0`"
)


class BlockReplay:
    """Remembers the batches that decoder blocks are calibrated on, and runs a block on them again.

    A block's batches are kept on the CPU until its layers are done. Layers with the same inputs are one group, and what
    groups but the first are given before the block is run again is of no use (:meth:`is_deferred`).

    Args:
        owner: whose hooks these are; removing them is its work.
        layers: linear layers, by which blocks are divided; those outside of `blocks` have no part in it.
        blocks: the model's decoder blocks.
    """

    def __init__(self, owner: Modifier, layers: Iterable[torch.nn.Module], blocks: list[torch.nn.Module]) -> None:
        inside = {module: (block, name) for block in blocks for name, module in block.named_modules()}
        self._block_of = {layer: inside[layer][0] for layer in layers if layer in inside}
        # Experts of a block count as one.
        self._kind_of = {layer: re.sub(r"\.\d+\.", ".*.", inside[layer][1]) for layer in self._block_of}
        self._groups: dict[torch.nn.Module, dict[str, int]] = {}
        self._batches: dict[torch.nn.Module, dict[int, tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._calls: list[tuple[str, torch.Tensor]] = []
        for block in dict.fromkeys(self._block_of.values()):
            owner.register_hook(block, self._see_block, "forward", with_kwargs=True)  # type: ignore[arg-type]
        for layer in self._block_of:
            # In front of the hooks that ask is_deferred.
            owner.register_hook(layer, self._see_inputs, "forward_pre", prepend=True)  # type: ignore[arg-type]

    def is_deferred(self, layer: torch.nn.Module) -> bool:
        """Whether what the layer is given now does not count, as its block will be run again for it."""
        block = self._block_of.get(layer)
        return block is not None and self._groups.get(block, {}).get(self._kind_of[layer], 0) > 0

    def steps(
        self, modules: list[torch.nn.Module], watch: Callable[[list[torch.nn.Module]], set[RemovableHandle]]
    ) -> Iterator[list[torch.nn.Module]]:
        """The given layers in the order in which the model calls them, those with the same inputs together.

        Before each group but the first of a block, that block is run on all of its batches again, with the hooks only
        that `watch` gives for the group.

        Raises:
            ValueError: if a block was never run as a whole.
        """
        rest = [module for module in modules if module not in self._block_of]
        if rest:
            yield rest
        for block in dict.fromkeys(self._block_of[module] for module in modules if module in self._block_of):
            if block not in self._batches:
                raise ValueError(CALIBRATED_IN_PARTS)
            groups = self._groups.pop(block, {})  # from here on nothing is deferred
            layers: dict[int, list[torch.nn.Module]] = {}
            for module in modules:
                if self._block_of.get(module) is block:
                    # Experts that no token reached come last.
                    place = groups.get(self._kind_of[module], len(groups))
                    layers.setdefault(place, []).append(module)
            for place in sorted(layers):
                if place:
                    self._run(block, watch(layers[place]))
                yield layers[place]
            del self._batches[block]

    def _run(self, block: torch.nn.Module, keep: set[RemovableHandle]) -> None:
        device = get_execution_device(block)
        batches = self._batches[block].items()
        with HooksMixin.disable_hooks(keep=keep), torch.no_grad():
            for batch, (args, kwargs) in tqdm(batches, desc="Calibrating again", leave=False):
                active_session().state.current_batch_idx = batch
                block(*send_to_device(args, device), **send_to_device(kwargs, device))

    def _see_inputs(self, layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        kind, groups = self._kind_of[layer], self._groups.setdefault(self._block_of[layer], {})
        if kind not in groups:
            same = [other for other, inputs in self._calls if inputs is args[0]]
            groups[kind] = groups[same[0]] if same else len(set(groups.values()))
        self._calls.append((kind, args[0]))

    def _see_block(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        batch = active_session().state.current_batch_idx
        self._batches.setdefault(block, {})[batch] = send_to_device((args, kwargs), "cpu")
        self._calls.clear()
