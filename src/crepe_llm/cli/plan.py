"""What `crepe prune` says before its work, and how far the work is."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crepe_llm.cli.quiet import Progress

_DOES = {
    "cuts": "cuts channels of FFNs",
    "searches": "searches for coefficients",
    "allocates": "chooses each layer's sparsity",
    "permutes": "permutes channels",
    "prunes": "prunes",
    "re-prunes": "chooses masks again",
    "refits": "refits the weights that are kept",
    "quantizes": "quantizes",
    "saves": "saves packed layers",
}


def recipe_in_words(modifiers: list[Any]) -> str:
    """Which modifiers a recipe has, what each does, and the structure or sparsity of those that prune."""
    from crepe_llm.modifiers.order import role_of

    said = []
    for modifier in modifiers:
        role = role_of(modifier)
        words = [type(modifier).__name__, _DOES.get(role or "", "")]
        structure, sparsity = getattr(modifier, "mask_structure", None), getattr(modifier, "sparsity", None)
        if role == "prunes" and structure not in (None, "0:0"):
            words.append(f"to {structure}")
        elif role in ("prunes", "cuts", "allocates") and isinstance(sparsity, float):
            words.append(f"({sparsity:.0%} of the weights)")
        said.append(" ".join(word for word in words if word))
    return ", ".join(said)


def device_in_words() -> str:
    """The device that a model is pruned on."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def size_in_words(count: float) -> str:
    """A number of bytes, in MB or GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@contextmanager
def followed(progress: Progress, modifiers: list[Any], blocks: int) -> Iterator[None]:
    """Show how far llm-compressor's `oneshot` is inside the block: by decoder block, over all passes of the recipe.

    Each modifier that needs calibration makes a pass, in which the pipeline ends once for each decoder block and once
    for what comes after them.
    """
    from compressed_tensors.utils import patch_attr
    from llmcompressor.core import LifecycleCallbacks

    started, ended, end = LifecycleCallbacks.calibration_start, LifecycleCallbacks.sequential_epoch_end, 0
    steps = blocks + 1

    def start(**kwargs: Any) -> Any:
        nonlocal end
        if not end:
            progress.start(steps * max(1, sum(bool(m.requires_calibration_data) for m in modifiers)), "pruning")
        else:
            progress.advance(end)
        end += steps
        return started(**kwargs)

    def block_end(modules: Any, **kwargs: Any) -> Any:
        result = ended(modules, **kwargs)
        progress.advance()
        return result

    with (
        patch_attr(LifecycleCallbacks, "calibration_start", start),
        patch_attr(LifecycleCallbacks, "sequential_epoch_end", block_end),
    ):
        yield
    if end:
        progress.advance(end)
