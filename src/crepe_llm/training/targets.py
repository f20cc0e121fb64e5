"""What a student's predictions are compared with, and the loss of it, without all logits of a vocabulary at once.

The loss of a token is (1 - share) KL(teacher || student) + share (negative log-likelihood of the next token), in nats.
It and its gradient are taken chunk by chunk of tokens: a chunk's logits are made by the head in the model's precision,
widened to fp32 a few rows at a time, and replaced by their gradient in place.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch.distributed.tensor import DTensor

__all__ = ["Head", "Predictions", "Target", "TopK", "Whole", "find_head", "keep_top", "mean_loss"]

# A chunk of logits holds at most this many numbers (64 MiB in half precision).
_CHUNK_NUMEL = 1 << 25
# So many of them are widened to fp32 at once on a CPU, which is what its caches hold; on a GPU a whole chunk is.
_WIDE_NUMEL = 1 << 20
# The least probability that a student's tokens outside of a teacher's top k are taken to have together.
_LEAST_REST = 1e-6


@dataclass(frozen=True)
class Head:
    """The output head of a model: logits = weight x + bias, softly capped where `cap` is given."""

    module: torch.nn.Module
    cap: float | None

    def matrix(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [vocabulary, d] and bias [vocabulary] in a dtype, whole on every process."""
        weight = cast(torch.Tensor, self.module.weight)
        bias = cast(torch.Tensor | None, getattr(self.module, "bias", None))
        return _whole(weight).to(dtype), None if bias is None else _whole(bias).to(dtype)


class Predictions(Protocol):
    """A teacher's predictions of a batch's tokens."""

    def chunk(self, rows: slice) -> "Predictions":
        """Those of some of the tokens, with whatever is cheaper made at once than a few rows at a time."""
        ...

    def compare(self, log_q: torch.Tensor, rows: slice, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over rows of KL(teacher || student), and share q + (1 - share) times its gradient by logits.

        `log_q` is fp32 [rows, vocabulary], the student's log-probabilities; the gradient may take its place.
        """
        ...


@dataclass(frozen=True)
class Whole:
    """A teacher's predictions by the hidden states before its head, or by its logits where `weight` is None."""

    hidden: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    cap: float | None = None

    def chunk(self, rows: slice) -> "Whole":
        """Their logits: a head that is read for a few rows at a time costs more than all the rest."""
        return Whole(_logits(self.hidden[rows], self.weight, self.bias), cap=self.cap)

    def compare(self, log_q: torch.Tensor, rows: slice, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        logits = _logits(self.hidden[rows], self.weight, self.bias).float()
        log_p = torch.log_softmax(_capped(logits, self.cap), dim=1)
        p = log_p.exp()
        divergence = torch.dot(p.flatten(), log_p.flatten()) - torch.dot(p.flatten(), log_q.flatten())
        return divergence, log_q.exp_().sub_(p, alpha=1 - share)


@dataclass(frozen=True)
class TopK:
    """A teacher's k likeliest tokens for each token of a batch; the others count as one with the remaining mass.

    Attributes:
        tokens: int [rows, k].
        log_p: [rows, k], their log-probabilities.
    """

    tokens: torch.Tensor
    log_p: torch.Tensor

    def chunk(self, rows: slice) -> "TopK":
        return TopK(self.tokens[rows], self.log_p[rows])

    def compare(self, log_q: torch.Tensor, rows: slice, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, log_p = self.tokens[rows].long(), self.log_p[rows].float()
        p, log_chosen = log_p.exp(), log_q.gather(1, tokens)
        q = log_chosen.exp()
        rest_p = (1 - p.sum(1, keepdim=True)).clamp_(min=0)
        rest_q = (1 - q.sum(1, keepdim=True)).clamp_(min=_LEAST_REST)
        divergence = (p * (log_p - log_chosen)).sum() + (torch.xlogy(rest_p, rest_p) - rest_p * rest_q.log()).sum()
        gradient = log_q.exp_().mul_(1 - (1 - share) * rest_p / rest_q)
        return divergence, gradient.scatter_(1, tokens, q - (1 - share) * p)


@dataclass(frozen=True)
class Target:
    """What the predictions of n tokens are compared with.

    Attributes:
        teacher: its predictions of the same tokens; None where `share` is 1.
        ids: int64 [n], the tokens that did follow.
        share: of their negative log-likelihood in the loss.
    """

    teacher: Predictions | None
    ids: torch.Tensor
    share: float = 0.0

    def chunk(self, rows: slice) -> "Target":
        """What the predictions of some of the tokens are compared with."""
        return Target(None if self.teacher is None else self.teacher.chunk(rows), self.ids[rows], self.share)

    def compare(self, logits: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss summed over rows, and its gradient by their logits, fp32 [rows, vocabulary]."""
        ids = self.ids[rows, None]
        log_q = torch.log_softmax(logits, dim=1)
        likelihood = log_q.gather(1, ids).sum()
        if self.teacher is None:
            divergence, gradient = log_q.new_zeros(()), log_q.exp_()
        else:
            divergence, gradient = self.teacher.compare(log_q, rows, self.share)
        if self.share:
            gradient.scatter_add_(1, ids, gradient.new_full(ids.shape, -self.share))
        return (1 - self.share) * divergence - self.share * likelihood, gradient


def mean_loss(
    hidden: torch.Tensor, head: Head | None, target: Target, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The loss of a student's predictions of n tokens, per token.

    Args:
        hidden: [n, d], before the head; [n, vocabulary], the logits, where `head` is None.
        head: of the student; its parameters get gradients where they want them.
        target: what the predictions are compared with.
        dtype: that logits are made in.
    """
    if head is None:
        return cast(torch.Tensor, _MeanLoss.apply(hidden, None, None, None, target, torch.is_grad_enabled()))
    weight, bias = head.matrix(dtype)
    hidden = hidden.to(dtype)
    return cast(torch.Tensor, _MeanLoss.apply(hidden, weight, bias, head.cap, target, torch.is_grad_enabled()))


class _MeanLoss(torch.autograd.Function):
    """The mean loss; its gradient is made on the way forward, while a chunk's logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        cap: float | None,
        target: Target,
        training: bool,
    ) -> torch.Tensor:
        wanted = [training and need for need in ctx.needs_input_grad[:3]]
        gradients = [
            torch.zeros_like(tensor) if want and tensor is not None else None
            for tensor, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
        for rows in _slices(len(hidden), _CHUNK_NUMEL // vocabulary):
            logits = _logits(hidden[rows], weight, bias)
            logits = logits.clone() if weight is None else logits
            total += _compare(logits, target.chunk(rows), cap)
            _accumulate(gradients, logits, hidden[rows], weight, rows)
        count = max(1, len(hidden))
        ctx.gradients = [None if gradient is None else gradient.div_(count) for gradient in gradients]
        return (total / count).float()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if gradient is None else gradient * outputs[0] for gradient in ctx.gradients]
        return (*scaled, None, None, None)


def _compare(logits: torch.Tensor, target: Target, cap: float | None) -> torch.Tensor:
    """The summed loss of a chunk of logits against its target; the logits become their gradient in place."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    numel = _WIDE_NUMEL if logits.device.type == "cpu" else _CHUNK_NUMEL
    for inner in _slices(len(logits), numel // logits.shape[1]):
        wide = _capped(logits[inner].float(), cap)
        loss, gradient = target.compare(wide, inner)
        total += loss
        logits[inner] = gradient if cap is None else gradient * (1 - (wide / cap).square_())
    return total


def _accumulate(
    gradients: list[torch.Tensor | None],
    slopes: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    rows: slice,
) -> None:
    """Carry a chunk's gradient by its logits, `slopes`, on to hidden states, weight and bias."""
    by_hidden, by_weight, by_bias = gradients
    if by_hidden is not None:
        by_hidden[rows] = slopes if weight is None else slopes @ weight
    if by_weight is not None:
        by_weight.addmm_(slopes.T, hidden)
    if by_bias is not None:
        by_bias += slopes.sum(0)


def keep_top(teacher: Whole, k: int) -> TopK:
    """The k likeliest tokens of a teacher's predictions, made chunk by chunk: int32 and fp16 on the CPU."""
    tokens, log_p = [], []
    vocabulary = teacher.hidden.shape[1] if teacher.weight is None else teacher.weight.shape[0]
    for rows in _slices(len(teacher.hidden), _CHUNK_NUMEL // 2 // vocabulary):
        logits = _capped(_logits(teacher.hidden[rows], teacher.weight, teacher.bias).float(), teacher.cap)
        top = logits.topk(min(k, vocabulary), dim=1)
        tokens.append(top.indices.int().cpu())
        log_p.append((top.values - logits.logsumexp(1, keepdim=True)).half().cpu())
    return TopK(torch.cat(tokens), torch.cat(log_p))


@torch.no_grad()
def find_head(model: Any, ids: torch.Tensor) -> Head | None:
    """The head of a causal language model, or None if its logits are more than the head's, capped.

    What a model does around its head (scaling, for one) is its own affair: a head counts only where it gives the
    model's own logits of some tokens, `ids` int64 [1, length].
    """
    body, module = getattr(model, "base_model", model), model.get_output_embeddings()
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    if body is model or not isinstance(module, torch.nn.Linear) or not keeps:
        return None
    head = Head(module, getattr(model.config.get_text_config(), "final_logit_softcapping", None))
    training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    hidden = body(input_ids=ids, use_cache=False)[0][:, -1]
    model.train(training)
    ours = _capped(_logits(hidden, *head.matrix(hidden.dtype)), head.cap)
    tolerance = 2 * torch.finfo(own.dtype).eps ** 0.5
    if ours.shape != own.shape or not torch.allclose(ours, own, rtol=tolerance, atol=tolerance, equal_nan=True):
        return None
    return head


def _logits(hidden: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    return hidden if weight is None else torch.nn.functional.linear(hidden, weight, bias)


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + max(1, size), count)) for start in range(0, count, max(1, size))]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
