"""The feed-forward network of each decoder block of a transformers model: finding its matrices and cutting channels.

A channel of an FFN is a row of the matrices that write it (with its bias) and a column of the one that reads it.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch

from crepe_llm.models.blocks import find_blocks
from crepe_llm.models.families import FAMILIES
from crepe_llm.models.linear import is_transposed

__all__ = ["FFN", "cut", "find_ffns"]

# Those of all families, as models outside the table share them; the gated one is tried first.
_LAYOUTS = tuple(dict.fromkeys(family.ffn for family in FAMILIES.values()))


@dataclass(frozen=True)
class FFN:
    """The matrices of one block's FFN.

    Attributes:
        name: of the module that holds them, which for OPT is the block itself.
        inputs: the linear layers that write the channels.
        output: the linear layer that reads them.
        width: how many channels there are.
    """

    name: str
    inputs: tuple[torch.nn.Module, ...]
    output: torch.nn.Module

    @property
    def width(self) -> int:
        return _shape(self.output)[1]


def find_ffns(model: Any) -> list[FFN]:
    """The FFN of every decoder block of a transformers causal language model, in order.

    Raises:
        ValueError: if a block is a Mixture of Experts, or its FFN none of those known; naming the block.
    """
    return [_find(name, block) for name, block in find_blocks(model).items()]


def cut(ffn: FFN, channels: torch.Tensor) -> None:
    """Keep the channels of an FFN whose positions are given (int64), and drop the others, biases included, in place."""
    for module in ffn.inputs:
        _select(module, "weight", 1 if is_transposed(module) else 0, channels)
        if getattr(module, "bias", None) is not None:
            _select(module, "bias", 0, channels)
        _set_size(module, "nf" if is_transposed(module) else "out_features", channels)
    _select(ffn.output, "weight", 0 if is_transposed(ffn.output) else 1, channels)
    _set_size(ffn.output, "nx" if is_transposed(ffn.output) else "in_features", channels)


def _find(name: str, block: torch.nn.Module) -> FFN:
    inside = dict(block.named_modules())
    found = []
    for inner, module in inside.items():
        for inputs, output in _LAYOUTS:
            if all(isinstance(getattr(module, part, None), torch.nn.Module) for part in (*inputs, output)):
                full = f"{name}.{inner}" if inner else name
                found.append(FFN(full, tuple(getattr(module, part) for part in inputs), getattr(module, output)))
                break
    if len(found) > 1 or any("expert" in inner for inner in inside):
        raise ValueError(
            f"{name} is a Mixture of Experts ({type(block).__name__}), whose FFNs would have to be cut expert by "
            "expert; CFSP prunes blocks with one FFN each"
        )
    if not found:
        linears = [inner for inner, module in inside.items() if getattr(module, "weight", None) is not None]
        known = ", ".join(" + ".join((*inputs, output)) for inputs, output in _LAYOUTS)
        raise ValueError(
            f"the FFN of {name} ({type(block).__name__}) has an unknown shape: its modules with weights are "
            f"{', '.join(linears)}; known are {known}"
        )
    _check(found[0], block)
    return found[0]


def _check(ffn: FFN, block: torch.nn.Module) -> None:
    members = (*ffn.inputs, ffn.output)
    for module in members:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"{ffn.name} holds a {type(module).__name__} that has no plain weight matrix: load the model without "
                "quantization, or in its decompressed form"
            )
    width, hidden = ffn.width, _shape(ffn.output)[0]
    shapes = [_shape(module) for module in members]
    if any(shape != (width, hidden) for shape in shapes[:-1]):
        raise ValueError(f"the FFN of {ffn.name} has an unknown shape: matrices of {shapes} do not form one")
    owner = next(m for m in block.modules() if all(any(c is member for c in m.children()) for member in members))
    # By place, as an offloaded module makes a new parameter whenever it is asked for one.
    others = {} if owner is block or width == hidden else dict(owner.named_modules())
    for name, parameter in (
        (f"{inner}.{kind}" if inner else kind, parameter)
        for inner, module in others.items()
        if not any(module is member for member in members)
        for kind, parameter in module.named_parameters(recurse=False)
    ):
        if width in parameter.shape:
            raise ValueError(
                f"the FFN of {ffn.name} has an unknown shape: its {name} {list(parameter.shape)} is made for the "
                f"{width} channels, too"
            )


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    """d_out, d_in."""
    rows, columns = cast(torch.Tensor, module.weight).shape
    return (columns, rows) if is_transposed(module) else (rows, columns)


def _select(module: torch.nn.Module, name: str, dim: int, channels: torch.Tensor) -> None:
    old = getattr(module, name)
    with torch.no_grad():
        new = old.index_select(dim, channels.to(old.device))
    setattr(module, name, torch.nn.Parameter(new, requires_grad=old.requires_grad))


def _set_size(module: torch.nn.Module, name: str, channels: torch.Tensor) -> None:
    if hasattr(module, name):
        setattr(module, name, channels.numel())
