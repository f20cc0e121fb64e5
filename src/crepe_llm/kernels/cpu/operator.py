"""``crepe_llm::sparse24_linear`` in C++, which torch's dispatcher, and so a compiled model, calls without Python.

The library is built without torch. It gets the functions of torch's stable C interface as addresses and hands back a
function that torch's dispatcher can call (operator.cpp). Where torch lacks one of them, or the library is missing or
another, the operator in Python serves.
"""

import ctypes
import functools
from pathlib import Path

import torch

from crepe_llm.kernels import cpu

__all__ = ["register"]

_FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_numel",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_is_contiguous",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "torch_string_c_str",
    "torch_delete_string",
    "torch_delete_stable_ivalue",
    "torch_get_num_threads",
)
_NUMBERS = (
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_uint8",
    "aoti_torch_device_type_cpu",
)


class _Torch(ctypes.Structure):
    """``Torch`` of operator.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*_FUNCTIONS, "parallel")),
        *((name, ctypes.c_int32) for name in (*_NUMBERS, "instruction_set")),
    )


@functools.cache
def register(namespace: str, name: str) -> bool:
    """Gives torch's dispatcher the C++ operator for CPU tensors, once; False, and nothing is done, where it cannot."""
    try:
        kernels, _ = cpu.opened()
        if kernels is None or kernels.crepe_torch_bytes() != ctypes.sizeof(_Torch):
            return False
        index = cpu.default_index()
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        addresses = [ctypes.cast(getattr(torch_library, function), ctypes.c_void_p) for function in _FUNCTIONS]
        numbers = [getattr(torch_library, number)() for number in _NUMBERS]
        kernels.crepe_use_torch(ctypes.byref(_Torch(*addresses, cpu.parallel(), *numbers, index)))
        version = torch_library.aoti_torch_abi_version
        version.restype = ctypes.c_uint64
        begin, implement = torch_library.aoti_torch_library_init_impl, torch_library.torch_library_impl
        operator = ctypes.cast(kernels.crepe_sparse24_linear, ctypes.c_void_p)
        library = ctypes.c_void_p()  # never given back: the operator lives as long as the process
        failed = begin(namespace.encode(), b"CPU", Path(__file__).name.encode(), 0, ctypes.byref(library))
        return not failed and not implement(library, name.encode(), operator, ctypes.c_uint64(version()))
    except (AttributeError, OSError, ValueError):  # CREPE_CPU_ISA may name none: products say so
        return False
