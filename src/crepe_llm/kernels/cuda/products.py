"""``y = x W^T * scale * token_scale + bias`` on a GPU, one function a backend.

========== =====================================================================================================
triton     few tokens; the weight is read compressed (:mod:`crepe_llm.kernels.cuda.triton_kernels`)
cusparselt sparse tensor cores through ``torch._cslt_sparse_mm``; a setting is its alg_id
cutlass    sparse tensor cores of compute capability 8.x through ``torch._sparse_semi_structured_mm``
expand     the weight is made dense for the call, then as ``dense``
dense      torch's own product with a dense copy of the weight
========== =====================================================================================================

None of them waits for the GPU, searches, or reads a tensor's content, so that all can be captured in a CUDA graph.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch

from crepe_llm.kernels import checks
from crepe_llm.kernels.cuda.weight import CudaWeight, to_dense
from crepe_llm.kernels.formats import Format

TRITON, CUSPARSELT, CUTLASS, EXPAND, DENSE = "triton", "cusparselt", "cutlass", "expand", "dense"


class Candidate(NamedTuple):
    """A product: its backend, and which of the backend's algorithms."""

    backend: str
    setting: int = 0


class Limits(NamedTuple):
    """What a library wants: N and K multiples of ``rows`` and ``columns``, token counts padded to ``tokens``."""

    rows: int
    columns: int
    tokens: int


# By format. torch.sparse.SparseSemiStructuredTensor*._DTYPE_SHAPE_CONSTRAINTS; fp32 is 1:2 sparse there, not 2:4.
CUSPARSELT_LIMITS = {
    "bf16": Limits(16, 16, 8),
    "fp16": Limits(16, 16, 8),
    "int8": Limits(32, 32, 16),
    "fp8": Limits(32, 32, 16),
}
CUTLASS_LIMITS = {
    "bf16": Limits(32, 64, 8),
    "fp16": Limits(32, 64, 8),
    "int8": Limits(16, 128, 16),
}


def fits(limits: dict[str, Limits], n: int, k: int, form: Format) -> bool:
    """Whether a weight [n, k] can go to the library with these limits."""
    limit = limits.get(form.name)
    return limit is not None and n % limit.rows == 0 and k % limit.columns == 0


def input_dtypes(form: Format) -> tuple[torch.dtype, ...]:
    """The dtypes of activations that products with a weight of this format take."""
    return checks.ACTIVATIONS if form.dtype in checks.ACTIVATIONS else (form.dtype,)


@functools.cache
def capability(device: torch.device) -> tuple[int, int] | None:
    """NVIDIA's compute capability of a GPU, None for another vendor's."""
    return None if torch.version.hip else torch.cuda.get_device_capability(device)


@functools.cache
def has_triton(capability: tuple[int, int] | None) -> bool:
    """Whether Triton is installed (PyTorch's GPU builds for Linux bring it) and compiles for such a GPU."""
    return importlib.util.find_spec("triton") is not None and (capability is None or capability >= (8, 0))


def product(
    candidate: Candidate,
    x: torch.Tensor,
    weight: CudaWeight,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """[M, N] in ``out_dtype`` by one product.

    ``x`` is [M, K] in the weight's dtype (``triton``, ``expand`` and ``dense`` also take another float dtype where the
    weight is a float one); ``token_scale`` is an fp32 vector [M] or None.
    """
    x = x.contiguous()
    backend, setting = candidate
    if backend == TRITON:
        from crepe_llm.kernels.cuda import triton_kernels

        return triton_kernels.decode(x, weight, token_scale, bias, out_dtype, triton_kernels.CONFIGS[setting])
    if backend == CUSPARSELT:
        return _cusparselt(setting, x, weight, token_scale, bias, out_dtype)
    if backend == CUTLASS:
        return _cutlass(x, weight, token_scale, bias, out_dtype)
    return _dense(x, expanded(weight), weight.scale, token_scale, bias, out_dtype)


def search_cusparselt(x: torch.Tensor, weight: CudaWeight) -> int:
    """The alg_id that cuSPARSELt's own search finds for ``x`` [M, K] in the weight's dtype; slow, waits for the GPU."""
    assert weight.cusparselt is not None
    padded = _pad(x.contiguous(), CUSPARSELT_LIMITS[weight.format.name].tokens)
    return torch._cslt_sparse_mm_search(weight.cusparselt, padded.t(), **_cusparselt_options(weight))


def _cusparselt_options(weight: CudaWeight) -> dict:
    options: dict = {"transpose_result": True}
    if weight.format.inputs is not None:
        # A vector: torch reads a scalar alpha back to the host. bf16 has the range of the unscaled sums, fp16 not.
        options |= {"alpha": weight.scale, "out_dtype": torch.bfloat16}
    return options


def _cusparselt(
    alg_id: int,
    x: torch.Tensor,
    weight: CudaWeight,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    assert weight.cusparselt is not None
    options, scale = _cusparselt_options(weight), weight.scale
    if "alpha" in options:
        scale = None
    elif scale is None and bias is not None and bias.dtype == x.dtype:
        options["bias"], bias = bias, None
    padded = _pad(x, CUSPARSELT_LIMITS[weight.format.name].tokens)
    raw = torch._cslt_sparse_mm(weight.cusparselt, padded.t(), alg_id=alg_id, **options)
    return _finish(raw[: x.shape[0]], scale, token_scale, bias, out_dtype)


def _cutlass(
    x: torch.Tensor,
    weight: CudaWeight,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    assert weight.values is not None and weight.cutlass is not None
    columns = _pad(x, CUTLASS_LIMITS[weight.format.name].tokens).t()
    if weight.format.dtype == torch.int8:
        raw = torch._sparse_semi_structured_mm(weight.values, weight.cutlass, columns, out_dtype=torch.int32)
    elif weight.scale is None and bias is not None and bias.dtype == x.dtype:
        raw, bias = torch._sparse_semi_structured_addmm(bias, weight.values, weight.cutlass, columns), None
    else:
        raw = torch._sparse_semi_structured_mm(weight.values, weight.cutlass, columns)
    return _finish(raw[:, : x.shape[0]].t(), weight.scale, token_scale, bias, out_dtype)


def expanded(weight: CudaWeight) -> torch.Tensor:
    """The dense weight [N, K]: the copy that is there, or a new one."""
    values = weight.values
    if weight.dense is None and values is not None and values.is_cuda and has_triton(capability(values.device)):
        from crepe_llm.kernels.cuda import triton_kernels

        assert weight.metadata is not None
        return triton_kernels.expand(values, weight.metadata, weight.shape[1])
    return to_dense(weight)


def _dense(
    x: torch.Tensor,
    dense: torch.Tensor,
    scale: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    n, k = dense.shape
    if dense.dtype == torch.int8:
        if x.is_cuda and n % 8 == 0 and k % 8 == 0:  # cuBLAS's; it also refuses 16 tokens or fewer
            raw = torch._int_mm(_with_rows(x, max(24, -(-x.shape[0] // 8) * 8)), dense.t())[: x.shape[0]]
        else:
            raw = torch.nn.functional.linear(x.double(), dense.double())  # exact
    elif dense.dtype == torch.float8_e4m3fn:
        if x.is_cuda and n % 16 == 0 and k % 16 == 0 and (capability(x.device) or (0, 0)) >= (8, 9):
            one = torch.ones((), dtype=torch.float32, device=x.device)
            raw = torch._scaled_mm(x, dense.t(), one, one, out_dtype=torch.float32)
        else:
            raw = torch.nn.functional.linear(x.float(), dense.float())
    else:
        # torch wants one dtype, and neither side may lose digits.
        common = torch.promote_types(x.dtype, dense.dtype)
        fused = None
        if scale is None and bias is not None:
            fused, bias = bias.to(common), None
        raw = torch.nn.functional.linear(x.to(common), dense.to(common), fused)
    return _finish(raw, scale, token_scale, bias, out_dtype)


def _finish(
    raw: torch.Tensor,
    scale: torch.Tensor | None,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    if scale is not None or token_scale is not None or bias is not None:
        raw = raw.float()
    if scale is not None:
        raw = raw * scale
    if token_scale is not None:
        raw = raw * token_scale[:, None]
    if bias is not None:
        raw = raw + bias
    return raw.to(out_dtype).contiguous()


def _pad(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """``x`` with rows of zeros up to a multiple; the same tensor where none is missing."""
    return _with_rows(x, -(-x.shape[0] // multiple) * multiple)


def _with_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    if rows == x.shape[0]:
        return x
    bits = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
    return torch.nn.functional.pad(bits, (0, 0, 0, rows - x.shape[0])).view(x.dtype)
