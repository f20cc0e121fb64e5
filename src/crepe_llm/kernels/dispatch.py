"""``linear``: which kernel multiplies, and the torch operators around the choice.

The operators (``torch.ops.crepe_llm``) have fake implementations, so that torch.compile traces ``linear`` without a
graph break.
"""

import torch

from crepe_llm.kernels import cpu, reference
from crepe_llm.kernels.packed import DenseWeight, PackedWeight, packed_bytes

_ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Most tokens for which the dense kernel beats torch's linear, by instruction set, for half-precision weights and, last,
# for fp32 weights, where torch calls MKL. docs/cpu-kernel.md has the measurement (benchmarks/kernel.py --dense).
_DENSE_TOKENS = {"avx512_bf16": 16, "avx512_vnni": 16, "avx512": 16, "avx2": 32, "neon": 4, "portable": 0}
_DENSE_FP32_TOKENS = 4

_library = torch.library.Library("crepe_llm", "DEF")
_library.define(
    "sparse24_linear(Tensor x, Tensor data, Tensor? scale, Tensor? bias, int n, int k, ScalarType dtype) -> Tensor"
)
_library.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(x: torch.Tensor, packed: PackedWeight | DenseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x W^T * scale + bias``.

    ``x`` is [..., K] in bf16, fp16 or fp32, of any strides and any number of tokens (0 too); ``bias`` has N elements;
    ``y`` is [..., N] in x's dtype. Sums are fp32, one chain of additions an output in ascending column order, so that a
    token's result does not depend on which other tokens share the batch. Int8 weights take activations quantized here,
    symmetrically, one scale a token (:func:`crepe_llm.kernels.reference.quantize_per_token`), and sum in int32.

    A dense weight is multiplied by the kernel for few tokens where that is faster, and by torch elsewhere.

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
    # torch's dispatcher costs as much as a small product; only tracing (and tensors that are not plain) needs it.
    direct = not torch.compiler.is_compiling() and type(flat) is torch.Tensor and flat.is_cpu
    if isinstance(packed, DenseWeight):
        dense = _dense_linear if direct else torch.ops.crepe_llm.dense_linear
        y = dense(flat, packed.weight, bias)
    else:
        sparse = _sparse24_linear if direct else torch.ops.crepe_llm.sparse24_linear
        y = sparse(flat, packed.data, packed.scale, bias, n, k, packed.dtype)
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


def _dense_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.shape[0] <= _dense_tokens(weight.dtype):
        return cpu.multiply(x, DenseWeight(weight), bias)
    # torch wants one dtype, and neither side may lose digits.
    common = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(common)
    return torch.nn.functional.linear(x.to(common), weight.to(common), bias).to(x.dtype)


def _dense_linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _dense_tokens(dtype: torch.dtype) -> int:
    """Most tokens that the dense kernel gets; -1 where there is no kernel library."""
    if cpu.library() is None:
        return -1
    tokens = _DENSE_TOKENS[cpu.default_instruction_set() or "portable"]
    return min(tokens, _DENSE_FP32_TOKENS) if dtype == torch.float32 else tokens


_library.impl("sparse24_linear", _sparse24_linear, "CPU")
torch.library.register_fake("crepe_llm::sparse24_linear", _sparse24_linear_fake, lib=_library)
_library.impl("dense_linear", _dense_linear, "CPU")
torch.library.register_fake("crepe_llm::dense_linear", _dense_linear_fake, lib=_library)
