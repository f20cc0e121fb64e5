"""Quantized weights of layers and embeddings of a class of their own, such as Falcon's and Gemma's.

compressed-tensors chooses the form of a weight by the class of its module. Of one that is derived from
`torch.nn.Linear` it writes scales beside the weight in full precision, and of one derived from `torch.nn.Embedding`
codes that nothing unpacks; readers find neither what they look for.
"""

import functools
from importlib import import_module
from typing import Any

import torch

__all__ = ["quantize_derived_classes"]


def quantize_derived_classes() -> None:
    """Have compressed-tensors write and read classes derived from `torch.nn.Linear` and `torch.nn.Embedding`, such as
    Gemma's scaled embedding, as these. Idempotent."""
    # Both import it by name, and the package has other modules of these names.
    base, form = (import_module(f"compressed_tensors.compressors.{name}") for name in ("base", "format"))
    infer = base.infer_module_format
    if getattr(infer, "_takes_derived", False):
        return

    @functools.wraps(infer)
    def infer_module_format(module_type: type, *args: Any, **kwargs: Any) -> Any:
        theirs = module_type.__module__.startswith("compressed_")
        kinds = (kind for kind in (torch.nn.Linear, torch.nn.Embedding) if issubclass(module_type, kind) and not theirs)
        return infer(next(kinds, module_type), *args, **kwargs)

    infer_module_format._takes_derived = True  # type: ignore[attr-defined]
    for module in (base, form):
        vars(module)["infer_module_format"] = infer_module_format
