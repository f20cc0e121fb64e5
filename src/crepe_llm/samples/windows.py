"""Windows of tokens, for calibration and for perplexity."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

__all__ = ["calibration_windows", "token_windows"]


def token_windows(tokenizer: Any, texts: Sequence[str], window: int, *, tokens: int | None = None) -> "torch.Tensor":
    """Join texts by blank lines, tokenise the whole once, and cut it into non-overlapping windows.

    Some tokenizers begin every text with a beginning-of-sequence token (Gemma, Llama 2 and 3). Their models never saw a
    text without it, so each window begins with it and holds `window` - 1 tokens of text. Other windows are `window`
    consecutive tokens of text. The incomplete window at the end is dropped.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts, in order.
        window: tokens per window, at least 2.
        tokens: take about this many tokens only (rounded down to whole windows, at least one), from windows spread
            evenly over the text; None for all.

    Returns:
        Token ids, int64 [windows, window].

    Raises:
        ValueError: no text, less than one window of it, or a window below 2.
    """
    import torch

    if window < 2:
        raise ValueError(f"window is {window}; a window needs at least 2 tokens, to predict one from the other")
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens is {tokens}; give a positive number, or None for all of the text")
    text = "\n\n".join(texts)
    if not text.strip():
        raise ValueError("the text is empty: there is nothing to predict")
    # verbose=False: the whole text is longer than the model's context by design.
    stream = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = _beginning(tokenizer)
    step = window - len(prefix)
    count = len(stream) // step
    if count == 0:
        raise ValueError(
            f"the text has {len(stream)} tokens, less than one window of {window}; give more text or a smaller window"
        )
    ids = torch.tensor(stream[: count * step], dtype=torch.int64).view(count, step)
    if tokens is not None:
        chosen = min(count, max(1, tokens // window))
        ids = ids[torch.arange(chosen) * count // chosen]
        count = chosen
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(count, -1), ids], dim=1)


def calibration_windows(tokenizer: Any, texts: Sequence[str], *, windows: int, length: int, seed: int) -> "Dataset":
    """Sample token windows for calibration, as a tokenised data set that `oneshot` takes.

    The texts are cut into non-overlapping windows as for perplexity (:func:`token_windows`), of which `windows` are
    drawn without replacement.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the calibration texts.
        windows: number of windows.
        length: tokens per window.
        seed: of the draw; the same seed gives the same windows in the same order.

    Returns:
        A data set with the columns ``input_ids`` and ``attention_mask``, each row `length` long.

    Raises:
        ValueError: the texts hold fewer than `windows` windows.
    """
    import torch
    from datasets import Dataset

    every = token_windows(tokenizer, texts, length)
    if windows < 1:
        raise ValueError(f"windows is {windows}; at least one calibration window is needed")
    if windows > len(every):
        raise ValueError(
            f"{windows} calibration windows of {length} tokens were asked for, but the texts hold {len(every)}; "
            "ask for fewer or shorter windows, or give more text"
        )
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:windows]
    ids = every[drawn].tolist()
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * length for _ in ids]})


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token if the tokenizer adds one by itself, else nothing."""
    ids = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []
