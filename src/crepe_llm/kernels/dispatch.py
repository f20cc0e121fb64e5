"""``pack`` and ``linear``: which kernel multiplies, and the torch operators around the choice.

The operators (``torch.ops.crepe_llm``) have fake implementations, so that torch.compile traces ``linear`` without a
graph break.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from crepe_llm.kernels import checks, cpu, cuda, reference
from crepe_llm.kernels.cpu import operator
from crepe_llm.kernels.cuda import products
from crepe_llm.kernels.cuda.products import CUSPARSELT, CUSPARSELT_LIMITS, CUTLASS, CUTLASS_LIMITS, TRITON, fits
from crepe_llm.kernels.cuda.weight import CudaWeight
from crepe_llm.kernels.formats import FORMATS, Format, format_named, int4_format
from crepe_llm.kernels.packed import (
    DenseWeight,
    Inputs,
    Kept,
    PackedWeight,
    deinterleave,
    fitted_scale,
    interleave,
    interleave_int4,
    nibbles,
    split,
    split_compressed,
)

# Most tokens for which the dense kernel beats torch's linear, by instruction set, for half-precision weights and, last,
# for fp32 weights, where torch calls MKL. docs/kernels.md has the measurement (benchmarks/kernel.py --dense).
_DENSE_TOKENS = {
    "avx512_bf16": 64,
    "avx512_vnni": 16,
    "avx512": 16,
    "avx2": 256,
    "neon_dotprod": 4,
    "neon": 4,
    "portable": 0,
}
_DENSE_FP32_TOKENS = 4
# The same of int8 weights, which torch has to expand first, where they are multiplied by vector instructions of x86.
_DENSE_INT8_TOKENS = 256
# Rows of an int8 weight that are expanded together for torch's product.
_EXPANDED_ROWS = 4096

# ``format`` is the name of a format; ``n`` and ``k`` are the dense shape.
_SPARSE24 = (
    "sparse24_linear(Tensor x, Tensor data, Tensor? scale, Tensor? zero, Tensor? bias, int n, int k, str format) "
    "-> Tensor"
)
_CUDA = (
    "sparse24_cuda_linear(Tensor x, Tensor? token_scale, Tensor? values, Tensor? metadata, Tensor? cutlass, "
    "Tensor? cusparselt, Tensor? dense, Tensor? scale, Tensor? bias, int n, int k, str format, "
    "ScalarType out_dtype) -> Tensor"
)
_DENSE = "dense_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str inputs) -> Tensor"


def pack(
    weight: torch.Tensor, scale: torch.Tensor | None = None, inputs: str | float | None = None
) -> PackedWeight | CudaWeight:
    """Packs a dense 2:4 weight for the device that it is on.

    ``weight`` is [N, K] in the dtype of one of the :data:`~crepe_llm.kernels.formats.FORMATS` (bf16, fp16, fp32, int8
    or float8_e4m3fn), with at most two non-zero values in every group of 4 along K. ``scale`` has N elements or one
    ([N], [N, 1] or scalar) and multiplies the outputs; int8 and fp8 weights carry their quantization scale here.
    ``inputs`` says how :func:`linear` quantizes activations, to the weight's dtype: "token" (symmetrically, one scale a
    token, found at run time), a number (that scale, for all), "exact" (not at all), or None: as "token" for int8
    weights, not at all for others.

    On a CPU, int8 weights stay int8 whatever their inputs are, and fp8 weights are held as bf16, which holds them
    exactly; on a GPU, weights of 8 bits whose inputs are not quantized are.

    Raises ValueError when a group holds more than two non-zero values, when K is no positive multiple of 4, when
    ``scale`` does not fit, or when ``inputs`` is no such value; TypeError for another dtype.
    """
    return _pack(split(weight), scale, inputs)


def pack_compressed(
    compressed: torch.Tensor,
    bitmask: torch.Tensor,
    shape: tuple[int, int] | torch.Tensor,
    scale: torch.Tensor | None = None,
    inputs: str | float | None = None,
) -> PackedWeight | CudaWeight:
    """Packs a ``sparse-24-bitmask`` weight for the device that it is on, on a CPU without making it dense.

    ``compressed`` is [N, K / 2] (dtypes, ``scale`` and ``inputs`` as in :func:`pack`), ``bitmask`` uint8
    [N, ceil(K / 8)] with bit j of byte b set iff column 8 b + j is kept, ``shape`` the dense (N, K) (also as a tensor
    of two values).

    Raises ValueError when the shapes disagree, when a group of the bitmask does not have exactly two bits set, or when
    bits beyond column K are set, and as :func:`pack`.
    """
    return _pack(split_compressed(compressed, bitmask, shape), scale, inputs)


def pack_int4(
    weight: torch.Tensor,
    scale: torch.Tensor,
    shape: Sequence[int],
    group_size: int | None = None,
    zero_point: torch.Tensor | None = None,
    inputs: str = "exact",
) -> PackedWeight:
    """Packs a 2:4 weight of 4-bit codes as compressed-tensors' ``pack-quantized`` stores it, for the CPU.

    ``weight`` is int32 [N, ceil(K / 8)], eight codes a value, the lowest bits first; ``scale`` [N, groups] or, for
    whole rows (``group_size`` None), [N, 1]; ``shape`` the dense (N, K); ``group_size`` 32, 64, 128 or None columns;
    ``zero_point`` int32 [ceil(N / 8), groups], eight rows a value, or None: 8 everywhere. The weight is
    ``(code - zero point) * scale``, the arithmetic of compressed-tensors. ``inputs`` "exact": products with it are
    exact but for fp32 sums and, on AVX2, for bf16 activations' rounding to 16 bits; "group": :func:`linear` quantizes
    activations to int8, symmetrically, one scale for every 32 columns of a token, which is faster (docs/kernels.md).

    Raises ValueError when a group of 4 columns holds more than two codes that are not the zero point, when shapes
    disagree, for another group size or ``inputs``, or on another device; TypeError for other dtypes.
    """
    if inputs not in ("exact", "group"):
        raise ValueError(f"inputs={inputs!r}; of 4-bit weights 'exact' or 'group' is needed")
    (n, k), form = shape, int4_format(group_size, inputs == "group")
    if weight.device.type != "cpu":
        raise ValueError(f"weight is on {weight.device}; 4-bit 2:4 weights are multiplied on a CPU: move it there")
    if tuple(scale.shape) != (wanted := (n, form.zero_shape(n, k)[1])):
        raise ValueError(f"scale has shape {tuple(scale.shape)}; one for each of {wanted} is needed")
    zero = None
    if zero_point is not None:
        zero_point = zero_point.contiguous()
        checks.part("zero_point", zero_point, (-(-n // 8), wanted[1]), (torch.int32,))
        zero = nibbles(zero_point.t().contiguous()).t()[:n].reshape(form.scale_shape(n, k)).contiguous()
    return interleave_int4(weight.contiguous(), scale, zero, (n, k), form)


def unpack(packed: PackedWeight | CudaWeight | DenseWeight) -> torch.Tensor:
    """The dense weight [N, K], bit for bit what was packed (where it is held as bf16: as bf16), without the scale.

    Of 4-bit codes: int8, less their zero points.
    """
    if isinstance(packed, DenseWeight):
        return packed.weight
    return cuda.to_dense(packed) if isinstance(packed, CudaWeight) else deinterleave(packed)


def linear(
    x: torch.Tensor, packed: PackedWeight | CudaWeight | DenseWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``y = x W^T * scale + bias``.

    ``x`` is [..., K] in bf16, fp16 or fp32, of any strides and any number of tokens (0 too); ``bias`` has N elements;
    ``y`` is [..., N] in x's dtype. Where the weight says so, activations are quantized first
    (:func:`crepe_llm.kernels.reference.quantize_inputs`).

    On a CPU, sums are fp32 (int32 for int8), one chain of additions an output in ascending column order, so that a
    token's result does not depend on which other tokens share the batch; a pruned position touches no activation: an
    infinite or NaN activation spoils only outputs that keep its column (dense arithmetic would spoil all). Where
    activations are rounded (to int8; of bf16 with int4 weights on AVX2, to int16) it makes its token's outputs NaN. A
    GPU's libraries promise neither.

    A dense weight is multiplied by the kernel for few tokens where that is faster, and by torch elsewhere, which does
    not quantize activations.

    Raises ValueError when shapes or devices do not fit, TypeError for another activation dtype, and RuntimeError where
    an operand requires a gradient and gradients are recorded: there is none.
    """
    if _direct(x):
        native = _NATIVE and x.ndim == 2 and torch.is_inference_mode_enabled()
        if native and isinstance(packed, PackedWeight) and packed.inputs is None:
            try:
                return _operator(x, packed, bias)
            except ValueError:  # unusual operands: they are told apart, and named, below
                pass
        if (y := _at_once(x, packed, bias)) is not None:
            return y
    n, k = packed.shape
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x has shape {tuple(x.shape)}; the weight is {n} x {k}, so its last dimension must be {k}")
    flat = x.reshape(-1, k) if k else x.reshape(math.prod(x.shape[:-1]), 0)
    if isinstance(packed, DenseWeight):
        product = _dense_linear if _direct(flat) else torch.ops.crepe_llm.dense_linear
        y = product(flat, packed.weight, packed.scale, bias, packed.inputs)
    elif isinstance(packed, CudaWeight):
        y = _quantized_cuda(flat, packed, bias)
    elif packed.inputs is not None:
        y = _quantized_cpu(flat, packed, packed.inputs, bias)
    else:
        y = _sparse(flat, packed, bias)
    return y.view(*x.shape[:-1], n)


def cuda_backends(capability: tuple[int, int] | None, n: int, k: int, form: Format) -> tuple[str, ...]:
    """The backends that may serve a weight [n, k] on a GPU; the measured plan chooses among them.

    ``capability`` is NVIDIA's compute capability, None for another vendor's GPU. Where there is none (a GPU older than
    8.0, or no Triton, which also does the measuring), the weight is expanded at each call.
    """
    if not products.has_triton(capability):
        return ()
    backends = [TRITON]
    if capability is None:
        return tuple(backends)
    if capability[0] == 8 and fits(CUTLASS_LIMITS, n, k, form):
        backends.append(CUTLASS)
    if (form.name != "fp8" or capability >= (8, 9)) and fits(CUSPARSELT_LIMITS, n, k, form):
        backends.append(CUSPARSELT)
    return tuple(backends)


def _pack(kept: Kept, scale: torch.Tensor | None, inputs: str | float | None) -> PackedWeight | CudaWeight:
    form, device = kept.format, kept.values.device
    scheme = _scheme(form, inputs)
    scale = fitted_scale(scale, kept)
    if scheme is not None:
        if scale is None:
            scale = torch.ones(form.scale_shape(*kept.shape), dtype=torch.float32, device=device)
        scale = scale * (1.0 if scheme.scale is None else scheme.scale)
    if device.type != "cpu":
        if scheme is None and form.wider is not None:
            kept = kept.held_as(form.wider)
        backends = cuda_backends(products.capability(device), *kept.shape, kept.format)
        with torch.cuda.device_of(kept.values):
            return cuda.pack(kept, scale, scheme, backends)
    if form.always_quantizes and scheme is not None and scheme.scale is None:
        return interleave(kept, scale)  # the kernel quantizes inputs, one scale a token
    return interleave(kept if form.unquantized is None else kept.held_as(form.unquantized), scale, scheme)


def _scheme(form: Format, inputs: str | float | None) -> Inputs | None:
    if form.inputs is None:
        if inputs is None:
            return None
        numbers = [f for f in FORMATS.values() if f.inputs is not None and f.zero_point is None]
        known = " and ".join(str(f.dtype).removeprefix("torch.") for f in numbers)
        raise ValueError(f"inputs={inputs!r}, but the weight is {form.name}; only {known} quantize inputs")
    if inputs is None:
        return Inputs(form.inputs) if form.always_quantizes else None
    if inputs == "token":
        return Inputs(form.inputs)
    if inputs == "exact":
        return None
    if isinstance(inputs, str) or not 0 < inputs < float("inf"):
        raise ValueError(f"inputs={inputs!r}; 'token', 'exact', a positive scale or None is needed")
    return Inputs(form.inputs, float(inputs))


def _quantized_cuda(x: torch.Tensor, weight: CudaWeight, bias: torch.Tensor | None) -> torch.Tensor:
    # Quantization stays outside the operator: torch.compile fuses it with what comes before.
    checks.product(x, weight, bias)
    values, token_scale = (x, None) if weight.inputs is None else reference.quantize_inputs(x, weight.inputs)
    y = torch.ops.crepe_llm.sparse24_cuda_linear(
        values,
        token_scale,
        weight.values,
        weight.metadata,
        weight.cutlass,
        weight.cusparselt,
        weight.dense,
        weight.scale,
        bias,
        *weight.shape,
        weight.format.name,
        x.dtype,
    )
    return y if weight.inputs is None else _spoiled(y, x, weight.inputs)


def _quantized_cpu(x: torch.Tensor, packed: PackedWeight, inputs: Inputs, bias: torch.Tensor | None) -> torch.Tensor:
    # Quantized values and weights are exact in x's dtype, so that the product is the quantized one.
    checks.product(x, packed, bias)
    values, token_scale = reference.quantize_inputs(x, inputs)
    if token_scale is None:
        return _spoiled(_sparse(values.to(x.dtype), packed, bias), x, inputs)
    # fp16 is too narrow for outputs before their scale.
    y = _sparse(values.to(_wide(x.dtype)), packed, None) * token_scale[:, None]
    return (y if bias is None else y + bias.reshape(-1)).to(x.dtype)


def _spoiled(y: torch.Tensor, x: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Outputs that are NaN where a token's inputs were not finite: int8 by a static scale would hide that."""
    if inputs.scale is None or inputs.dtype != torch.int8:
        return y
    return torch.where(x.isfinite().all(-1, keepdim=True), y, torch.nan)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype for products whose outputs are scaled afterwards: fp32 instead of fp16, in which they overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


def _sparse(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return _multiply(x, packed, bias) if _direct(x) else _operator(x, packed, _plain_bias(bias))


def _operator(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.crepe_llm.sparse24_linear.default(
        x, packed.data, packed.scale, packed.zero, bias, *packed.shape, packed.format.name
    )


def _direct(x: torch.Tensor) -> bool:
    return checks.is_plain(x) and x.is_cpu


def _at_once(
    x: torch.Tensor, packed: PackedWeight | CudaWeight | DenseWeight, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """:func:`linear` by a CPU kernel, where operands are as usual; else None."""
    if isinstance(packed, PackedWeight):
        plain = packed.inputs is None and packed.format.code is not None
        return cpu.multiply_plain(x, packed, bias) if plain else None
    if isinstance(packed, DenseWeight):
        plain = packed.weight.numel() > 0 and x.numel() <= _dense_tokens(packed.dtype) * packed.shape[1]
        return cpu.multiply_plain(x, packed, bias) if plain else None
    return None


def _multiply(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if cpu.library() is None:
        return reference.sparse_linear(x, packed, bias)
    return cpu.multiply(x, packed, bias)


def _sparse24_call(*operands: Any) -> tuple[torch.Tensor, PackedWeight, torch.Tensor | None]:
    """x, weight and bias from the operands of the CPU's operator, in the order of its schema."""
    x, data, scale, zero, bias, n, k, name = operands
    return x, PackedWeight(data, (n, k), format_named(name), scale, zero=zero), bias


def _sparse24_linear(*operands: Any) -> torch.Tensor:
    return _multiply(*_sparse24_call(*operands))


def _sparse24_recorded(*operands: Any) -> torch.Tensor:
    """The operator outside torch.inference_mode: the operands are checked, gradients among them, and made usual."""
    operands = tuple(value.resolve_neg() if isinstance(value, torch.Tensor) else value for value in operands)
    x, packed, bias = _sparse24_call(*operands)
    checks.product(x, packed, bias)
    bias = _plain_bias(bias)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.crepe_llm.sparse24_linear(*operands[:4], bias, *operands[5:])


def _plain_bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    """A bias as the C++ operator takes it; one of integers, which is no bias, as it is."""
    if bias is None or not bias.dtype.is_floating_point:
        return bias
    return (bias if bias.dtype in checks.ACTIVATIONS else bias.to(torch.float32)).contiguous()


def _sparse24_shape(*operands: Any) -> torch.Tensor:
    x, packed, bias = _sparse24_call(*operands)
    checks.product(x, packed, bias)
    return x.new_empty(x.shape[0], packed.shape[0])


def _cuda_call(*operands: Any) -> tuple[Any, ...]:
    """What :func:`crepe_llm.kernels.cuda.linear` takes, from the operands of its operator in the schema's order."""
    x, token_scale, *parts, bias, n, k, name, out_dtype = operands
    return x, CudaWeight((n, k), format_named(name), *parts), token_scale, bias, out_dtype


def _cuda_linear(*operands: Any) -> torch.Tensor:
    return cuda.linear(*_cuda_call(*operands))


def _cuda_shape(*operands: Any) -> torch.Tensor:
    x, weight, token_scale, bias, out_dtype = _cuda_call(*operands)
    cuda.check_call(x, weight, token_scale, bias, out_dtype)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


def _dense_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, inputs: str
) -> torch.Tensor:
    packed = DenseWeight(weight, scale, inputs)
    if x.is_cpu and weight.numel() and len(x) <= _dense_tokens(weight.dtype):
        return cpu.multiply(x, packed, bias)
    checks.product(x, packed, bias)
    if weight.dtype == torch.int8:
        return _expanded(x, packed, bias)
    # torch wants one dtype, and neither side may lose digits.
    common = torch.promote_types(x.dtype, weight.dtype)
    bias = None if bias is None else bias.to(common).reshape(-1)
    if scale is None:
        return torch.nn.functional.linear(x.to(common), weight.to(common), bias).to(x.dtype)
    common = _wide(common)
    y = torch.nn.functional.linear(x.to(common), weight.to(common)) * scale
    return (y if bias is None else y + bias).to(x.dtype)


def _expanded(x: torch.Tensor, packed: DenseWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """torch's product with an int8 weight, expanded to a dtype that holds it exactly some rows at a time."""
    assert packed.scale is not None
    wide = x.to(_wide(x.dtype))
    parts = [
        wide @ rows.to(wide.dtype).t() * scale
        for rows, scale in zip(packed.weight.split(_EXPANDED_ROWS), packed.scale.split(_EXPANDED_ROWS), strict=True)
    ]
    y = torch.cat(parts, dim=1) if parts else x.new_zeros(len(x), 0)
    return (y if bias is None else y + bias.reshape(-1)).to(x.dtype)


def _dense_shape(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, inputs: str
) -> torch.Tensor:
    checks.product(x, DenseWeight(weight, scale, inputs), bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _dense_tokens(dtype: torch.dtype) -> int:
    """Most tokens that the dense kernel gets; -1 where there is no kernel library."""
    if cpu.library() is None:
        return -1
    name = cpu.default_instruction_set() or "portable"
    if dtype == torch.int8 and name.startswith("avx"):
        return _DENSE_INT8_TOKENS
    tokens = _DENSE_TOKENS[name]
    return min(tokens, _DENSE_FP32_TOKENS) if dtype == torch.float32 else tokens


_library = torch.library.Library("crepe_llm", "DEF")
_NATIVE = False  # whether the CPU's operator is C++
for _schema, _function, _key, _shape in (
    (_SPARSE24, _sparse24_linear, "CPU", _sparse24_shape),
    (_DENSE, _dense_linear, "CompositeExplicitAutograd", _dense_shape),
    (_CUDA, _cuda_linear, "CompositeExplicitAutograd", _cuda_shape),
):
    _library.define(_schema)
    _name = _schema.partition("(")[0]
    if _schema is _SPARSE24:
        _NATIVE = operator.register("crepe_llm", _name)
    if _schema is not _SPARSE24 or not _NATIVE:
        _library.impl(_name, _function, _key)
    torch.library.register_fake(f"crepe_llm::{_name}", _shape, lib=_library)
_library.impl("sparse24_linear", _sparse24_recorded, "Autograd")
