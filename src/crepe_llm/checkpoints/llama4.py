"""The experts of Llama 4: transformers reads them taken apart where they are quantized, and whole everywhere else.

Taken apart they are `G.N.gate_proj`, `G.N.up_proj` and `G.N.down_proj`, as linear layers, where G ends in `.experts`.
Whole they are `G.gate_up_proj` [experts, d, 2 d_inner] and `G.down_proj` [experts, d_inner, d], transposed.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from crepe_llm.checkpoints.experts import Expert, expert_of
from crepe_llm.checkpoints.reading import Checkpoint, objects_in

__all__ = ["WHOLE", "groups_apart", "has_whole_experts", "is_llama4", "put_together"]

WHOLE = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""What whole experts are made of, in this order."""


def is_llama4(config: dict[str, Any]) -> bool:
    """Whether config.json is one of a Llama 4, with or without its vision tower."""
    return "llama4_text" in (config.get("model_type"), objects_in(config.get("text_config")).get("model_type"))


def has_whole_experts(model: Any) -> bool:
    """Whether a model holds Llama 4's experts as it does where they are not quantized."""
    return any(type(module).__name__ == "Llama4TextExperts" for module in model.modules())


def groups_apart(checkpoint: Checkpoint) -> dict[str, list[Expert]]:
    """The matrices of experts that are stored apart and plain, by group, in the order of the checkpoint's tensors."""
    groups: dict[str, list[Expert]] = defaultdict(list)
    for name in checkpoint.tensors:
        if name.endswith(".weight") and (expert := expert_of(name.removesuffix(".weight"))):
            groups[expert.group].append(expert)
    return groups


def put_together(groups: Mapping[str, list[Expert]], checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    """What is stored in the place of a tensor where experts lie whole, of `groups` that are apart.

    The tensors of a group come in the place of its first, while no file with one of the others has been rewritten.
    """
    expert = expert_of(name.removesuffix(".weight"))
    if expert is None or expert.group not in groups:
        return {name: checkpoint.load(name)}
    if expert != groups[expert.group][0]:
        return {}
    numbers = range(1 + max(one.number for one in groups[expert.group]))
    return {
        f"{expert.group}.{whole}": torch.stack(
            [
                torch.cat([checkpoint.load(f"{expert.group}.{number}.{part}.weight") for part in parts]).T
                for number in numbers
            ]
        )
        for whole, parts in WHOLE.items()
    }
