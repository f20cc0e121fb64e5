"""The reference path: decompress, then torch's dense product. Always right, never fast."""

import torch

from crepe_llm.kernels import checks
from crepe_llm.kernels.formats import COLUMN_CHUNK
from crepe_llm.kernels.packed import Inputs, PackedWeight, column_scales, deinterleave

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
_FP8_MIN_SCALE = 1 / (_FP8_MAX * 512)  # vLLM's: keeps a token of zeros from dividing by zero


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 quantization of activations [M, K], one scale a token, in fp32.

    Returns int8 values ``round(x * (127 / max|x|))``, halves to even, and scales [M] ``max|x| / 127``; a token of zeros
    gets zeros. This is vLLM's dynamic per-token int8 scheme. A token with a value that is not finite gets scale NaN, so
    that its outputs are NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[0])
    finite = torch.isfinite(largest)
    # One correctly rounded division: `127.0 / largest` would be a reciprocal times 127.
    inverse = torch.where((largest > 0) & finite, torch.full_like(largest, 127.0) / largest, 0.0)
    values = torch.nan_to_num(x * inverse[:, None], 0.0, 0.0, 0.0).round().clamp_(-127, 127).to(torch.int8)
    return values, torch.where(finite, largest / 127.0, torch.nan)


def quantize_per_chunk(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 quantization of activations [M, K], one scale for every 32 columns of a token, in fp32.

    Returns int8 values [M, K] and scales [M, ceil(K / 32)], as :func:`quantize_per_token` has them of all columns;
    where 127 / max|x| is beyond fp32, values are zeros.
    """
    columns = x.shape[1]
    chunks = torch.nn.functional.pad(x.float(), (0, -columns % COLUMN_CHUNK)).unflatten(1, (-1, COLUMN_CHUNK))
    chunks = torch.where(torch.isinf(127.0 / chunks.abs().amax(-1, keepdim=True)), 0.0, chunks)
    values, scale = quantize_per_token(chunks.flatten(0, 1))
    return values.view(chunks.shape).flatten(1)[:, :columns], scale.view(chunks.shape[:2])


def quantize_per_lane(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 quantization of activations [M, K], one scale for 16 columns of a token, in fp32.

    Of each 256 columns those share a scale that have the same ``column % 64 // 4``: one lane of a register holds their
    int32 sum. The choice is ours. Returns int8 values [M, K] and scales [M, K], one for each value, as
    :func:`quantize_per_chunk` has them of 32 columns.
    """
    columns = x.shape[1]
    lanes = torch.nn.functional.pad(x.float(), (0, -columns % 256)).unflatten(1, (-1, 4, 16, 4)).transpose(2, 3)
    values, scale = quantize_per_chunk(lanes.reshape(-1, 16))
    values, scale = values.view(lanes.shape), scale.view(*lanes.shape[:3], 1, 1).expand(lanes.shape)
    values, scale = (of.transpose(2, 3).flatten(1)[:, :columns] for of in (values, scale))
    return values, scale


def quantize_inputs(x: torch.Tensor, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Activations [M, K] quantized as ``inputs`` says: values in its dtype, and fp32 scales [M] (None: the static one).

    The arithmetic is vLLM's, in fp32: int8 rounds halves to even, float8_e4m3fn saturates at 448.
    """
    if inputs.scale is None and inputs.dtype == torch.int8:
        return quantize_per_token(x)
    if inputs.scale is not None:
        scaled, scale = x.float() / inputs.scale, None
    else:
        scale = (x.abs().amax(-1).float() / _FP8_MAX).clamp_min(_FP8_MIN_SCALE)
        scaled = x.float() / scale[:, None]
    if inputs.dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(torch.int8), scale
    return scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale


def sparse_linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [M, K] times the packed weight, plus ``bias``: [M, N] in x's dtype, accumulated in fp32 or int32.

    Raises as :func:`crepe_llm.kernels.checks.product`.
    """
    checks.product(x, packed, bias)
    weight = deinterleave(packed)
    if packed.format.scale_group is not None:
        weight = weight.float() * column_scales(packed)
    if packed.format.input_group is not None:
        values, of_chunks = quantize_per_chunk(x)
        scales = of_chunks.repeat_interleave(packed.format.input_group, 1)[:, : x.shape[1]]
        y = torch.nn.functional.linear(values.double() * scales.double(), weight.double()).float()
    elif packed.format.always_quantizes:
        values, token_scale = quantize_per_token(x)
        # Sums stay below 2^53, so that fp64 gives the int32 result exactly.
        y = torch.nn.functional.linear(values.double(), weight.double()).float() * token_scale[:, None]
    else:
        y = torch.nn.functional.linear(x.float(), weight.float())
    if packed.scale is not None and packed.format.scale_group is None:
        y = y * packed.scale
    if bias is not None:
        y = y + bias.float().reshape(-1)
    return y.to(x.dtype)
