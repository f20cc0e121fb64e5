"""What modifiers share that prune the whole model with candidates, and judge them before any weight is changed."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor.modifiers.utils.hooks import HooksMixin

from crepe_llm.models.blocks import find_blocks
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.observe import Observer, Uncalibrated, is_usable
from crepe_llm.modifiers.routing import Routing
from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.pruning.layer import Layer
from crepe_llm.search.rehearsal import Calls, Pruning
from crepe_llm.search.whole_model import CALIBRATING_TOKENS

__all__ = ["as_it_predicts", "if_usable", "pruning_of", "texts_in", "watch_calls", "working_head"]


def texts_in(dataloader: Any, modifier: str) -> list[torch.Tensor]:
    """The sequences of calibration data without padding, int64 [any] each, of two tokens at least.

    Args:
        dataloader: what is iterated.
        modifier: what needs them.

    Raises:
        ValueError: there are fewer than two (each half of the text needs one), or a batch holds no text.
    """
    found = []
    for batch in dataloader:
        if "input_ids" not in batch:
            raise ValueError(
                f"{modifier} compares predictions of text, and a batch of the calibration data holds "
                f"{', '.join(batch)}: give it input_ids"
            )
        masks = batch.get("attention_mask")
        masks = torch.ones_like(batch["input_ids"]) if masks is None else masks
        for ids, mask in zip(batch["input_ids"], masks, strict=True):
            if int(mask.bool().sum()) > 1:
                found.append(ids[mask.bool()])
    if len(found) < 2:
        raise ValueError(
            f"{modifier} needs at least two sequences of two tokens or more, and there are {len(found)}: calibrate "
            "with two at least, better with 16"
        )
    return found


def watch_calls(observer: Observer, model: torch.nn.Module) -> Calls | None:
    """What decoder blocks will have been called with when the calibration has ended; None where they are not found."""
    try:
        calls = Calls(find_blocks(model).values(), CALIBRATING_TOKENS)
    except ValueError:
        return None

    def see(block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.see(block, args, kwargs, observer.batch_mask())

    for block in calls.blocks:
        observer.watch_block(block, see, "forward_pre")
    return calls


def pruning_of(crepe: CRePEModifier, masks_alone: bool, routing: Routing) -> Pruning:
    """How a CRePEModifier and the modifiers of its pass prune, as they are now, or its masks alone.

    Args:
        crepe: the modifier.
        masks_alone: whether none of the steps after its own is run.
        routing: sees which tokens count for experts, as the recipe's own pass does.
    """
    run = crepe.pruning_pass
    run.forget()
    if masks_alone:
        wanted = {module: routing.counting(module, Wanted(name)) for module, name in crepe.layers.items()}
        return Pruning(wanted, Calibration(), lambda layer: if_usable(layer, crepe.uncalibrated, crepe.step))
    wanted = {module: routing.counting(module, run.wanted(module)) for module in crepe.layers}
    return Pruning(wanted, run.calibration, lambda layer: if_usable(layer, crepe.uncalibrated, run.run_steps))


def if_usable(layer: Layer, uncalibrated: Uncalibrated, run: Any) -> None:
    """Run a step on a layer that was calibrated."""
    if is_usable(layer.name, layer.module, layer.statistics, uncalibrated):
        run(layer)


@contextmanager
def as_it_predicts(model: Any) -> Iterator[Routing]:
    """Have a model predict meanwhile as it does outside of a calibration: no hooks, no dropout, its own head.

    Gives what sees which tokens its routers send to which experts meanwhile.
    """
    training, routing = model.training, Routing(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(HooksMixin.disable_hooks())
        stack.enter_context(working_head(model))
        model.eval()
        try:
            yield routing
        finally:
            routing.stop()
            model.train(training)


@contextmanager
def working_head(model: Any) -> Iterator[None]:
    """Undo, meanwhile, that the toolkit replaces the head's forward during calibration."""
    head = model.get_output_embeddings()
    with patch_attr(head, "forward", functools.partial(type(head).forward, head)):
        yield
