"""Linear layers that are left dense unless a recipe names them."""

import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch

__all__ = ["dense_by_default"]

ROUTER, NARROW, READ = "routers and gates", "layers of fewer than 8 rows or columns", "weights that are read directly"

_GATE = re.compile(r"(\w+_)?gate")
_NARROWEST = 8
# Mamba multiplies by dt_proj's weight without calling the layer, and vLLM so uses the kv_b_proj of latent attention.
_READ_WITHOUT_A_CALL = ("dt_proj", "kv_b_proj")


def dense_by_default(layers: Mapping[str, torch.nn.Module], modules: Iterable[str]) -> dict[str, str]:
    """Those layers that have few weights and much influence, or that serving cannot pack, each with what it is.

    Args:
        layers: linear layers by name, their weights wherever they are kept.
        modules: the names of all modules of the model, which tell routers of experts from the gates of dense FFNs.
    """
    parts = [name.split(".") for name in modules]
    with_experts = {tuple(name[:place]) for name in parts for place, part in enumerate(name) if "expert" in part}
    kinds = {name: _kind_of(name, cast(torch.Tensor, module.weight), with_experts) for name, module in layers.items()}
    return {name: kind for name, kind in kinds.items() if kind}


def _kind_of(name: str, weight: torch.Tensor, with_experts: set[tuple[str, ...]]) -> str:
    parts = name.split(".")
    routes = any("router" in part for part in parts)
    gates = (place for place, part in enumerate(parts) if _GATE.fullmatch(part))
    if routes or any(tuple(parts[:place]) in with_experts for place in gates):
        return ROUTER
    if parts[-1] in _READ_WITHOUT_A_CALL:
        return READ
    return NARROW if min(weight.shape) < _NARROWEST else ""
