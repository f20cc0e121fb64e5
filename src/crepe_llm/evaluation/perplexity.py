"""Perplexity by the standard protocol: non-overlapping windows of one token stream.

:func:`crepe_llm.samples.token_windows` makes the windows and :func:`perplexity` runs a model over them.
"""

import dataclasses
import math
import time
from typing import Any

import torch
from tqdm import tqdm

from crepe_llm.models.losses import check_tokens, summed_loss


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and the conditions under which it is valid.

    Attributes:
        perplexity: exp of `nll`.
        nll: mean negative log-likelihood per predicted token, in nats.
        tokens: number of predicted tokens, window - 1 per window.
        windows: number of windows.
        window: tokens per window, a leading beginning-of-sequence token included.
        corpus: what the text is.
        dtype: the dtype of the model's weights.
        seconds: wall time of the forward passes.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    window: int
    corpus: str
    dtype: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} on {self.corpus}: {self.tokens} tokens predicted in {self.windows} "
            f"windows of {self.window}, {self.dtype}, {self.seconds:.1f} s"
        )


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor, *, corpus: str, progress: bool = True) -> Perplexity:
    """Measure the perplexity of a causal language model over token windows.

    In each window every token but the first is predicted from those before it in the same window, so window - 1 tokens
    count per window, and the result is exp of their mean negative log-likelihood. Log-sum-exp is taken in fp32 (fp64
    for an fp64 model) whatever the model's dtype, over slices of positions, so that the logits of a whole window never
    exist at once, and summed in fp64.

    Args:
        model: a transformers causal language model; its train/eval state is restored.
        windows: token ids, int64 [windows, window], from :func:`crepe_llm.samples.token_windows`.
        corpus: what the text is, for the report.
        progress: show a progress bar.

    Raises:
        ValueError: windows of a wrong shape, longer than the model's context, or with ids outside its vocabulary (the
            tokenizer of another model), or a NaN among the logits.
    """
    check_tokens(model, windows)
    total = 0.0
    started = time.perf_counter()
    with summed_loss(model, windows) as negative_log_likelihood:
        bar = tqdm(range(len(windows)), desc=f"perplexity on {corpus}", unit=" windows", disable=not progress)
        for i in bar:
            nll = negative_log_likelihood(windows[i : i + 1])
            if math.isnan(nll):
                raise ValueError(f"window {i} has NaN among its logits: the model holds NaN or overflows its dtype")
            total += nll
            bar.set_postfix_str(f"{math.exp(min(total / ((i + 1) * (windows.shape[1] - 1)), 700.0)):.3f}")
    count = windows.shape[0] * (windows.shape[1] - 1)
    return Perplexity(
        perplexity=math.exp(total / count) if total / count < 700 else math.inf,
        nll=total / count,
        tokens=count,
        windows=windows.shape[0],
        window=windows.shape[1],
        corpus=corpus,
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=time.perf_counter() - started,
    )
