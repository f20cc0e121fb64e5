"""What token ids and lengths a transformers model can be given."""

import re
from typing import Any

import torch

__all__ = ["check_positions", "check_vocabulary", "learned_positions"]

_POSITIONS = re.compile(r"wpe|\w*position\w*")
# Parts of a model that look at images or sounds: their positions are no tokens'. Some bodies hold them (Idefics).
_TOWERS = re.compile(r"vision|image|img|visual|audio|speech")


def learned_positions(model: Any) -> int | None:
    """How many positions the decoder's table of position embeddings has; None for a model without such a table."""
    for name, module in model.get_decoder().named_modules():
        of_tokens = _POSITIONS.fullmatch(name.rpartition(".")[2]) and not _TOWERS.search(name)
        if isinstance(module, torch.nn.Embedding) and of_tokens:
            # Rows that no position uses: OPT's and BART's first two, RoBERTa's first ones up to the padding id.
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - int(getattr(module, "offset", unused))
    return None


def check_positions(model: Any, longest: int) -> None:
    """Raise ValueError if a sequence of `longest` tokens has positions that the model has no embeddings for."""
    positions = learned_positions(model)
    if positions is not None and longest > positions:
        raise ValueError(
            f"the calibration data has sequences of {longest} tokens, and {type(model).__name__} has embeddings for "
            f"{positions} positions: give oneshot max_seq_length={positions}, or shorter sequences"
        )


def check_vocabulary(model: Any, lowest: int, highest: int) -> None:
    """Raise ValueError if token ids from `lowest` to `highest` are outside the model's vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if lowest < 0 or highest >= vocabulary:
        raise ValueError(
            f"token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of {vocabulary}: "
            "the windows were made with another model's tokenizer"
        )
