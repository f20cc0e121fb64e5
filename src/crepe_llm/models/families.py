"""What is known of each family of models: one entry a family, by the `model_type` of its configuration.

Axes of channels. For each module an entry names the axes of its weight as stored: (output channels, input channels) of
a linear layer, (vocabulary, channels) of an embedding, (channels,) of a norm. A bias has the first axis. Modules that
have an axis in common share its channels:

- "residual": the residual stream, one for the whole model
- "mlp": the channels between gate_proj, up_proj and down_proj, of each block
- "attention": the channels within a head between v_proj and o_proj, of each block. Where several query heads share a
  key-value head, o_proj has that head's channels once for each of them, in succession
- None: an axis that stays as it is

An entry with axes guarantees that permuting them changes no output. Norms over heads, rotary embeddings and attention
itself act within heads of queries and keys, or alike on all channels of the values, so the channels of values may be
permuted within heads. The residual stream may be permuted if the weights of every norm over it are, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FAMILIES", "PER_BLOCK", "Axes", "Family", "Layout", "PerBlock"]

Axes = tuple[str | None, ...]

Layout = tuple[tuple[str, ...], str]
"""Of an FFN, the names of the matrices that write its channels, and of the one that reads them."""


@dataclass(frozen=True)
class PerBlock:
    """The classes of a family that exist with an FFN width per block.

    Attributes:
        config: transformers' config class, by name.
        model: the model class, which has the same name in transformers and in vLLM.
        vllm: vLLM's module of that class, and the module whose `make_layers` builds its blocks.
    """

    config: str
    model: str
    vllm: tuple[str, str]


_GATED: Layout = (("gate_proj", "up_proj"), "down_proj")


@dataclass(frozen=True)
class Family:
    """What is known of a family.

    Attributes:
        axes: by kind of module (:func:`crepe_llm.models.blocks.kind_of`), the axes of its weight; empty where which
            channels modules share is unknown.
        normalises_outputs: whether what attention and feed-forward give is normalised before it is added to the
            residual.
        ffn: how the matrices of an FFN are called.
        per_block: the classes with an FFN width per block; None if there are none.
    """

    axes: Mapping[str, Axes] = field(default_factory=dict)
    normalises_outputs: bool = False
    ffn: Layout = _GATED
    per_block: PerBlock | None = None


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
_OUTPUT_NORMS: dict[str, Axes] = {
    "model.layers.*.pre_feedforward_layernorm": ("residual",),
    "model.layers.*.post_feedforward_layernorm": ("residual",),
}

FAMILIES: Mapping[str, Family] = {
    "gemma": Family(_LLAMA),
    "gemma2": Family(_LLAMA | _OUTPUT_NORMS, normalises_outputs=True),
    "gemma3_text": Family(
        _LLAMA | _QUERY_KEY_NORMS | _OUTPUT_NORMS,
        normalises_outputs=True,
        per_block=PerBlock("Gemma3TextConfig", "Gemma3ForCausalLM", ("gemma3", "gemma3")),
    ),
    "granite": Family(_LLAMA),
    "llama": Family(_LLAMA, per_block=PerBlock("LlamaConfig", "LlamaForCausalLM", ("llama", "llama"))),
    "ministral": Family(_LLAMA),
    "mistral": Family(_LLAMA, per_block=PerBlock("MistralConfig", "MistralForCausalLM", ("mistral", "llama"))),
    "olmo2": Family(_LLAMA | _QUERY_KEY_NORMS | _OUTPUT_NORMS, normalises_outputs=True),
    "olmo3": Family(_LLAMA | _QUERY_KEY_NORMS | _OUTPUT_NORMS, normalises_outputs=True),
    "qwen2": Family(_LLAMA, per_block=PerBlock("Qwen2Config", "Qwen2ForCausalLM", ("qwen2", "qwen2"))),
    "qwen3": Family(
        _LLAMA | _QUERY_KEY_NORMS, per_block=PerBlock("Qwen3Config", "Qwen3ForCausalLM", ("qwen3", "qwen2"))
    ),
    "smollm3": Family(_LLAMA),
    "nemotron": Family(ffn=(("up_proj",), "down_proj")),
    "opt": Family(ffn=(("fc1",), "fc2"), per_block=PerBlock("OPTConfig", "OPTForCausalLM", ("opt", "opt"))),
    "gpt2": Family(ffn=(("c_fc",), "c_proj"), per_block=PerBlock("GPT2Config", "GPT2LMHeadModel", ("gpt2", "gpt2"))),
    "gptj": Family(ffn=(("fc_in",), "fc_out")),
    "gpt_neox": Family(ffn=(("dense_h_to_4h",), "dense_4h_to_h")),
}

PER_BLOCK: Mapping[str, PerBlock] = {
    name: family.per_block for name, family in FAMILIES.items() if family.per_block is not None
}
"""The families that exist with an FFN width per block."""
