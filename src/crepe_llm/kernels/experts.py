"""The products of a mixture of 2:4 experts on a CPU: tokens are sorted by expert, one call multiplies them all."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch

from crepe_llm.kernels import checks, cpu, reference
from crepe_llm.kernels.formats import format_named
from crepe_llm.kernels.memory import on_huge_pages
from crepe_llm.kernels.packed import PackedExperts, PackedWeight

__all__ = ["experts_linear", "mixture", "pack_experts"]

_SCHEMA = (
    "sparse24_experts(Tensor x, Tensor ends, Tensor data, Tensor? scale, int count, int n, int k, str format) -> Tensor"
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
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        n, k = experts.shape
        name = experts.format.name
        return torch.ops.crepe_llm.sparse24_experts(x, ends, experts.data, experts.scale, experts.count, n, k, name)
    return _multiply(x, ends, experts)


def mixture(
    x: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    layers: tuple[PackedExperts, PackedExperts],
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A mixture of experts: ``y_t = sum_s w_ts down_e(activation(gate_up_e(x_t)))`` with e = ``expert_ids[t, s]``.

    ``x`` is [M, H] in bf16, fp16 or fp32, ``expert_ids`` (integers) and ``expert_weights`` (floats) are [M, S]: the
    experts of each token and how much of each goes into its output. ``layers`` are those before and after the
    activation, [N, H] and [H, K] an expert; ``activation`` maps [R, N] to [R, K]. ``y`` is [M, H] in x's dtype, summed
    in fp32. A token's result does not depend on the tokens beside it.

    Raises ValueError when an id is not that of an expert or shapes do not fit, and as :func:`experts_linear`.
    """
    gate_up, down = layers
    tokens, slots = expert_ids.shape
    if expert_weights.shape != expert_ids.shape or x.shape[:1] != (tokens,):
        raise ValueError(
            f"expert_ids has shape {tuple(expert_ids.shape)}, expert_weights {tuple(expert_weights.shape)} and x "
            f"{tuple(x.shape)}; [tokens, slots] twice and [tokens, K] are needed"
        )
    flat = expert_ids.reshape(-1).long()
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < gate_up.count:
        raise ValueError(f"expert_ids are {int(flat.min())} to {int(flat.max())}; there are {gate_up.count} experts")
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=gate_up.count).cumsum(0)
    hidden = activation(experts_linear(x[order // slots], ends, gate_up))
    sorted_outputs = experts_linear(hidden, ends, down)
    outputs = torch.empty_like(sorted_outputs)
    outputs[order] = sorted_outputs
    weighted = outputs.view(tokens, slots, down.shape[0]).float() * expert_weights.float()[..., None]
    return weighted.sum(1).to(x.dtype)


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


def _multiply(x: torch.Tensor, ends: torch.Tensor, experts: PackedExperts) -> torch.Tensor:
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


def _call(*operands: Any) -> tuple[torch.Tensor, torch.Tensor, PackedExperts]:
    """x, ends and weights from the operands of the operator, in the order of its schema."""
    x, ends, data, scale, count, n, k, name = operands
    return x, ends, PackedExperts(data, count, (n, k), format_named(name), scale)


def _operator(*operands: Any) -> torch.Tensor:
    return _multiply(*_call(*operands))


def _shape(*operands: Any) -> torch.Tensor:
    x, ends, experts = _call(*operands)
    checks.grouped(x, ends, experts)
    return x.new_empty(x.shape[0], experts.shape[0])


_library = torch.library.Library("crepe_llm", "FRAGMENT")
_library.define(_SCHEMA)
_library.impl("sparse24_experts", _operator, "CPU")
torch.library.register_fake("crepe_llm::sparse24_experts", _shape, lib=_library)
