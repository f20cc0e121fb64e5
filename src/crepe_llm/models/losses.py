"""The loss of a causal language model's predictions, without all its logits at once."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from crepe_llm.models.tokens import check_vocabulary, learned_positions

__all__ = ["check_tokens", "longest_sequence", "summed_loss"]

Loss = Callable[[torch.Tensor], float]

# A slice of logits holds at most this many numbers (64 MiB in half precision), so that a vocabulary of 262,144 costs no
# more memory than one of 32,000.
_SLICE_NUMEL = 1 << 25
# So many of them are widened to fp32 at once: what fits the caches and comes from the heap, not fresh pages each time.
_WIDE_NUMEL = 1 << 20


@contextmanager
def summed_loss(model: Any, ids: torch.Tensor) -> Iterator[Loss]:
    """A function that gives the summed negative log-likelihood of a sequence's tokens but the first, in nats.

    It takes int64 ids [1, length]. Log-sum-exp is taken in fp32 (fp64 for an fp64 model) whatever the model's dtype,
    over slices of positions, and summed in fp64; NaN comes out where there is one among the logits. The model is in
    evaluation mode meanwhile.

    Args:
        model: a transformers causal language model.
        ids: int64 [sequences, length], some of the ids that will be asked for; they tell how its head can be used.
    """
    device = model.get_input_embeddings().weight.device
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            loss = _choose(model, ids[:1, :16].to(device))
            yield lambda ids: loss(ids.to(device))
    finally:
        model.train(training)


def check_tokens(model: Any, windows: torch.Tensor) -> None:
    """Raise ValueError if token ids [windows, window] are nothing that a loss of the model can be computed for."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows have the shape {list(windows.shape)}; expected [windows, window] with window >= 2")
    longest = longest_sequence(model.config, model)
    if longest is not None and windows.shape[1] > longest:
        raise ValueError(f"the window of {windows.shape[1]} tokens exceeds the model's context of {longest}")
    check_vocabulary(model, int(windows.min()), int(windows.max()))


def longest_sequence(config: Any, model: Any = None) -> int | None:
    """How many tokens a model takes at most, by its config and by the position embeddings of the model, which may be
    fewer (RoBERTa's first ones are no position's); None where neither tells."""
    named = getattr(config.get_text_config(), "max_position_embeddings", None)
    learned = None if model is None else learned_positions(model)
    return min((limit for limit in (named, learned) if limit), default=None)


def _choose(model: Any, ids: torch.Tensor) -> Loss:
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
