"""The products of a mixture of 2:4 experts on a CPU: tokens are sorted by expert, one call multiplies them all."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional

from crepe_llm.kernels import checks, cpu, reference
from crepe_llm.kernels.formats import format_named
from crepe_llm.kernels.memory import on_huge_pages
from crepe_llm.kernels.packed import PackedExperts, PackedWeight

__all__ = ["ACTIVATIONS", "experts_linear", "mixture", "pack_experts"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
}
"""What is applied to the gates, by name."""

# ``hidden`` channels of the model and ``inner`` ones of an expert; ``format`` is the name of both weights' format.
_SCHEMA = (
    "sparse24_mixture(Tensor x, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor? gate_up_scale, "
    "Tensor down, Tensor? down_scale, int count, int hidden, int inner, str format, str activation) -> Tensor"
)


def pack_experts(weights: Iterable[PackedWeight], count: int) -> PackedExperts:
    """Puts the packed weights of ``count`` experts one after the other.

    ``weights`` is consumed one by one, so that a generator needs memory for one beside the result. They have one shape,
    format and kind of scale, and inputs that at most their format itself quantizes.

    Raises ValueError where they differ, are not ``count``, or quantize their inputs otherwise.
    """
    first: PackedWeight | None = None
    data, scales = torch.empty(0, dtype=torch.uint8), []
    found = 0
    for weight in weights:
        if first is None:
            first = weight
            data = on_huge_pages(torch.empty(count, weight.data.numel(), dtype=torch.uint8))
        _check_alike(found, weight, first)
        if found < count:
            data[found] = weight.data
            scales.append(weight.scale)
        found += 1
    if first is None or found != count:
        raise ValueError(f"count is {count}, but there are the weights of {found} experts")
    scale = None if first.scale is None else torch.stack([s for s in scales if s is not None])
    return PackedExperts(data.view(-1), count, first.shape, first.format, scale)


def experts_linear(x: torch.Tensor, ends: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
    """Each row of ``x`` times the weight of its expert: ``y = x W_e^T * scale_e``.

    ``x`` is [M, K] in bf16, fp16 or fp32, of any strides, its rows in the order of the experts: those of expert e end
    before row ``ends[e]`` (int64 [experts], ascending, the last one M). ``y`` is [M, N] in x's dtype. Each row is what
    :func:`crepe_llm.kernels.linear` gives for it with the expert's weight.

    Raises ValueError when shapes or devices do not fit or ``ends`` do not ascend to M, TypeError for another dtype, and
    RuntimeError where an operand requires a gradient and gradients are recorded.
    """
    if cpu.library() is not None:
        return cpu.multiply_experts(x, ends, experts)
    checks.grouped(x, ends, experts)
    begins = [0, *ends.tolist()]
    if sorted(begins) != begins or begins[-1] != len(x):
        raise ValueError(f"ends are {begins[1:]}; they must ascend to the {len(x)} rows of x")
    parts = [
        reference.sparse_linear(x[begin:end], experts[expert], None)
        for expert, (begin, end) in enumerate(itertools.pairwise(begins))
        if end > begin
    ]
    return torch.cat(parts) if parts else x.new_empty(0, experts.shape[0])


def mixture(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    layers: tuple[PackedExperts, PackedExperts],
    activation: str,
) -> torch.Tensor:
    """A mixture of gated experts: ``y_t = sum_s w_ts down_e(activation(gate_e(x_t)) up_e(x_t))`` with e = ids[t, s].

    ``x`` is [M, H] in bf16, fp16 or fp32, ``expert_ids`` (integers) and ``expert_weights`` (floats) are [M, S]: the
    experts of each token and how much of each goes into its output. ``layers`` are the packed weights of one format
    before and after the activation, of the dense shapes [2 N, H] (gate before up) and [H, N] an expert; ``activation``
    is one of :data:`ACTIVATIONS`. ``y`` is [M, H] in x's dtype. The first product's result and what goes into the
    second are rounded to x's dtype; the sum is fp32. A token's result does not depend on the tokens beside it.

    Raises ValueError when an id is not that of an expert or shapes do not fit, and as :func:`experts_linear`.
    """
    if not checks.is_plain(x):
        gate_up, down = layers
        weights = gate_up.data, gate_up.scale, down.data, down.scale
        sizes = down.count, *down.shape, down.format.name
        return torch.ops.crepe_llm.sparse24_mixture(x, expert_ids, expert_weights, *weights, *sizes, activation)
    return _mixture(x, expert_ids, expert_weights, layers, activation)


def _mixture(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    layers: tuple[PackedExperts, PackedExperts],
    activation: str,
) -> torch.Tensor:
    _check_mixture(x, expert_ids, expert_weights, layers, activation)
    gate_up, down = layers
    tokens, slots = expert_ids.shape
    flat = expert_ids.reshape(-1).long()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < gate_up.count:
        raise ValueError(f"expert_ids are {int(flat.min())} to {int(flat.max())}; there are {gate_up.count} experts")
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=gate_up.count).cumsum(0)
    gate, up = experts_linear(x[order // slots], ends, gate_up).float().chunk(2, dim=-1)
    sorted_outputs = experts_linear((ACTIVATIONS[activation](gate) * up).to(x.dtype), ends, down)
    outputs = torch.empty_like(sorted_outputs)
    outputs[order] = sorted_outputs
    weighted = outputs.view(tokens, slots, down.shape[0]).float() * expert_weights.float()[..., None]
    return weighted.sum(1).to(x.dtype)


def _check_mixture(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    layers: tuple[PackedExperts, PackedExperts],
    activation: str,
) -> None:
    """What is checked without a look at the values, also where a call is only traced."""
    gate_up, down = layers
    checks.product(x, gate_up, None)
    hidden, inner = down.shape
    if gate_up.shape != (2 * inner, hidden) or gate_up.count != down.count or gate_up.format != down.format:
        raise ValueError(
            f"the layers are {gate_up.count} x {gate_up.shape} {gate_up.format.name} and {down.count} x {down.shape} "
            f"{down.format.name}; the second needs {down.count} x {(2 * inner, hidden)} {down.format.name} before it"
        )
    if expert_ids.ndim != 2 or expert_weights.shape != expert_ids.shape or x.shape[:1] != expert_ids.shape[:1]:
        raise ValueError(
            f"expert_ids has shape {tuple(expert_ids.shape)}, expert_weights {tuple(expert_weights.shape)} and x "
            f"{tuple(x.shape)}; [tokens, slots] twice and [tokens, K] are needed"
        )
    if expert_ids.dtype not in (torch.int32, torch.int64) or not expert_weights.is_floating_point():
        raise TypeError(
            f"expert_ids are {expert_ids.dtype}, expert_weights {expert_weights.dtype}; int32 or int64 and "
            "floats are needed"
        )
    if expert_ids.device != x.device or expert_weights.device != x.device:
        raise ValueError(f"x is on {x.device}, the routing on {expert_ids.device} and {expert_weights.device}")
    if torch.is_grad_enabled() and expert_weights.requires_grad:
        raise RuntimeError("expert_weights require a gradient, which a mixture does not have: call it under no_grad()")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; one of {', '.join(ACTIVATIONS)} is needed")


def _check_alike(index: int, weight: PackedWeight, first: PackedWeight) -> None:
    if weight.inputs is not None:
        raise ValueError(f"expert {index} quantizes its inputs to {weight.inputs.dtype}; products of experts do not")
    for what in ("shape", "format"):
        if getattr(weight, what) != getattr(first, what):
            raise ValueError(
                f"expert {index} has {what} {getattr(weight, what)}, expert 0 {getattr(first, what)}; all must have one"
            )
    if (weight.scale is None) != (first.scale is None):
        raise ValueError(f"of experts 0 and {index} one has scales; all must have them, or none")


def _call(*operands: Any) -> tuple[Any, ...]:
    """What :func:`mixture` takes, from the operands of the operator, in the order of its schema."""
    x, ids, weights, gate_up, gate_up_scale, down, down_scale, count, hidden, inner, name, activation = operands
    form = format_named(name)
    layers = (
        PackedExperts(gate_up, count, (2 * inner, hidden), form, gate_up_scale),
        PackedExperts(down, count, (hidden, inner), form, down_scale),
    )
    return x, ids, weights, layers, activation


def _operator(*operands: Any) -> torch.Tensor:
    return _mixture(*_call(*operands))


def _shape(*operands: Any) -> torch.Tensor:
    call = _call(*operands)
    _check_mixture(*call)
    return torch.empty_like(call[0], memory_format=torch.contiguous_format)


_library = torch.library.Library("crepe_llm", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("sparse24_mixture", _operator, "CPU")
torch.library.register_fake("crepe_llm::sparse24_mixture", _shape, lib=_library)
