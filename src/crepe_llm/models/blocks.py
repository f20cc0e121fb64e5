"""Decoder blocks: the list of them in a model, the block that a module is in, and the kind of a module."""

from typing import Any

import torch

__all__ = ["block_of", "find_blocks", "kind_of"]


def find_blocks(model: Any) -> dict[str, torch.nn.Module]:
    """The decoder blocks of a transformers causal language model in order, by name.

    Raises:
        ValueError: if the decoder has no list of blocks, or more than one.
    """
    decoder = model.get_decoder()
    name_of = {module: name for name, module in model.named_modules()}
    lists = _lists(decoder)
    if not lists and hasattr(decoder, "model"):
        lists = _lists(decoder.model)  # a whole language model, head included
    if len(lists) > 1:  # Gemma 3n has lists of projections, too
        config = getattr(model, "config", None)
        depth = None if config is None else getattr(config.get_text_config(), "num_hidden_layers", None)
        lists = [each for each in lists if len(each) == depth] or lists
    if len(lists) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(lists)} lists of decoder blocks in its {type(decoder).__name__} where "
            "one is expected"
        )
    return {name_of[block]: block for block in lists[0]}


def _lists(decoder: torch.nn.Module) -> list[torch.nn.ModuleList]:
    return [module for module in decoder.children() if isinstance(module, torch.nn.ModuleList) and len(module)]


def block_of(name: str) -> str:
    """The name of the block that a module is in, such as "model.layers.3"; "" for a module outside all blocks."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def kind_of(name: str) -> str:
    """The name of a module with a star for each number, such as "model.layers.*.mlp.experts.*.up_proj".

    Modules with the same place in different blocks, and in different experts of a block, are of one kind.
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))
