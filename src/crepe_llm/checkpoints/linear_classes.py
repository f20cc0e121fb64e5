"""Quantized weights of layers and embeddings of a class of their own, such as Falcon's and Gemma's.

compressed-tensors chooses the form of a weight by the class of its module. Of one that is derived from
`torch.nn.Linear` it writes scales beside the weight in full precision, and of one derived from `torch.nn.Embedding`
codes that nothing unpacks; readers find neither what they look for. And of an offloaded module it makes parameters of
all tensors, which are then saved: also of the factor that Gemma multiplies its embeddings with.
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

    replace = base.replace_direct_state_dict

    @functools.wraps(replace)
    def replace_direct_state_dict(module: torch.nn.Module, *args: Any) -> None:
        unsaved = module._non_persistent_buffers_set & module._buffers.keys()
        replace(module, *args)
        for name in unsaved & module._parameters.keys():
            value = getattr(module, name).detach()
            delattr(module, name)
            module.register_buffer(name, value, persistent=False)

    base.replace_direct_state_dict = replace_direct_state_dict  # type: ignore[attr-defined]
    infer_module_format._takes_derived = True  # type: ignore[attr-defined]
    for module in (base, form):
        vars(module)["infer_module_format"] = infer_module_format
