"""GPU backends: packing for them, and the operator that multiplies by what the shape's plan names.

Rules of which backend may serve what are in :mod:`crepe_llm.kernels.dispatch`; measuring is in
:mod:`crepe_llm.kernels.cuda.plans`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch

from crepe_llm.kernels import checks
from crepe_llm.kernels.cuda import products
from crepe_llm.kernels.cuda.plans import (
    Candidate,
    Plan,
    PlanStore,
    cache_path,
    dense_copy_allowed,
    measure,
    warn_refused,
)
from crepe_llm.kernels.cuda.products import CUSPARSELT, CUTLASS, DENSE, EXPAND
from crepe_llm.kernels.cuda.weight import CudaWeight, cutlass_metadata, metadata_words, to_dense
from crepe_llm.kernels.formats import Format
from crepe_llm.kernels.packed import INTEGERS, Inputs, Kept

__all__ = ["CudaWeight", "check_call", "chosen", "linear", "pack", "to_dense"]


def pack(kept: Kept, scale: torch.Tensor | None, inputs: Inputs | None, backends: Sequence[str]) -> CudaWeight:
    """Packs a weight for ``backends``.

    On a GPU the first weight of a shape and format is timed with each of them (seconds, not milliseconds), unless the
    user's cache has the timings; what the plan has no use for is not kept.
    """
    values, columns, form = kept
    n, k = kept.shape
    base = CudaWeight(
        (n, k), form, values.reshape(n, k // 2).contiguous(), metadata_words(columns), scale=scale, inputs=inputs
    )
    if not backends:
        return base
    assert base.values is not None
    device = base.values.device
    key = _plan_key(device, base.shape, form)

    def measured() -> Plan:
        weight, usable = _prepared(base, (*backends, DENSE))
        return measure(weight, [backend for backend in usable if backend != DENSE])

    plan = _store().get_or_measure(key, measured)
    with_dense = plan.wants_dense() and _has_room(device, n * k * form.dtype.itemsize)
    used = plan.backends(with_dense)
    weight, usable = _prepared(base, used)
    if used - set(usable):
        raise RuntimeError(
            f"{n} x {k} {form.name}: {', '.join(sorted(used - set(usable)))} worked when it was measured and "
            f"failed now (see the warning); if it is no lack of memory, remove {_store().path} to measure again"
        )
    if with_dense and not used & {products.TRITON, EXPAND}:
        weight = dataclasses.replace(weight, metadata=None, values=weight.values if CUTLASS in used else None)
    return weight


def linear(
    x: torch.Tensor,
    weight: CudaWeight,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """[M, N] in ``out_dtype``; ``x`` [M, K] is quantized as the weight says, with its scales [M] in ``token_scale``.

    Raises as :func:`check_call`.
    """
    check_call(x, weight, token_scale, bias, out_dtype)
    x = x.resolve_neg()
    bias = None if bias is None else bias.resolve_neg().reshape(-1).contiguous()
    if x.shape[0] == 0:
        return torch.empty(0, weight.shape[0], dtype=out_dtype, device=x.device)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        return products.product(chosen(x, weight), x, weight, token_scale, bias, out_dtype)


def check_call(
    x: torch.Tensor,
    weight: CudaWeight,
    token_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Checks what comes with a call of :func:`linear`.

    Raises ValueError, TypeError or RuntimeError as :func:`crepe_llm.kernels.checks.product`; ValueError too where the
    weight lacks the tensors of every product.
    """
    checks.product(x, weight, bias, products.input_dtypes(weight.format), token_scale)
    if out_dtype not in checks.ACTIVATIONS:
        raise TypeError(f"out_dtype is {out_dtype}; bfloat16, float16 or float32 is needed")
    if weight.dense is None and (weight.values is None or weight.metadata is None):
        raise ValueError("the weight has neither values and metadata nor a dense copy")


def chosen(x: torch.Tensor, weight: CudaWeight) -> Candidate:
    """The product that multiplies ``x`` [M, K] by the weight."""
    has_dense = weight.dense is not None
    plan = _store().get(_plan_key(x.device, weight.shape, weight.format))
    if plan is None or x.dtype != weight.format.dtype:
        return Candidate(DENSE if has_dense else EXPAND)
    return plan.choose(x.shape[0], has_dense)


def _has_room(device: torch.device, copy: int) -> bool:
    total = torch.cuda.get_device_properties(device).total_memory
    return dense_copy_allowed(torch.cuda.memory_allocated(device), total, copy)


def _prepared(base: CudaWeight, backends: Sequence[str] | set[str]) -> tuple[CudaWeight, list[str]]:
    """``base`` with what the backends need, and which of them that worked for."""
    weight, usable = base, []
    for backend in sorted(backends):
        try:
            if backend == CUSPARSELT:
                weight = _with_cusparselt(weight)
            elif backend == CUTLASS:
                assert base.metadata is not None
                weight = dataclasses.replace(weight, cutlass=cutlass_metadata(base.metadata, base.format))
            elif backend == DENSE:
                weight = dataclasses.replace(weight, dense=products.expanded(weight))
        except RuntimeError as error:
            warn_refused(backend, base, error)
        else:
            usable.append(backend)
    return weight, usable


def _with_cusparselt(weight: CudaWeight) -> CudaWeight:
    """Adds cuSPARSELt's compressed tensor, and drops our copy of the values where the library keeps them in our order.

    Which values it keeps of a group with zeros is its own choice: so other values, none of them zero, are compressed,
    looked for, and overwritten with the true ones.
    """
    assert weight.values is not None and weight.metadata is not None
    values = weight.values
    dtype, integer = values.dtype, INTEGERS[values.itemsize]
    one = torch.ones(1, dtype=dtype).view(integer).item()
    stand_in = torch.where(values.float() == 0, one, values.view(integer)).view(dtype)
    compressed = torch._cslt_compress(products.expanded(dataclasses.replace(weight, values=stand_in, dense=None)))
    kept = compressed.view(-1)[: values.numel()].view(values.shape)
    if torch.equal(kept.view(torch.uint8), stand_in.view(torch.uint8)):
        kept.copy_(values)
        return dataclasses.replace(weight, cusparselt=compressed, values=kept)
    compressed = torch._cslt_compress(products.expanded(dataclasses.replace(weight, dense=None)))
    return dataclasses.replace(weight, cusparselt=compressed)


@functools.cache
def _store() -> PlanStore:
    return PlanStore(cache_path())


@functools.cache
def _plan_key(device: torch.device, shape: tuple[int, int], form: Format) -> str:
    import triton

    from crepe_llm.kernels.cuda import triton_kernels

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    library = torch.backends.cusparselt.version() if torch.backends.cusparselt.is_available() else None
    # A plan names tiles by their numbers.
    tiles = " ".join("x".join(map(str, config)) for config in triton_kernels.CONFIGS)
    versions = f"torch {torch.__version__}, Triton {triton.__version__} ({tiles}), cuSPARSELt {library}"
    return f"{name}, {versions}: {shape[0]} x {shape[1]} {form.name}"
