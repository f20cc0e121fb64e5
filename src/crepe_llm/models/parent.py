"""Whether a model is the dense one that a pruned model was made of."""

from typing import Any

import torch

from crepe_llm.models.channels import family_of

__all__ = ["check_config", "check_embeddings", "check_tokenizers"]

# What a parent shares with a pruned model of it; FFN widths differ after structured pruning.
_SHARED = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# Embeddings are compared by the inner products of so many of their rows, which permuted channels do not change.
_ROWS = 512
# The largest relative difference of the inner products. Quantization to 4 bit makes one of about 0.02; unrelated
# embeddings one of 1.4.
_MOST_DIFFERENT = 0.3


def check_config(pruned: Any, dense: Any, name: Any, role: str) -> None:
    """Raise ValueError if a model's config says that a pruned one was not made of it.

    Layers of their own width and what a pruned model adds to its config do not count.

    Args:
        pruned: transformers' config of the pruned model.
        dense: that of the dense one.
        name: of the pruned model.
        role: what messages call the dense model, such as `teacher=smollm2`.
    """
    configs = [config.get_text_config() for config in (pruned, dense)]
    for field in _SHARED:
        ours, theirs = (
            family_of(config) if field == "model_type" else getattr(config, field, None) for config in configs
        )
        if ours != theirs:
            raise ValueError(
                f"{role} is not the parent of {name}: its {field} is {theirs}, the model's is {ours}. "
                "Give the dense model that was pruned"
            )


def check_tokenizers(pruned: Any, dense: Any, name: Any, role: str) -> None:
    """Raise ValueError if two models' tokenizers have different vocabularies or cut a text differently.

    Args:
        pruned: the pruned model's tokenizer.
        dense: the dense model's.
        name: of the pruned model.
        role: what messages call the dense model.
    """
    ours, theirs = pruned.get_vocab(), dense.get_vocab()
    if ours != theirs:
        token = min(dict(ours.items() ^ theirs.items()), key=str)
        raise ValueError(
            f"{role} has another vocabulary than {name}: {len(theirs)} tokens, not {len(ours)}; "
            f"{token!r} is {theirs.get(token)} there and {ours.get(token)} here. Give the dense model that was pruned"
        )
    text = "The first of 12,345 lines;\n\tthe second: naïve — 3.14."
    if pruned(text)["input_ids"] != dense(text)["input_ids"]:
        raise ValueError(
            f"{role} has another tokenizer than {name}: they cut the same text differently. Give the "
            "dense model that was pruned, with its own tokenizer"
        )


@torch.no_grad()
def check_embeddings(pruned: Any, dense: Any, name: Any, role: str) -> None:
    """Raise ValueError if a pruned model's embeddings, which pruning leaves alone, are nothing like the dense model's.

    Permuted channels are the same embeddings: the inner products of some rows are compared.

    Args:
        pruned: the pruned model.
        dense: the dense one.
        name: of the pruned model.
        role: what messages call the dense model.
    """
    tables = [model.get_input_embeddings().weight for model in (pruned, dense)]
    if tables[0].shape[0] != tables[1].shape[0]:
        raise ValueError(
            f"{role} has {tables[1].shape[0]} embeddings, {name} has {tables[0].shape[0]}: it has "
            "another vocabulary. Give the dense model that was pruned"
        )
    rows = torch.linspace(0, tables[0].shape[0] - 1, min(_ROWS, tables[0].shape[0])).long()
    chosen = [table[rows.to(table.device)].float().cpu() for table in tables]
    ours, theirs = (part @ part.T for part in chosen)
    difference = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not difference <= _MOST_DIFFERENT:
        raise ValueError(
            f"{role} is not the parent of {name}: inner products of embeddings, which pruning leaves "
            f"alone, differ by {difference:.0%}. Give the dense model that was pruned"
        )
