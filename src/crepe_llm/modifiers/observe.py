"""Statistics of layers' inputs, gathered during a calibration epoch; no weight changes."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from compressed_tensors.utils import align_module_device, get_execution_device
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier

from crepe_llm import processes
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.modifiers.routing import Routing
from crepe_llm.pruning.block_pass import Wanted, mask_for
from crepe_llm.pruning.layer import input_channels, weight_matrix

__all__ = ["Observer", "Uncalibrated", "is_usable"]

Uncalibrated = Literal["error", "dense"]


class Observer:
    """Watches what layers are given during a calibration epoch.

    Padding is left out, except by experts that are given their own tokens alone: the toolkit does not name these.
    Attention masks tell it: those that the model is called with or, where a pipeline runs it in parts, those that
    iterating the data has recorded. What counts for an expert are the tokens that are routed to it (:class:`Routing`).

    Args:
        owner: the modifier that the hooks belong to.
        model: the model that is calibrated.
        dataloader: what the epoch iterates; None where nothing is calibrated.
        wanted: the layers to watch, with what is gathered for each.
    """

    def __init__(
        self, owner: Modifier, model: torch.nn.Module, dataloader: Any, wanted: dict[torch.nn.Module, Wanted]
    ) -> None:
        self._owner, self._model, self._dataloader = owner, model, dataloader
        self._routing = Routing(model)
        self._wanted = {module: self.counting(module, each) for module, each in wanted.items()}
        self._statistics: dict[torch.nn.Module, InputStatistics] = {}
        self._running: list[torch.Tensor | None] = []  # the mask of the call of the whole model that is under way
        self._watching = True
        _start_recording(dataloader)
        owner.register_hook(model, self._begin, "forward_pre", with_kwargs=True)  # type: ignore[arg-type]
        owner.register_hook(model, self._end, "forward")  # type: ignore[arg-type]
        for module in wanted:
            owner.register_hook(module, self._update, "forward_pre")  # type: ignore[arg-type]

    def counting(self, module: torch.nn.Module, wanted: Wanted) -> Wanted:
        """What is wanted of a layer, from the tokens that its router sends to it."""
        return self._routing.counting(module, wanted)

    def watch_block(self, block: torch.nn.Module, see: Callable[..., None], when: str) -> None:
        """Call `see(block, args, kwargs[, output])` whenever the block runs; `when` is "forward_pre" or "forward"."""
        self._owner.register_hook(block, see, when, with_kwargs=True)  # type: ignore[arg-type]

    def take(self, module: torch.nn.Module) -> InputStatistics:
        """The statistics of a layer over all processes, forgotten here; without tokens if none has reached it.

        Several processes call it for the same layers in the same order.
        """
        statistics = self._statistics.pop(module, None) or self._none_yet(module)
        processes.add_up_statistics(statistics)
        return statistics

    def ending(self, modules: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Those of these modules that are watched, in an order that is the same in all processes.

        So are layers that have been called and are not among the modules of any part of the model: pipelines do not
        name those of an encoder that its decoder's part runs in one call.
        """
        named = [module for module in dict.fromkeys(modules) if module in self._wanted]
        called = {self._wanted[module].name for module in self._statistics.keys() - set(named)}
        anywhere = set().union(*processes.gather(called))
        return [*named, *(module for module, wanted in self._wanted.items() if wanted.name in anywhere)]

    def ended(
        self, modules: list[torch.nn.Module], uncalibrated: Uncalibrated | None
    ) -> Iterator[tuple[torch.nn.Module, str, InputStatistics]]:
        """Those of :meth:`ending` that are usable, with names and statistics, weights on the device."""
        taken = {module: self.take(module) for module in self.ending(modules)}
        for module in list(taken):
            with torch.no_grad(), align_module_device(module):
                if not is_usable(self._wanted[module].name, module, taken[module], uncalibrated):
                    del taken[module], self._wanted[module]
        processes.wait()  # until all have looked: another may write a weight that lies in memory that they share
        for module in list(taken):
            name, statistics = self._wanted.pop(module).name, taken.pop(module)
            with torch.no_grad(), align_module_device(module):
                yield module, name, statistics

    def mask(self, inputs: torch.Tensor, module: torch.nn.Module | None = None) -> torch.Tensor | None:
        """The attention mask of the running batch for hidden states [..., d_in], or for what a layer is given; None
        where all tokens count."""
        return mask_for(self.batch_mask(), inputs, 1 if module is None else self._routing.copies(module))

    def batch_mask(self) -> torch.Tensor | None:
        """The attention mask of the running batch, None where nothing in it is padding."""
        if self._running:
            return self._running[-1]
        return self._dataloader.masks[active_session().state.current_batch_idx]

    @property
    def unseen(self) -> list[str]:
        """The names of the layers whose calibration has not ended."""
        return [wanted.name for wanted in self._wanted.values()]

    def stop(self) -> None:
        """Remove the owner's hooks, and leave the dataloader as it was. Idempotent."""
        if self._watching:
            self._watching = False
            self._owner.remove_hooks()
            self._routing.stop()
            _stop_recording(self._dataloader)

    def _none_yet(self, module: torch.nn.Module) -> InputStatistics:
        gram, device = self._wanted[module].gram, get_execution_device(module)
        return InputStatistics(input_channels(module), gram=gram, device=device)

    def _begin(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        self._running.append(_padding(given.get("attention_mask")))

    def _end(self, model: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._running.clear()

    def _update(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        inputs, wanted = args[0], self._wanted.get(module)
        if wanted is None:  # of a layer that several blocks share: it is calibrated and pruned with the first of them
            return
        if module not in self._statistics:
            self._statistics[module] = self._none_yet(module)
        mask = self.mask(inputs, module)
        weights = None if wanted.token_weights is None else wanted.token_weights(inputs, mask)
        self._statistics[module].update(inputs, mask, weights)


def is_usable(
    name: str, module: torch.nn.Module, statistics: InputStatistics, uncalibrated: Uncalibrated | None
) -> bool:
    """Whether a layer can be worked on: it was calibrated, or `uncalibrated` is None, which stands for a modifier that
    needs no calibration. Call it where offloaded weights are on the device.

    Raises:
        ValueError: if no token reached it and `uncalibrated` is "error", or its inputs or weight are not finite.
    """
    if statistics.tokens == 0 and uncalibrated is not None:
        if uncalibrated == "dense":
            return False
        raise ValueError(
            f"{name} never saw a calibration token, so its inputs are unknown: calibrate with more or other "
            "text, add it to `ignore`, or set `uncalibrated: dense` to leave such layers unpruned"
        )
    if not bool(torch.isfinite(statistics.square_sum).all()):
        channels = (~torch.isfinite(statistics.square_sum)).nonzero().flatten().tolist()
        raise ValueError(
            f"the inputs of {name} are NaN or infinite in {len(channels)} channels, first {channels[:5]}: "
            "the model overflows on this data; load it with dtype=float32 or bfloat16"
        )
    if not bool(torch.isfinite(weight_matrix(module)).all()):
        raise ValueError(f"the weight of {name} contains NaN or infinity: the checkpoint is damaged")
    return True


def _start_recording(dataloader: Any) -> None:
    """Have a dataloader remember every batch's attention mask in `.masks`; nothing to do for a list, a tuple or None.

    Pipelines hand hooks a layer's inputs and the index of the batch, but no mask; giving the loader a subclass of its
    own class is the one way to watch its iteration that works for any loader, also with worker processes.
    """
    if dataloader is None or isinstance(dataloader, list | tuple):
        return
    if not hasattr(dataloader, "recorders"):
        original = type(dataloader)

        def iterate(self: Any) -> Iterator[Any]:
            self.masks = []
            for batch in original.__iter__(self):
                self.masks.append(_padding(batch.get("attention_mask") if hasattr(batch, "get") else None))
                yield batch

        dataloader.__class__ = type(f"MaskRecording{original.__name__}", (original,), {"__iter__": iterate})
        dataloader.recorders = 0
    dataloader.recorders += 1


def _stop_recording(dataloader: Any) -> None:
    """Undo :func:`_start_recording`, once for each time that it was called."""
    if dataloader is None or isinstance(dataloader, list | tuple):
        return
    dataloader.recorders -= 1
    if dataloader.recorders == 0:
        dataloader.__class__ = type(dataloader).__bases__[0]
        vars(dataloader).pop("masks", None)
        del dataloader.recorders


def _padding(mask: Any) -> torch.Tensor | None:
    """An attention mask [batch, length] that has padding, else None."""
    is_one = isinstance(mask, torch.Tensor) and mask.dim() == 2
    return mask if is_one and not bool(mask.all()) else None
