"""Triton kernels that read a 2:4 weight compressed: the product for few tokens, and the expansion to dense.

They use nothing of one vendor: the same source compiles for NVIDIA (compute capability 8.0 and up) and AMD (CDNA).
A program reads pairs of kept values and 2-bit columns, and builds the dense tile in registers.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from crepe_llm.kernels import checks
from crepe_llm.kernels.cuda.products import input_dtypes
from crepe_llm.kernels.cuda.weight import CudaWeight, metadata_shape


class Config(NamedTuple):
    """Sizes of a program's tile: rows, groups of 4 columns; warps; stages of the software pipeline."""

    rows: int
    groups: int
    warps: int
    stages: int


CONFIGS = (Config(16, 64, 4, 3), Config(16, 128, 4, 3), Config(32, 64, 4, 3), Config(64, 32, 4, 4))
MAX_TOKENS = 64

PAIRS = {1: torch.int16, 2: torch.int32, 4: torch.int64}  # an integer that holds the two kept values of a group
_TRITON = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.uint8,  # decoded here: Triton's own conversion needs compute capability 8.9
}
_BITS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32}


@triton.jit
def _number(bits, FLOAT8: tl.constexpr):
    """float8_e4m3fn bits as fp32; anything else as it is."""
    if FLOAT8:
        # Its exponent and mantissa are those of an fp16 number 2^8 times smaller, subnormals included.
        magnitude = ((bits & 127).to(tl.uint16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        magnitude = tl.where((bits & 127) == 127, float("nan"), magnitude)
        return tl.where(bits > 127, -magnitude, magnitude)
    else:
        return bits


@triton.jit
def _dense_tile(
    pairs,
    metadata,
    rows,
    start,
    n,
    groups,
    words,
    VALUE: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Columns 4 start to 4 (start + BLOCK_G) of the rows, zero outside the weight: [BLOCK_N, 4 BLOCK_G]."""
    group = start + tl.arange(0, BLOCK_G)
    word = start // 8 + tl.arange(0, BLOCK_G // 8)
    row_inside = (rows < n)[:, None]
    pair = tl.load(
        pairs + rows[:, None] * groups + group[None, :], mask=row_inside & (group < groups)[None, :], other=0
    )
    packed = tl.load(
        metadata + rows[:, None] * words + word[None, :], mask=row_inside & (word < words)[None, :], other=0
    )
    nibbles = tl.reshape(packed[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :], (BLOCK_N, BLOCK_G))
    width: tl.constexpr = VALUE.primitive_bitwidth
    first = _number((pair & ((1 << width) - 1)).to(BITS).to(VALUE, bitcast=True), FLOAT8)
    second = _number((pair >> width).to(BITS).to(VALUE, bitcast=True), FLOAT8)
    a, b = nibbles & 3, (nibbles >> 2) & 3
    zero = tl.zeros_like(first)
    column_0 = tl.where(a == 0, first, tl.where(b == 0, second, zero))
    column_1 = tl.where(a == 1, first, tl.where(b == 1, second, zero))
    column_2 = tl.where(a == 2, first, tl.where(b == 2, second, zero))
    column_3 = tl.where(a == 3, first, tl.where(b == 3, second, zero))
    # The last of join's dimensions varies fastest: (0, 1), (2, 3) are the columns in order.
    return tl.reshape(tl.join(tl.join(column_0, column_2), tl.join(column_1, column_3)), (BLOCK_N, 4 * BLOCK_G))


@triton.jit(do_not_specialize=["m"])  # no compilation for each number of tokens
def decode_kernel(
    x,
    pairs,
    metadata,
    scale,
    token_scale,
    bias,
    y,
    m,
    n,
    groups,
    words,
    VALUE: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE: tl.constexpr,
    SUM: tl.constexpr,
    WEIGHT_FLOAT8: tl.constexpr,
    X_FLOAT8: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TOKEN_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside, token_inside = rows < n, tokens < m
    k = 4 * groups
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=SUM)
    for start in range(0, groups, BLOCK_G):
        weight = _dense_tile(
            pairs, metadata, rows, start, n, groups, words, VALUE, BITS, WEIGHT_FLOAT8, BLOCK_N, BLOCK_G
        )
        column = 4 * start + tl.arange(0, 4 * BLOCK_G)
        inputs = tl.load(
            x + tokens[None, :] * k + column[:, None], mask=token_inside[None, :] & (column < k)[:, None], other=0
        )
        total = tl.dot(
            weight.to(COMPUTE), _number(inputs, X_FLOAT8).to(COMPUTE), total, input_precision="ieee", out_dtype=SUM
        )
    result = total.to(tl.float32)
    if HAS_SCALE:
        result *= tl.load(scale + rows, mask=row_inside, other=0)[:, None]
    if HAS_TOKEN_SCALE:
        result *= tl.load(token_scale + tokens, mask=token_inside, other=0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=row_inside, other=0).to(tl.float32)[:, None]
    inside = token_inside[None, :] & row_inside[:, None]
    tl.store(y + tokens[None, :] * n + rows[:, None], result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def expand_kernel(
    pairs,
    metadata,
    dense,
    n,
    groups,
    words,
    VALUE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_G
    weight = _dense_tile(pairs, metadata, rows, start, n, groups, words, VALUE, BITS, False, BLOCK_N, BLOCK_G)
    column = 4 * start + tl.arange(0, 4 * BLOCK_G)
    inside = (rows < n)[:, None] & (column < 4 * groups)[None, :]
    # A dense weight may have more than 2^31 elements.
    tl.store(dense + rows.to(tl.int64)[:, None] * (4 * groups) + column[None, :], weight, mask=inside)


def decode(
    x: torch.Tensor,
    weight: CudaWeight,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: Config,
) -> torch.Tensor:
    """``(x W^T) * scale * token_scale + bias`` [M, N], accumulated in fp32 (int32 for int8), rounded once.

    ``x`` is contiguous [M, K]; the weight has its ``values`` and ``metadata``. ``x`` is int8 or float8_e4m3fn where the
    values are, and any of bf16, fp16 and fp32 where they are one of those. Raises as
    :func:`crepe_llm.kernels.checks.product`.
    """
    checks.product(x, weight, bias, input_dtypes(weight.format), token_scale)
    x = x.resolve_neg().contiguous()
    bias = None if bias is None else bias.resolve_neg().reshape(-1).contiguous()
    values, metadata, scale = weight.values, weight.metadata, weight.scale
    assert values is not None and metadata is not None
    m, (n, k) = x.shape[0], weight.shape
    y = torch.empty(m, n, dtype=out_dtype, device=x.device)
    constants = decode_constants(x.dtype, values.dtype, m, config)
    if constants["COMPUTE"] == tl.bfloat16 and not x.is_cuda:
        constants["COMPUTE"] = tl.float32  # Triton's interpreter multiplies bf16 as integers
    decode_kernel[(triton.cdiv(n, config.rows), triton.cdiv(m, constants["BLOCK_M"]))](
        x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x,
        values.view(PAIRS[values.itemsize]),
        metadata,
        scale,
        token_scale,
        bias,
        y,
        m,
        n,
        k // 4,
        metadata.shape[1],
        **constants,
        HAS_SCALE=scale is not None,
        HAS_TOKEN_SCALE=token_scale is not None,
        HAS_BIAS=bias is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y


def decode_constants(x: torch.dtype, values: torch.dtype, tokens: int, config: Config) -> dict[str, Any]:
    """The kernel's compile-time constants for activations and values of these dtypes."""
    common = x if x == values else torch.promote_types(x, values)
    compute = torch.float16 if common == torch.float8_e4m3fn else common  # holds every float8 number
    return {
        "VALUE": _TRITON[values],
        "BITS": _BITS[values.itemsize],
        "COMPUTE": _TRITON[compute],
        "SUM": tl.int32 if compute == torch.int8 else tl.float32,
        "WEIGHT_FLOAT8": values == torch.float8_e4m3fn,
        "X_FLOAT8": x == torch.float8_e4m3fn,
        "BLOCK_M": min(MAX_TOKENS, max(16, triton.next_power_of_2(tokens))),
        "BLOCK_N": config.rows,
        "BLOCK_G": config.groups,
    }


def expand(values: torch.Tensor, metadata: torch.Tensor, k: int) -> torch.Tensor:
    """The dense weight [N, K] of ``values`` and ``metadata``, in the values' dtype.

    Raises ValueError or TypeError where their shapes, dtypes or strides are not those of such a weight.
    """
    n = values.shape[0]
    checks.part("values", values, (n, k // 2), tuple(_TRITON))
    checks.part("metadata", metadata, metadata_shape(n, k), (torch.int32,))
    dense = torch.empty(n, k, dtype=values.dtype, device=values.device)
    block_n, block_g = 16, 64
    stored = dense.view(torch.uint8) if dense.dtype == torch.float8_e4m3fn else dense
    expand_kernel[(triton.cdiv(n, block_n), triton.cdiv(k // 4, block_g))](
        values.view(PAIRS[values.itemsize]),
        metadata,
        stored,
        n,
        k // 4,
        metadata.shape[1],
        VALUE=_TRITON[values.dtype],
        BITS=_BITS[values.itemsize],
        BLOCK_N=block_n,
        BLOCK_G=block_g,
    )
    return dense
