"""What is known of each family of models: one entry a family, by the `model_type` of its configuration.

Axes of channels. For each module an entry names the axes of its weight: (output channels, input channels) of a linear
layer, (vocabulary, channels) of an embedding, (channels,) of a norm. A bias has the first axis. Modules that
have an axis in common share its channels:

- "residual": the residual stream, one for the whole model
- "mlp": the channels between gate_proj, up_proj and down_proj, of each block or expert. A layer that holds gate_proj
  and up_proj in one has them twice, one set after the other
- "attention": the channels within a head between v_proj and o_proj, of each block. Where several query heads share a
  key-value head, o_proj has that head's channels once for each of them, in succession
- None: an axis that stays as it is, such as the outputs of queries, keys and values in one

The axes of GPT-2's Conv1D are those of the linear layer that it is, (output channels, input channels). Entries of
mixtures of experts name experts as `oneshot` takes them apart.

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

_HEAD_NORMS: dict[str, Axes] = {
    "model.layers.*.self_attn.q_norm": (None, None),
    "model.layers.*.self_attn.k_norm": (None, None),
}

_READS, _NORM, _KEPT = (None, "residual"), ("residual",), (None,)
_UP, _DOWN = ("mlp", "residual"), ("residual", "mlp")
_VALUES, _OUTPUT, _FUSED_OUTPUT = ("attention", "residual"), ("residual", "attention"), ("residual", None)

_PARALLEL_PHI: dict[str, Axes] = _LLAMA | {
    "model.layers.*.self_attn.dense": _OUTPUT,
    "model.layers.*.self_attn.q_layernorm": _KEPT,
    "model.layers.*.self_attn.k_layernorm": _KEPT,
    "model.layers.*.mlp.fc1": _UP,
    "model.layers.*.mlp.fc2": _DOWN,
    "model.final_layernorm": _NORM,
}
_FUSED_GATE: dict[str, Axes] = {
    "model.layers.*.mlp.gate_up_proj": _UP,
    "model.layers.*.post_self_attn_layernorm": _NORM,
    "model.layers.*.post_mlp_layernorm": _NORM,
}
_PHI3: dict[str, Axes] = (
    _LLAMA
    | _FUSED_GATE
    | {"model.layers.*.self_attn.qkv_proj": _READS, "model.layers.*.self_attn.o_proj": _FUSED_OUTPUT}
)
_STARCODER2: dict[str, Axes] = _LLAMA | {"model.layers.*.mlp.c_fc": _UP, "model.layers.*.mlp.c_proj": _DOWN}
_OPT: dict[str, Axes] = {
    "model.decoder.embed_tokens": _READS,
    "model.decoder.embed_positions": _READS,
    "model.decoder.layers.*.self_attn_layer_norm": _NORM,
    "model.decoder.layers.*.self_attn.q_proj": _READS,
    "model.decoder.layers.*.self_attn.k_proj": _READS,
    "model.decoder.layers.*.self_attn.v_proj": _VALUES,
    "model.decoder.layers.*.self_attn.out_proj": _OUTPUT,
    "model.decoder.layers.*.final_layer_norm": _NORM,
    "model.decoder.layers.*.fc1": _UP,
    "model.decoder.layers.*.fc2": _DOWN,
    "model.decoder.final_layer_norm": _NORM,
    "lm_head": _READS,
}
_GPT2: dict[str, Axes] = {
    "transformer.wte": _READS,
    "transformer.wpe": _READS,
    "transformer.h.*.ln_1": _NORM,
    "transformer.h.*.attn.c_attn": _READS,
    "transformer.h.*.attn.c_proj": _FUSED_OUTPUT,
    "transformer.h.*.ln_2": _NORM,
    "transformer.h.*.mlp.c_fc": _UP,
    "transformer.h.*.mlp.c_proj": _DOWN,
    "transformer.ln_f": _NORM,
    "lm_head": _READS,
}
_GPTJ: dict[str, Axes] = _GPT2 | {
    "transformer.h.*.attn.q_proj": _READS,
    "transformer.h.*.attn.k_proj": _READS,
    "transformer.h.*.attn.v_proj": _VALUES,
    "transformer.h.*.attn.out_proj": _OUTPUT,
    "transformer.h.*.mlp.fc_in": _UP,
    "transformer.h.*.mlp.fc_out": _DOWN,
}
_BLOOM: dict[str, Axes] = {
    "transformer.word_embeddings": _READS,
    "transformer.word_embeddings_layernorm": _NORM,
    "transformer.h.*.input_layernorm": _NORM,
    "transformer.h.*.ln_attn": _NORM,
    "transformer.h.*.ln_mlp": _NORM,
    "transformer.h.*.self_attention.query_key_value": _READS,
    "transformer.h.*.self_attention.dense": _FUSED_OUTPUT,
    "transformer.h.*.post_attention_layernorm": _NORM,
    "transformer.h.*.mlp.dense_h_to_4h": _UP,
    "transformer.h.*.mlp.dense_4h_to_h": _DOWN,
    "transformer.ln_f": _NORM,
    "lm_head": _READS,
}
_GPT_NEOX: dict[str, Axes] = {
    "gpt_neox.embed_in": _READS,
    "gpt_neox.layers.*.input_layernorm": _NORM,
    "gpt_neox.layers.*.attention.query_key_value": _READS,
    "gpt_neox.layers.*.attention.dense": _FUSED_OUTPUT,
    "gpt_neox.layers.*.post_attention_layernorm": _NORM,
    "gpt_neox.layers.*.mlp.dense_h_to_4h": _UP,
    "gpt_neox.layers.*.mlp.dense_4h_to_h": _DOWN,
    "gpt_neox.final_layer_norm": _NORM,
    "embed_out": _READS,
    "lm_head": _READS,
}


def _experts(mlp: str, router: str) -> dict[str, Axes]:
    """The axes of a mixture of experts and of what its tokens have in common."""
    parts = {"gate_proj": _UP, "up_proj": _UP, "down_proj": _DOWN}
    both = {
        f"{mlp}.{experts}.{part}": axes for experts in ("experts.*", "shared_expert") for part, axes in parts.items()
    }
    return _LLAMA | both | {f"{mlp}.{router}": _READS, f"{mlp}.shared_expert_gate": _READS}


_MOE = _experts("model.layers.*.mlp", "gate")

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
    "bloom": Family(_BLOOM),
    "cohere": Family(_LLAMA | _HEAD_NORMS),
    "cohere2": Family(_LLAMA),
    "falcon": Family(_BLOOM),
    "glm": Family(_LLAMA | _FUSED_GATE),
    "glm4": Family(_LLAMA | _FUSED_GATE, normalises_outputs=True),
    "granitemoe": Family(_experts("model.layers.*.block_sparse_moe", "router")),
    "mixtral": Family(_MOE),
    "olmo": Family(_LLAMA),
    "olmoe": Family(_MOE | _QUERY_KEY_NORMS),
    "phi": Family(_PARALLEL_PHI),
    "phi3": Family(_PHI3),
    "qwen2_moe": Family(_MOE),
    "qwen3_moe": Family(_MOE | _QUERY_KEY_NORMS),
    "stablelm": Family(_LLAMA),
    "starcoder2": Family(_STARCODER2),
    "nemotron": Family(_LLAMA, ffn=(("up_proj",), "down_proj")),
    "opt": Family(_OPT, ffn=(("fc1",), "fc2"), per_block=PerBlock("OPTConfig", "OPTForCausalLM", ("opt", "opt"))),
    "gpt2": Family(
        _GPT2, ffn=(("c_fc",), "c_proj"), per_block=PerBlock("GPT2Config", "GPT2LMHeadModel", ("gpt2", "gpt2"))
    ),
    "gptj": Family(_GPTJ, ffn=(("fc_in",), "fc_out")),
    "gpt_neox": Family(_GPT_NEOX, ffn=(("dense_h_to_4h",), "dense_4h_to_h")),
}

PER_BLOCK: Mapping[str, PerBlock] = {
    name: family.per_block for name, family in FAMILIES.items() if family.per_block is not None
}
"""The families that exist with an FFN width per block."""
