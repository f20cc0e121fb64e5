"""Perplexity by the standard protocol: non-overlapping windows of one token stream.

:func:`crepe_llm.samples.token_windows` makes the windows and :func:`perplexity` runs a model over them.
"""

import dataclasses
import inspect
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

# A slice of logits holds at most this many numbers (64 MiB in half precision), so that a vocabulary of 262,144 costs no
# more memory than one of 32,000.
_SLICE_NUMEL = 1 << 25
# So many of them are widened to fp32 at once: what fits the caches and comes from the heap, not fresh pages each time.
_WIDE_NUMEL = 1 << 20


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

    def to_json(self) -> str:
        """Return the fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

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
    _check(model, windows)
    device = model.get_input_embeddings().weight.device
    training = model.training
    model.eval()
    total = 0.0
    started = time.perf_counter()
    try:
        negative_log_likelihood = _choose(model, windows[:1, :16].to(device))
        bar = tqdm(range(len(windows)), desc=f"perplexity on {corpus}", unit=" windows", disable=not progress)
        for i in bar:
            nll = negative_log_likelihood(windows[i : i + 1].to(device))
            if math.isnan(nll):
                raise ValueError(f"window {i} has NaN among its logits: the model holds NaN or overflows its dtype")
            total += nll
            bar.set_postfix_str(f"{math.exp(min(total / ((i + 1) * (windows.shape[1] - 1)), 700.0)):.3f}")
    finally:
        model.train(training)
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


def _check(model: Any, windows: torch.Tensor) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows have the shape {list(windows.shape)}; expected [windows, window] with window >= 2")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and windows.shape[1] > longest:
        raise ValueError(f"the window of {windows.shape[1]} tokens exceeds the model's context of {longest}")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if windows.max() >= vocabulary:
        raise ValueError(
            f"token id {windows.max()} is outside the model's vocabulary of {vocabulary}: "
            "the windows were made with another model's tokenizer"
        )


def _choose(model: Any, ids: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """Pick the sliced head where it reproduces the model's own logits, and the model's whole logits elsewhere.

    What a model does around its head (soft-capping, scaling) is its own affair; it is asked for the logits of one
    position, and the slices are trusted only where they agree with them.
    """
    body, head = getattr(model, "base_model", model), model.get_output_embeddings()
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    if body is model or head is None or not keeps:
        return lambda ids: _whole_nll(model, ids)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        raw = head(hidden)
        return raw if cap is None else torch.tanh(raw / cap) * cap

    own = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    hidden = body(input_ids=ids, use_cache=False)[0]
    ours = logits(hidden[:, -1:])
    tolerance = 2 * torch.finfo(own.dtype).eps ** 0.5
    if ours.shape != own.shape or not torch.allclose(ours, own, rtol=tolerance, atol=tolerance, equal_nan=True):
        return lambda ids: _whole_nll(model, ids)
    return lambda ids: _sliced_nll(body, logits, ids, max(1, _SLICE_NUMEL // own.shape[-1]))


def _sliced_nll(body: Any, logits: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor, positions: int) -> float:
    hidden = body(input_ids=ids, use_cache=False)[0][0, :-1]
    targets = ids[0, 1:]
    slices = zip(hidden.split(positions), targets.split(positions), strict=True)
    return sum(_nll(logits(part), target) for part, target in slices)


def _whole_nll(model: Any, ids: torch.Tensor) -> float:
    return _nll(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:])


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Sum of the negative log-likelihoods of `targets` [n] under `logits` [n, vocabulary]."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, _WIDE_NUMEL // logits.shape[1])
    parts = zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True)
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for part, target in parts:
        part = part.to(wide)
        chosen = part.gather(1, target[:, None])[:, 0]
        total += (torch.logsumexp(part, dim=1) - chosen).double().sum()
    return total.item()
