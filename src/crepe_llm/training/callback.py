"""Masks for transformers' `Trainer`, and for those made from it, such as TRL's."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from crepe_llm.training.masked import KeptMasks, held_masks, keep_masks

__all__ = ["KeepMasksCallback"]


class KeepMasksCallback(TrainerCallback):
    """Keeps a pruned model's masks while a `Trainer` trains it, and checks them at the end.

        Trainer(..., callbacks=[KeepMasksCallback()])

    Args:
        masks: as for :func:`crepe_llm.training.masked.keep_masks`; None for those that the model has.
    """

    def __init__(self, masks: Mapping[str, torch.Tensor] | None = None) -> None:
        self.masks = masks
        self.held: KeptMasks | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Masks the model once it is wrapped and a checkpoint is loaded."""
        held = held_masks(model) if self.masks is None else None
        self.held = held or keep_masks(model, self.masks)
        self.held.attach()
        self.held.apply()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError, naming the layers, if a mask did not hold."""
        if self.held is not None:
            self.held.check()
