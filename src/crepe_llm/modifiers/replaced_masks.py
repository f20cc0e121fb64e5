"""llm-compressor's own modifiers that prune: what they prune loses the masks that were recorded before."""

from typing import Any

from llmcompressor.core import Event, State
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase

from crepe_llm.pruning.layer import forget_mask

__all__ = ["forget_replaced_masks"]


def forget_replaced_masks() -> None:
    """Have what llm-compressor's own modifiers prune from now on lose its recorded masks: its zeros are the mask.

    They are zeros of the recorded mask, too, which would count them as weights that are kept, and refit them.
    """
    prune = SparsityModifierBase.on_sequential_epoch_end

    def on_sequential_epoch_end(self: Any, state: State, event: Event, **kwargs: Any) -> Any:
        waiting = getattr(self, "_num_samples", {})  # layers that are not pruned yet
        before = list(waiting)
        result = prune(self, state, event, **kwargs)
        for module in before:
            if module not in waiting:
                forget_mask(module)
        return result

    SparsityModifierBase.on_sequential_epoch_end = on_sequential_epoch_end  # type: ignore[method-assign]
