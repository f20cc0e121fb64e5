"""The reference path: decompress, then torch's dense product. Always right, never fast."""

import torch

from crepe_llm.kernels.packed import PackedWeight, unpack


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


def sparse_linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x`` [M, K] times the packed weight, plus ``bias``: [M, N] in x's dtype, accumulated in fp32 or int32."""
    weight = unpack(packed)
    if packed.dtype == torch.int8:
        values, token_scale = quantize_per_token(x)
        # Sums stay below 2^53, so that fp64 gives the int32 result exactly.
        y = torch.nn.functional.linear(values.double(), weight.double()).float() * token_scale[:, None]
    else:
        y = torch.nn.functional.linear(x.float(), weight.float())
    if packed.scale is not None:
        y = y * packed.scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
