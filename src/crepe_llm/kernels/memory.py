"""Huge pages for weights that are streamed from memory at every token."""

import ctypes
import functools
import sys

import torch

_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14  # <asm-generic/mman-common.h>


@functools.cache
def _madvise() -> "ctypes._FuncPointer | None":
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, whose memory Linux is asked to back with pages of 2 MiB instead of 4 KiB when it is written.

    A product that streams a weight then looks up one address translation where it looked up 512. To be called on fresh
    memory (``torch.empty``), before anything is written. Only whole huge pages inside the tensor are asked for, so
    that it takes no more memory. Does nothing for small tensors, on other devices and other systems, and where huge
    pages are switched off.
    """
    madvise = _madvise()
    if madvise is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    begin = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end > begin:
        madvise(begin, end - begin, _MADV_HUGEPAGE)  # advice: where it is refused, small pages serve
    return tensor
