"""Quantized weights of linear layers of a class of their own, such as Falcon's.

compressed-tensors writes and reads the weights of `torch.nn.Linear` itself quantized. Those of a class that is derived
from it get scales, but stay in full precision in the file, and readers find neither what they look for.
"""

import functools
from importlib import import_module
from typing import Any

import torch

__all__ = ["quantize_derived_classes"]


def quantize_derived_classes() -> None:
    """Have compressed-tensors write and read derived classes as `torch.nn.Linear`. Idempotent."""
    # Both import it by name, and the package has other modules of these names.
    base, form = (import_module(f"compressed_tensors.compressors.{name}") for name in ("base", "format"))
    infer = base.infer_module_format
    if getattr(infer, "_takes_derived", False):
        return

    @functools.wraps(infer)
    def infer_module_format(module_type: type, *args: Any, **kwargs: Any) -> Any:
        derived = issubclass(module_type, torch.nn.Linear) and not module_type.__module__.startswith("compressed_")
        return infer(torch.nn.Linear if derived else module_type, *args, **kwargs)

    infer_module_format._takes_derived = True  # type: ignore[attr-defined]
    for module in (base, form):
        vars(module)["infer_module_format"] = infer_module_format
