"""``linear``: which kernel multiplies, and the torch operators around the choice.

The operators (``torch.ops.crepe_llm``) have fake implementations, so that torch.compile traces ``linear`` without a
graph break.
"""

import torch

from crepe_llm.kernels import cpu, reference
from crepe_llm.kernels.packed import DenseWeight, PackedWeight, packed_bytes

_ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_library = torch.library.Library("crepe_llm", "DEF")
_library.define(
    "sparse24_linear(Tensor x, Tensor data, Tensor? scale, Tensor? bias, int n, int k, ScalarType dtype) -> Tensor"
)


def linear(x: torch.Tensor, packed: PackedWeight | DenseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x W^T * scale + bias``.

    ``x`` is [..., K] in bf16, fp16 or fp32, of any strides and any number of tokens (0 too); ``bias`` has N elements;
    ``y`` is [..., N] in x's dtype. Sums are fp32, one chain of additions an output in ascending column order, so that a
    token's result does not depend on which other tokens share the batch. Int8 weights take activations quantized here,
    symmetrically, one scale a token (:func:`crepe_llm.kernels.reference.quantize_per_token`), and sum in int32.

    A pruned position touches no activation: an infinite or NaN activation spoils only outputs that keep its column
    (dense arithmetic would spoil all). With int8 weights it makes its token's outputs NaN.

    Raises ValueError when shapes do not fit and TypeError for another activation dtype.
    """
    n, k = packed.shape
    if x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight is {n} x {k}, so its last dimension must be {k}")
    if x.dtype not in _ACTIVATION_DTYPES:
        raise TypeError(f"x has dtype {x.dtype}; bfloat16, float16 or float32 is needed")
    if bias is not None and bias.numel() != n:
        raise ValueError(f"bias has {bias.numel()} elements; the weight has {n} rows")
    flat = x.reshape(-1, k)
    if isinstance(packed, DenseWeight):
        y = torch.nn.functional.linear(flat, packed.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        y = torch.ops.crepe_llm.sparse24_linear(flat, packed.data, packed.scale, bias, n, k, packed.dtype)
    return y.view(*x.shape[:-1], n)


def _sparse24_linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    if data.dtype != torch.uint8 or data.numel() != packed_bytes(n, k, dtype):
        raise ValueError(f"packed data has {data.numel()} bytes; {n} x {k} {dtype} needs {packed_bytes(n, k, dtype)}")
    packed = PackedWeight(data, (n, k), dtype, scale)
    if cpu.library() is None:
        return reference.sparse_linear(x, packed, bias)
    return cpu.multiply(x, packed, bias)


def _sparse24_linear_fake(
    x: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    n: int,
    k: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], n)


_library.impl("sparse24_linear", _sparse24_linear, "CPU")
torch.library.register_fake("crepe_llm::sparse24_linear", _sparse24_linear_fake, lib=_library)
