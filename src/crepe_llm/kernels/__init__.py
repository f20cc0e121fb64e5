"""2:4 matrix products: C++ on CPUs, Triton, cuSPARSELt and CUTLASS on GPUs, and a reference that decompresses.

``pack`` (or ``pack_compressed``, straight from a checkpoint's tensors) gives a packed weight; ``linear`` multiplies:

>>> import torch
>>> from crepe_llm import kernels
>>> packed = kernels.pack(torch.tensor([[0.0, 2.0, 0.0, 3.0], [1.0, 0.0, 0.0, 0.0]]))
>>> kernels.linear(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), packed)
tensor([[16.,  1.]])
"""

from crepe_llm.kernels.cuda.weight import CudaWeight
from crepe_llm.kernels.dispatch import linear, pack, pack_compressed, pack_int4, unpack
from crepe_llm.kernels.packed import DenseWeight, PackedWeight, pack_dense

__all__ = [
    "CudaWeight",
    "DenseWeight",
    "PackedWeight",
    "linear",
    "pack",
    "pack_compressed",
    "pack_dense",
    "pack_int4",
    "unpack",
]
