"""What is checked of every product's operands before a kernel sees them, whoever calls it.

A kernel gets addresses and sizes, and trusts both. A packed weight checks its own tensors when it is made
(:func:`part`); what comes with each call is checked by every implementation of the operators, those for tracing
included (:func:`product`).
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch.autograd import forward_ad

__all__ = ["ACTIVATIONS", "Experts", "Weight", "grouped", "is_plain", "part", "product"]

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)


class Weight(Protocol):
    """What the weights of all products have in common: the dense shape (N, K) and their tensors."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]: ...


class Experts(Weight, Protocol):
    """The same for the weights of several experts."""

    @property
    def count(self) -> int: ...


def is_plain(x: torch.Tensor) -> bool:
    """Whether a kernel may read x's memory at once.

    torch's dispatcher, which costs as much as a small product, is needed by what records calls (torch.compile,
    torch.jit.trace, make_fx, modes) and by tensors that are not plain.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and type(x) is torch.Tensor
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
    )


def part(name: str, tensor: torch.Tensor | None, shape: Sequence[int], dtypes: Iterable[torch.dtype]) -> None:
    """Checks one tensor that a kernel reads by its address: None, or contiguous, of this shape and one of the dtypes.

    Raises TypeError for another dtype and ValueError otherwise; both name the tensor.
    """
    if tensor is None:
        return
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; {_names(dtypes)} is needed")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the weight needs {tuple(shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; a contiguous tensor is needed: call contiguous()")
    if tensor.is_neg():
        raise ValueError(f"{name} is a negated view, whose memory holds the other sign: call resolve_neg()")


def product(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    dtypes: Iterable[torch.dtype] = ACTIVATIONS,
    token_scale: torch.Tensor | None = None,
) -> None:
    """Checks what comes with a call: ``x`` [M, K] in one of ``dtypes``, ``bias`` [N], ``token_scale`` fp32 [M].

    Raises TypeError for another dtype, ValueError for other shapes and devices, and RuntimeError where an operand
    requires a gradient and gradients are recorded: no product has one.
    """
    n, k = weight.shape
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight is {n} x {k}, so its last dimension must be {k}")
    if x.dtype not in dtypes:
        raise TypeError(f"x has dtype {x.dtype}; {_names(dtypes)} is needed")
    part("token_scale", token_scale, (x.shape[0],), (torch.float32,))
    if bias is not None and bias.numel() != n:
        raise ValueError(f"bias has {bias.numel()} elements; the weight has {n} rows")
    if bias is not None and not bias.dtype.is_floating_point:
        raise TypeError(f"bias has dtype {bias.dtype}; a floating-point one is needed")
    others = (*weight.tensors, *(tensor for tensor in (bias, token_scale) if tensor is not None))
    for tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"x is on {x.device}, the weight or the bias on {tensor.device}; one device is needed")
    if _differentiated(x, *others):
        raise RuntimeError(
            "an operand requires a gradient, which products with packed weights do not have: call them under "
            "torch.no_grad(), or train the dense weight (crepe_llm.kernels.unpack)"
        )


def grouped(x: torch.Tensor, ends: torch.Tensor, experts: Experts) -> None:
    """Checks what comes with a call of the products of experts: ``x`` [M, K] and ``ends`` int64 [experts].

    That the rows of ``ends`` ascend to M is checked where they are read. Raises as :func:`product`.
    """
    product(x, experts, None)
    if ends.dtype != torch.int64:
        raise TypeError(f"ends has dtype {ends.dtype}; torch.int64 is needed")
    if tuple(ends.shape) != (experts.count,):
        raise ValueError(f"ends has shape {tuple(ends.shape)}; {experts.count} experts need ({experts.count},)")
    if ends.device != x.device:
        raise ValueError(f"x is on {x.device}, ends on {ends.device}; one device is needed")


def _differentiated(*operands: torch.Tensor) -> bool:
    """Whether autograd follows one of them, backward or forward."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in operands):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in operands)


def _names(dtypes: Iterable[torch.dtype]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last
