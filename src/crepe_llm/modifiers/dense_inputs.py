"""What the dense model would feed layers, beside what they are fed behind pruned ones."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from compressed_tensors.utils import get_execution_device
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from torch.utils.hooks import RemovableHandle

from crepe_llm.functional.statistics import token_products
from crepe_llm.modifiers.block_replay import CALIBRATED_IN_PARTS
from crepe_llm.modifiers.calibration import block_inputs, block_outputs, token_mask

__all__ = ["DenseInputs"]


class DenseInputs:
    """Products of each layer's inputs in the dense model with those that it is given, summed over calibration tokens.

    Each decoder block is run once more on every batch while it is dense itself: on what the dense blocks in front of it
    have made of the batch. One hidden state per calibration token is kept for that, on the CPU. In front of the first
    block with one of the layers nothing has been pruned, so there, and in that block, nothing is run.

    Args:
        owner: whose hooks these are; removing them is its work.
        layers: linear layers to watch; those outside of `blocks` are left out.
        blocks: the model's decoder blocks, in order.
        dataloader: that records attention masks (:func:`crepe_llm.modifiers.calibration.start_recording`).
        is_deferred: asked whether a layer's products are learnt when its block is run again (:meth:`again`), not now;
            its dense inputs are kept until then, on the CPU.
        token_weights: what each token counts in the products of a layer, by the inputs that it is given.
    """

    def __init__(
        self,
        owner: Modifier,
        layers: Iterable[torch.nn.Module],
        blocks: list[torch.nn.Module],
        dataloader: Any,
        is_deferred: Callable[[torch.nn.Module], bool],
        token_weights: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor | None],
    ) -> None:
        block_of = {module: block for block in blocks for module in block.modules()}
        self._block_of = {module: block_of[module] for module in layers if module in block_of}
        self._dataloader = dataloader
        self._cross: dict[torch.nn.Module, torch.Tensor] = {}
        self._routed: set[torch.nn.Module] = set()
        self._reached: set[torch.nn.Module] = set()
        self._hidden: dict[int, torch.Tensor] = {}
        self._given: dict[torch.nn.Module, list[torch.Tensor]] = {}
        self._is_deferred = is_deferred
        self._token_weights = token_weights
        self._dense: dict[torch.nn.Module, dict[int, torch.Tensor]] = {}
        self._again: set[torch.nn.Module] = set()
        self._tokens: dict[int, int] = {}
        self._replaying = False
        places = [blocks.index(block) for block in self._block_of.values()]
        watched = blocks[min(places) : max(places) + 1] if places else []
        self._last = watched[-1] if watched else None
        for block in watched:
            owner.register_hook(block, self._see_block, "forward", with_kwargs=True)  # type: ignore[arg-type]
        self._handles = {
            layer: owner.register_hook(layer, self._see_inputs, "forward_pre")  # type: ignore[arg-type]
            for layer in self._block_of
        }

    def again(self, layers: list[torch.nn.Module]) -> set[RemovableHandle]:
        """What these deferred layers are given is learnt by these hooks, when their block is run again."""
        layers = [layer for layer in layers if layer in self._block_of]
        self._again.update(layers)
        return {self._handles[layer] for layer in layers}

    def pop(self, module: torch.nn.Module) -> torch.Tensor | None:
        """fp32 [d_in, d_in], the sum over tokens of (dense input) (given input)^T; None where the two are the same.

        None, too, where :meth:`is_routed`.

        Raises:
            ValueError: if the layer's block was never run as a whole.
        """
        block = self._block_of.get(module)
        if block is not None and block not in self._reached:
            raise ValueError(CALIBRATED_IN_PARTS)
        self._dense.pop(module, None)
        cross = self._cross.pop(module, None)
        return None if self.is_routed(module) else cross

    def is_routed(self, module: torch.nn.Module) -> bool:
        """Whether the layer is an expert to which only some tokens go: the dense model may route others to it."""
        return module in self._routed

    def _see_block(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._reached.add(block)
        batch = active_session().state.current_batch_idx
        given = block_inputs(args, kwargs)
        dense = self._hidden.pop(batch, None)
        self._tokens[batch] = given.shape[:-1].numel()
        if dense is not None:
            args, kwargs = _with_inputs(dense.to(given), args, kwargs)
            self._replaying = True
            try:
                with HooksMixin.disable_hooks(keep=set(self._handles.values())), torch.no_grad():
                    output = block(*args, **kwargs)
            finally:
                self._replaying = False
        self._given.clear()
        if block is not self._last:
            self._hidden[batch] = block_outputs(output).to("cpu")

    def _see_inputs(self, layer: torch.nn.Module, args: tuple[Any, ...]) -> None:
        batch = active_session().state.current_batch_idx
        if layer in self._again:
            dense = self._dense.get(layer, {}).get(batch)
            self._add(layer, batch, None if dense is None else dense.to(args[0]), args[0])
        elif self._is_deferred(layer):
            # In the first block nothing is replayed, as what it is given is what the dense one is.
            if self._replaying or batch not in self._hidden:
                self._dense.setdefault(layer, {})[batch] = args[0].to("cpu")
        elif self._replaying:
            earlier = self._given.get(layer)
            self._add(layer, batch, args[0], earlier.pop(0) if earlier else None)
        else:
            self._given.setdefault(layer, []).append(args[0])

    def _add(self, layer: torch.nn.Module, batch: int, dense: torch.Tensor | None, given: torch.Tensor | None) -> None:
        if (
            dense is None
            or given is None
            or given.shape != dense.shape
            or dense.shape[:-1].numel() != self._tokens[batch]
        ):
            self._routed.add(layer)
            return
        mask = token_mask(self._dataloader, dense)
        product = token_products(dense, given, mask, self._token_weights(layer, given))
        if layer in self._cross:
            self._cross[layer] += product
        else:
            self._cross[layer] = product.to(get_execution_device(layer))


def _with_inputs(
    hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
