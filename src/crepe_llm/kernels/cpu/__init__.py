"""The C++ kernels: loading the library that was built with the package, and calling it through ctypes.

Threads are those of the OpenMP runtime that torch has loaded: the library links no runtime of its own and is handed
``GOMP_parallel`` (which LLVM's and Intel's runtimes export too), found the way that torch's own calls find it. So there
is one pool, and ``torch.set_num_threads`` and CPU affinity set for torch hold here.
"""

import ctypes
import functools
import os
import struct
import warnings
from pathlib import Path

import torch
from torch.autograd import forward_ad

from crepe_llm.kernels import checks
from crepe_llm.kernels.formats import format_named, format_of
from crepe_llm.kernels.packed import DenseWeight, PackedExperts, PackedWeight

ISA_VARIABLE = "CREPE_CPU_ISA"

# Activations, biases and dense weights have the codes of the formats of their dtype.
_FLOATS = {dtype: code for dtype in checks.ACTIVATIONS if (code := format_of(dtype).code) is not None}
# Dense int8 weights have the code of a format that quantizes activations, or of one that does not.
_DENSE_INT8 = {"lanes": format_named("int8").code, "exact": format_named("int8_weight_only").code}
_SPARSE24, _DENSE = 0, 1
# pip keeps the wheel that it builds, one without kernels too, and would install that again.
_CURE = (
    "Install a C++17 compiler (g++ or clang++), then in the checkout: "
    "pip install --force-reinstall --no-deps --no-cache-dir . "
    "(of what came from an index: --no-binary crepe-llm crepe-llm instead of the dot)"
)
_NO_MEMORY = 1  # what crepe_multiply returns; 2: sizes that do not belong together


# ``Problem`` of kernels.h: six addresses; m, n, k, two strides of x; five sizes; layout and four codes of dtypes.
_PROBLEM = struct.Struct("6P 10q 5i 0q")


def opened() -> tuple[ctypes.CDLL | None, str]:
    """The kernel library, or None and why there is none."""
    found = Path(__file__).with_name("_kernels.so")
    if not found.exists():
        return None, "it was not built when crepe-llm was installed"
    try:
        loaded = ctypes.CDLL(str(found))
        current = loaded.crepe_problem_bytes() == _PROBLEM.size and bool(loaded.crepe_multiply_experts)
    except (AttributeError, OSError) as error:
        return None, str(error)
    if not current:
        return None, f"{found.name} was built from another version of the source"
    loaded.crepe_instruction_set.restype = ctypes.c_char_p
    problem, pointer, integer = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int32
    loaded.crepe_multiply.argtypes = (problem, integer, pointer, integer)
    loaded.crepe_multiply_experts.argtypes = (problem, pointer, ctypes.c_int64, integer, pointer, integer)
    return loaded, ""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernel library, or None (with one warning) where the package was installed without it."""
    loaded, reason = opened()
    if loaded is None:
        warnings.warn(
            f"crepe-llm's CPU kernel library is missing ({reason}); 2:4 weights are decompressed at every product, "
            f"which is slow. {_CURE}",
            RuntimeWarning,
            stacklevel=2,
        )
    return loaded


@functools.cache
def instruction_sets() -> dict[str, int]:
    """Names of the instruction sets that this processor can run, best first, with their index in the library."""
    lib = library()
    if lib is None:
        return {}
    names: dict[str, int] = {}
    index = 0
    while (name := lib.crepe_instruction_set(index)) is not None:
        if lib.crepe_supported(index):
            names[name.decode()] = index
        index += 1
    return names


@functools.cache
def default_instruction_set() -> str | None:
    """The instruction set in use: the one named by ``CREPE_CPU_ISA``, else the best; None without a library.

    Raises ValueError when the variable names one that this machine cannot run.
    """
    names = instruction_sets()
    if not names:
        return None
    asked = os.environ.get(ISA_VARIABLE)
    if asked and asked not in names:
        raise ValueError(f"{ISA_VARIABLE}={asked}: this machine runs {', '.join(names)}")
    return asked or next(iter(names))


@functools.cache
def default_index() -> int | None:
    """The index of the default instruction set in the library; None without a library."""
    name = default_instruction_set()
    return None if name is None else instruction_sets()[name]


@functools.cache
def parallel() -> int:
    """Address of ``GOMP_parallel`` in the OpenMP runtime that torch calls, or 0 where there is none."""
    torch_library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    for name in (None, str(torch_library)):
        try:
            function = ctypes.CDLL(name).GOMP_parallel
        except (AttributeError, OSError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def multiply(
    x: torch.Tensor,
    weight: PackedWeight | DenseWeight,
    bias: torch.Tensor | None,
    instruction_set: str | None = None,
) -> torch.Tensor:
    """``x`` [M, K] (any strides) times ``weight``, plus ``bias``: [M, N] in x's dtype.

    The caller has checked that :func:`library` is there. ``instruction_set`` is one of :func:`instruction_sets`
    (default: :func:`default_instruction_set`). Raises as :func:`crepe_llm.kernels.checks.product`.
    """
    checks.product(x, weight, bias)
    if not x.is_cpu:
        raise ValueError(f"x is on {x.device}; these kernels run on the CPU")
    if isinstance(weight, PackedWeight) and weight.format.code is None:
        raise ValueError(f"the CPU has no kernel for {weight.format.name} weights; crepe_llm.kernels.pack widens them")
    x = x.resolve_neg()
    if bias is not None:
        bias = bias.resolve_neg().to(bias.dtype if bias.dtype in _FLOATS else torch.float32).contiguous()
    y = x.new_empty(x.shape[0], weight.shape[0])
    index = instruction_sets()[instruction_set or default_instruction_set() or ""]
    return _multiply(x, (x.shape[0], x.stride(0), x.stride(1)), weight, bias, y, index)


def multiply_plain(
    x: torch.Tensor, weight: PackedWeight | DenseWeight, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """``x`` [..., K], on the CPU, times ``weight``, plus ``bias``: [..., N], as :func:`multiply` gives it.

    A small product takes no longer than :func:`multiply` takes to look at its operands; here they are told apart at
    once. None for what is not usual: gradients recorded, strides, shapes or dtypes that need a change or an error, no
    library.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or not weight.operands.on_cpu:
        return None
    shape, (n, k) = x.shape, weight.shape
    if not shape or shape[-1] != k or not k or x.dtype not in _FLOATS or not x.is_contiguous() or x.is_neg():
        return None
    if bias is not None:
        plain = bias.is_cpu and bias.dtype in _FLOATS and bias.is_contiguous() and not bias.is_neg()
        if not plain or bias.numel() != n:
            return None
    index = default_index()
    return (
        None
        if index is None or library() is None
        else _multiply(x, (x.numel() // k, k, 1), weight, bias, x.new_empty(*shape[:-1], n), index)
    )


def _multiply(
    x: torch.Tensor,
    layout_of_x: tuple[int, int, int],
    weight: PackedWeight | DenseWeight,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    index: int,
) -> torch.Tensor:
    """``y`` with the product of checked operands in it; ``layout_of_x`` is tokens, row stride and column stride."""
    data, scale, zero, _ = weight.operands
    (n, k), (m, row_stride, column_stride) = weight.shape, layout_of_x
    if isinstance(weight, PackedWeight):
        layout, code = _SPARSE24, weight.format.code
    else:
        int8 = weight.dtype == torch.int8
        layout, code = _DENSE, _DENSE_INT8[weight.inputs] if int8 else _FLOATS[weight.dtype]
    problem = _PROBLEM.pack(
        data.data_ptr(),
        x.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        m,
        n,
        k,
        row_stride,
        column_stride,
        data.nbytes,
        k,
        0 if scale is None else scale.numel(),
        0 if zero is None else zero.numel(),
        0 if bias is None else n,
        layout,
        code,
        _FLOATS[x.dtype],
        0 if scale is None else _FLOATS[scale.dtype],
        0 if bias is None else _FLOATS[bias.dtype],
    )
    lib = library()
    assert lib is not None
    status = lib.crepe_multiply(problem, index, parallel(), torch.get_num_threads())
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for the converted activations of {m} tokens x {k} columns")
    if status:
        raise ValueError(f"the operands do not fit a product of {m} tokens with a weight of {n} x {k}")
    return y


def multiply_experts(
    x: torch.Tensor, ends: torch.Tensor, experts: PackedExperts, instruction_set: str | None = None
) -> torch.Tensor:
    """``x`` [M, K], its rows in the order of the experts, times the weight of the expert of each: [M, N] in x's dtype.

    ``ends`` and what is raised are those of :func:`crepe_llm.kernels.experts.experts_linear`, ``instruction_set`` and
    what the caller has checked are those of :func:`multiply`.
    """
    checks.grouped(x, ends, experts)
    if not x.is_cpu:
        raise ValueError(f"x is on {x.device}; these kernels run on the CPU")
    n, k = experts.shape
    x, ends = x.resolve_neg(), ends.contiguous()
    y = x.new_empty(x.shape[0], n)
    scale = experts.scale
    addresses = (experts.data.data_ptr(), x.data_ptr(), 0 if scale is None else scale.data_ptr(), 0, 0, y.data_ptr())
    shape = (x.shape[0], n, k, *x.stride())
    counts = (experts.data.nbytes, x.shape[1], 0 if scale is None else scale.numel(), 0, 0)
    codes = (_SPARSE24, experts.format.code, _FLOATS[x.dtype], _FLOATS[torch.float32], 0)
    problem = _PROBLEM.pack(*addresses, *shape, *counts, *codes)
    index = instruction_sets()[instruction_set or default_instruction_set() or ""]
    lib = library()
    assert lib is not None
    status = lib.crepe_multiply_experts(problem, ends.data_ptr(), len(ends), index, parallel(), torch.get_num_threads())
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for the converted activations of {x.shape[0]} rows x {k} columns")
    if status:
        raise ValueError(f"the operands do not fit products of {x.shape[0]} rows with {len(ends)} weights of {n} x {k}")
    return y
