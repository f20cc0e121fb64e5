"""What `crepe prune` says before its work, and how far the work is."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from crepe_llm.cli.quiet import Progress

_DOES = {
    "cuts": "cuts channels of FFNs",
    "searches": "searches for coefficients",
    "allocates": "chooses each block's sparsity",
    "permutes": "permutes channels",
    "prunes": "prunes",
    "re-prunes": "chooses masks again",
    "refits": "refits the weights that are kept",
    "quantizes": "quantizes",
    "saves": "saves packed layers",
}

# The share of a large matrix product's speed that runs of llm-compressor's pipeline reach.
_REACHED = 0.5


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
            words.append(f"({sparsity:.0%} of the {'channels' if role == 'cuts' else 'weights'})")
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


def expected_seconds(modifiers: list[Any], shapes: list[tuple[int, int]], tokens: int, rate: float) -> float:
    """About how long pruning takes, from the multiply-adds of a recipe; runs take perhaps half or twice that.

    The blocks are run twice in each pass through the calibration data. Where layers are refitted, four groups of layers
    of each block are calibrated in turn, beside the dense block, which makes ten runs, and each layer has the products
    of its inputs and its iterations. A search runs the blocks for the tokens that it judges on.

    Args:
        modifiers: of the recipe.
        shapes: (d_out, d_in) of the linear layers in the blocks.
        tokens: of the calibration data.
        rate: multiply-adds a second, times two, of this machine's matrix product.
    """
    from crepe_llm.modifiers.order import role_of
    from crepe_llm.search.stages import DEFAULT_TOKENS

    runs, products, iterations = 0.0, 0, 0
    for modifier in modifiers:
        role = role_of(modifier)
        if role == "refits":
            runs, products = runs + 8, 1
            # Steps of ADMM also score weights and choose a mask: as measured, four times the time of their product.
            each = 4 if hasattr(modifier, "rounds") else 1
            iterations += each * getattr(modifier, "iterations", 0) + getattr(modifier, "refinement", 0)
        elif role in ("prunes", "permutes", "cuts", "allocates") or "GPTQ" in type(modifier).__name__:
            runs += 2
            products = max(products, int("GPT" in type(modifier).__name__))
        elif role == "searches" and getattr(modifier, "found", None) is None:
            judged = getattr(modifier, "tokens", None) or DEFAULT_TOKENS
            runs += 2 + 3 * judged / max(1, tokens)
    weights = sum(d_out * d_in for d_out, d_in in shapes)
    grams = sum(d_in * d_in for _, d_in in shapes)
    steps = sum(d_out * d_in * d_in for d_out, d_in in shapes)
    work = 2 * (runs * weights * tokens + products * grams * tokens + iterations * steps)
    return work / (_REACHED * rate)


def multiply_rate() -> float:
    """How many multiply-adds a second, times two, a matrix product of this machine has; takes a tenth of a second."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(1024, 1024, device=device)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best


def time_in_words(seconds: float) -> str:
    """A rough time: seconds, minutes or hours, in one or two figures."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.2g} {unit}" if seconds < 10 * size else f"about {seconds / size:.0f} {unit}"
    return f"about {max(1, round(seconds))} s" if seconds < 10 else f"about {10 * round(seconds / 10)} s"


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
