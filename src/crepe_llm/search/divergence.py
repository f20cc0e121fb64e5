"""How far a model's predictions have moved from what they were: the fitness of a candidate on the whole model."""

from collections.abc import Sequence
from typing import Any

import torch
from compressed_tensors.utils import align_module_device

from crepe_llm import processes
from crepe_llm.training.targets import Head, Target, TopK, Whole, find_head, keep_top, mean_loss

__all__ = ["Divergence", "cut_windows"]

# Of a prediction so many of the likeliest tokens are compared, and the mass of the rest as one more.
_TOP = 512
# A shorter piece at the end of a text says little and costs a forward pass.
_SHORTEST = 64


def cut_windows(sequences: Sequence[torch.Tensor], length: int) -> list[torch.Tensor]:
    """Sequences of tokens, int64 [any] each, cut into windows of `length` tokens at most.

    Rests of fewer than 64 tokens are left out, except where a sequence is no longer than that.
    """
    windows = []
    for sequence in sequences:
        parts = sequence.split(length)
        windows += [part for part in parts if len(part) >= 2 and (part is parts[0] or len(part) >= _SHORTEST)]
    return windows


class Divergence:
    """KL(dense || now) of a model's next-token distributions, window by window.

    The model is dense when this is made; its predictions are kept as the 512 likeliest tokens and the mass of the rest
    (6 bytes for each of the 512). It is changed in place afterwards. Several processes share the windows out, and tell
    each other the dense model's predictions.

    Args:
        model: a transformers causal language model in evaluation mode.
        windows: int64 [any] each, at least two tokens.

    Raises:
        ValueError: there is no window.

    Source: KL to the dense model's logits as fitness, and the top 512 of them, are EvoPress's (arXiv 2410.14649).
    """

    def __init__(self, model: Any, windows: Sequence[torch.Tensor]) -> None:
        if not windows:
            raise ValueError("there is no window of text of at least two tokens to compare predictions on")
        self._model = model
        self._device = model.get_input_embeddings().weight.device
        self._windows = list(windows)
        with self._head_at_hand():
            self._head: Head | None = find_head(model, self._windows[0][None, :16].to(self._device))
            self._dense = processes.spread(self._windows, lambda window: keep_top(self._predictions(window), _TOP))

    @property
    def tokens(self) -> tuple[int, ...]:
        """How many tokens of each window are predicted."""
        return tuple(len(window) - 1 for window in self._windows)

    @torch.no_grad()
    def __call__(self, window: int) -> float:
        """The divergence on one window, summed over its tokens, in nats.

        Raises:
            ValueError: it is NaN or infinite.
        """
        with self._head_at_hand():
            hidden = self._hidden(self._windows[window])
            dense = self._dense[window]
            teacher = TopK(dense.tokens.to(hidden.device), dense.log_p.to(hidden.device))
            target = Target(teacher, self._windows[window][1:].to(hidden.device))
            total = float(mean_loss(hidden, self._head, target, hidden.dtype)) * len(hidden)
        if not abs(total) < float("inf"):
            raise ValueError(
                f"the pruned model's predictions diverge by {total} on window {window}: its logits are not finite; "
                "load it with dtype=float32 or bfloat16"
            )
        return total

    def _head_at_hand(self) -> Any:
        return align_module_device(self._model.get_output_embeddings())

    @torch.no_grad()
    def _predictions(self, window: torch.Tensor) -> Whole:
        hidden = self._hidden(window)
        if self._head is None:
            return Whole(hidden)
        return Whole(hidden, *self._head.matrix(hidden.dtype), self._head.cap)

    def _hidden(self, window: torch.Tensor) -> torch.Tensor:
        """Hidden states before the head [length - 1, d]; logits [length - 1, vocabulary] where the head is unknown."""
        ids = window[None].to(self._device)
        if self._head is None:
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0, :-1]
            return logits
        hidden: torch.Tensor = self._model.base_model(input_ids=ids, use_cache=False)[0][0, :-1]
        return hidden
