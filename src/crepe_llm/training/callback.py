"""Masks for transformers' `Trainer`, and for those made from it, such as TRL's."""

import functools
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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
        _leave_checkpoints_plain(model, Path(args.output_dir))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ValueError, naming the layers, if a mask did not hold."""
        if self.held is not None:
            self.held.check()


def _leave_checkpoints_plain(model: Any, folder: Path) -> None:
    """Make a model save the checkpoints of a `Trainer`, which are in `folder`, as its class does.

    A model that `oneshot` gave back packs what it saves, and a `Trainer` that resumes, or takes the best state, reads
    plain weights only. What is saved elsewhere is packed as before.
    """
    packing = vars(model).get("save_pretrained")
    if packing is None:
        return
    if hasattr(packing, "_plain_folders"):  # an earlier training's
        packing._plain_folders.add(folder)
        return
    plain_folders = {folder}

    @functools.wraps(packing)
    def save_pretrained(itself: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        path = Path(save_directory)
        if path.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-") and not plain_folders.isdisjoint(path.parents):
            type(itself).save_pretrained(itself, save_directory, *args, **kwargs)
        elif isinstance(packing, types.MethodType):
            packing.__func__(itself, save_directory, *args, **kwargs)
        else:  # llm-compressor's own, which saves the model that it was made for
            packing(save_directory, *args, **kwargs)

    save_pretrained._plain_folders = plain_folders  # type: ignore[attr-defined]
    model.save_pretrained = types.MethodType(save_pretrained, model)
