"""Which channels the modules of a decoder share, and which norms are between: what has to be known of a family.

It is there to permute a model's channels exactly, and to know whether the size of a layer's outputs matters.

For each module a family's table names the axes of its weight as stored: (output channels, input channels) of a linear
layer, (vocabulary, channels) of an embedding, (channels,) of a norm. A bias has the first axis. Modules that have an
axis in common share its channels:

- "residual": the residual stream, one for the whole model
- "mlp": the channels between gate_proj, up_proj and down_proj, of each block
- "attention": the channels within a head between v_proj and o_proj, of each block. o_proj has every key-value head as
  often in succession as query heads share it
- None: an axis that stays as it is

Norms over heads, rotary embeddings and attention itself act within heads of queries and keys, or alike on all channels
of the values, so permuting the channels of values within heads passes through them, and permuting the residual stream
through every norm over all of it, weights permuted along. That is what a family in these tables guarantees.
"""

from collections.abc import Iterable

__all__ = ["AXES", "FAMILIES", "block_of", "module_axes", "normalises_outputs"]

AXES = ("mlp", "attention", "residual")

Axes = tuple[str | None, ...]

_LLAMA: dict[str, Axes] = {
    "model.embed_tokens": (None, "residual"),
    "model.layers.*.input_layernorm": ("residual",),
    "model.layers.*.self_attn.q_proj": (None, "residual"),
    "model.layers.*.self_attn.k_proj": (None, "residual"),
    "model.layers.*.self_attn.v_proj": ("attention", "residual"),
    "model.layers.*.self_attn.o_proj": ("residual", "attention"),
    "model.layers.*.post_attention_layernorm": ("residual",),
    "model.layers.*.mlp.gate_proj": ("mlp", "residual"),
    "model.layers.*.mlp.up_proj": ("mlp", "residual"),
    "model.layers.*.mlp.down_proj": ("residual", "mlp"),
    "model.norm": ("residual",),
    "lm_head": (None, "residual"),
}
_QUERY_KEY_NORMS: dict[str, Axes] = {
    "model.layers.*.self_attn.q_norm": (None,),
    "model.layers.*.self_attn.k_norm": (None,),
}
_FEEDFORWARD_NORMS: dict[str, Axes] = {
    "model.layers.*.pre_feedforward_layernorm": ("residual",),
    "model.layers.*.post_feedforward_layernorm": ("residual",),
}

# By `model_type` of the model's configuration.
FAMILIES: dict[str, dict[str, Axes]] = {
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _FEEDFORWARD_NORMS,
    "gemma3_text": _LLAMA | _QUERY_KEY_NORMS | _FEEDFORWARD_NORMS,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "ministral": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _LLAMA | _QUERY_KEY_NORMS | _FEEDFORWARD_NORMS,
    "olmo3": _LLAMA | _QUERY_KEY_NORMS | _FEEDFORWARD_NORMS,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | _QUERY_KEY_NORMS,
    "smollm3": _LLAMA,
}


def normalises_outputs(model_type: str) -> bool:
    """Whether models of a family normalise what attention and feed-forward give before it is added to the residual.

    False of a family that is not in :data:`FAMILIES`.
    """
    return _FEEDFORWARD_NORMS.keys() <= FAMILIES.get(model_type, {}).keys()


def module_axes(model_type: str, parameters: Iterable[str]) -> dict[str, Axes]:
    """The axes of every module of a model.

    Args:
        model_type: as in the model's configuration.
        parameters: names of all parameters, those of tied weights included.

    Returns:
        By module name the axes of its weight.

    Raises:
        ValueError: if the family is not in :data:`FAMILIES`, or a parameter not in the family's table.
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"the channels of a model of the family {model_type} cannot be permuted, because which modules share them "
            f"is known of {', '.join(FAMILIES)} only"
        )
    table = FAMILIES[model_type]
    axes = {}
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        pattern = ".".join("*" if part.isdecimal() else part for part in module.split("."))
        if kind not in ("weight", "bias") or pattern not in table:
            raise ValueError(
                f"{parameter} is no parameter that a model of the family {model_type} has, so which channels it shares "
                "is unknown and they cannot be permuted"
            )
        axes[module] = table[pattern]
    return axes


def block_of(module: str) -> str:
    """The name of the block that a module is in, such as "model.layers.3"; "" for one outside all blocks."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""
