"""Statistics of layers' inputs, gathered during a calibration epoch; no weight changes."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from compressed_tensors.utils import align_module_device, get_execution_device
from llmcompressor.core import active_session
from llmcompressor.modifiers import Modifier

from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.pruning.block_pass import Wanted, mask_for
from crepe_llm.pruning.layer import input_channels, weight_matrix

__all__ = ["Observer", "Uncalibrated", "is_usable"]

Uncalibrated = Literal["error", "dense"]


class Observer:
    """Watches what layers are given during a calibration epoch.

    Padding is left out, except by experts that only some tokens are routed to: the toolkit does not name their tokens.

    Args:
        owner: the modifier that the hooks belong to.
        dataloader: what the epoch iterates; its attention masks tell padding.
        wanted: the layers to watch, with what is gathered for each.
    """

    def __init__(self, owner: Modifier, dataloader: Any, wanted: dict[torch.nn.Module, Wanted]) -> None:
        self._owner, self._dataloader, self._wanted = owner, dataloader, dict(wanted)
        self._statistics: dict[torch.nn.Module, InputStatistics] = {}
        self._watching = True
        _start_recording(dataloader)
        for module in wanted:
            owner.register_hook(module, self._update, "forward_pre")  # type: ignore[arg-type]

    def watch_block(self, block: torch.nn.Module, see: Callable[..., None], when: str) -> None:
        """Call `see(block, args, kwargs[, output])` whenever the block runs; `when` is "forward_pre" or "forward"."""
        self._owner.register_hook(block, see, when, with_kwargs=True)  # type: ignore[arg-type]

    def take(self, module: torch.nn.Module) -> InputStatistics:
        """The statistics of a layer, which are forgotten here; without tokens if none has reached it."""
        empty = InputStatistics(input_channels(module))
        return self._statistics.pop(module, empty)

    def ended(
        self, modules: list[torch.nn.Module], uncalibrated: Uncalibrated
    ) -> Iterator[tuple[torch.nn.Module, str, InputStatistics]]:
        """Those of these modules that are watched and usable, with names and statistics, weights on the device."""
        for module in modules:
            wanted = self._wanted.pop(module, None)
            if wanted is None:
                continue
            statistics = self.take(module)
            with torch.no_grad(), align_module_device(module):
                if is_usable(wanted.name, module, statistics, uncalibrated):
                    yield module, wanted.name, statistics

    def mask(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """The attention mask of the running batch for hidden states [..., d_in]; None where all tokens count."""
        return mask_for(self.batch_mask(), inputs)

    def batch_mask(self) -> torch.Tensor | None:
        """The attention mask of the running batch, None where nothing in it is padding."""
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
            _stop_recording(self._dataloader)

    def _update(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        inputs, wanted = args[0], self._wanted[module]
        if module not in self._statistics:
            self._statistics[module] = InputStatistics(
                input_channels(module), gram=wanted.gram, device=get_execution_device(module)
            )
        weights = None if wanted.token_weights is None else wanted.token_weights(module, inputs)
        self._statistics[module].update(inputs, self.mask(inputs), weights)


def is_usable(name: str, module: torch.nn.Module, statistics: InputStatistics, uncalibrated: Uncalibrated) -> bool:
    """Whether a layer was calibrated. Call it where offloaded weights are on the device.

    Raises:
        ValueError: if no token reached it and `uncalibrated` is "error", or its inputs or weight are not finite.
    """
    if statistics.tokens == 0:
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
    """Have a dataloader remember every batch's attention mask in `.masks`.

    Pipelines hand hooks a layer's inputs and the index of the batch, but no mask; giving the loader a subclass of its
    own class is the one way to watch its iteration that works for any loader, also with worker processes.
    """
    if not hasattr(dataloader, "recorders"):
        original = type(dataloader)

        def iterate(self: Any) -> Iterator[Any]:
            self.masks = []
            for batch in original.__iter__(self):
                mask = batch.get("attention_mask") if hasattr(batch, "get") else None
                has_padding = mask is not None and mask.dim() == 2 and not bool(mask.all())
                self.masks.append(mask if has_padding else None)
                yield batch

        dataloader.__class__ = type(f"MaskRecording{original.__name__}", (original,), {"__iter__": iterate})
        dataloader.recorders = 0
    dataloader.recorders += 1


def _stop_recording(dataloader: Any) -> None:
    """Undo :func:`_start_recording`, once for each time that it was called."""
    dataloader.recorders -= 1
    if dataloader.recorders == 0:
        dataloader.__class__ = type(dataloader).__bases__[0]
        del dataloader.recorders, dataloader.masks
