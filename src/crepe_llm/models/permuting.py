"""Reordering the channels of a model's modules in place."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import align_module_device

from crepe_llm import processes
from crepe_llm.models.linear import is_transposed

__all__ = ["permute_parameters"]

_KINDS = ("weight", "bias")


def permute_parameters(
    modules: Mapping[str, torch.nn.Module], indices: Mapping[str, Sequence[torch.Tensor | None]]
) -> None:
    """Reorder weights and biases, wherever they are kept; tied weights, which are one tensor, once.

    Args:
        modules: by name.
        indices: by the same names, for each axis of the weight (of a linear layer [d_out, d_in], however it is stored)
            which old channel stands where (int64), or None for an axis that stays. A bias has the first axis.
    """
    with disable_onloading():
        stored = {(name, kind): getattr(modules[name], kind, None) for name in indices for kind in _KINDS}
    permuted: set[int] = set()
    for name, axes in indices.items():
        module = modules[name]
        with torch.no_grad(), align_module_device(module):
            for kind in _KINDS:
                if stored[name, kind] is None or id(stored[name, kind]) in permuted:
                    continue
                permuted.add(id(stored[name, kind]))
                parameter = cast(torch.Tensor, getattr(module, kind)).detach()
                stored_axes = axes[::-1] if kind == "weight" and is_transposed(module) else axes
                for dimension, index in zip(range(parameter.dim()), stored_axes, strict=False):
                    if index is not None:
                        parameter = parameter.index_select(dimension, index.to(parameter.device))
                processes.write_parameter(module, kind, parameter)
