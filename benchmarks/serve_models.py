"""The models of benchmarks/serve.py: one set of 2:4 weights each, stored as every engine reads it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from crepe_llm.checkpoints import read_folder
from crepe_llm.checkpoints.converting import pack_folder
from crepe_llm.checkpoints.folders import new_folder
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.evaluation.throughput import held_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}
_LAYERS: dict[str, dict[str, Any]] = {
    "int8": {"weights": _INT8, "input_activations": _TOKENS},
    "int4": {"weights": _INT4},
}
_HEAD = {"targets": ["re:.*(lm_head|embed_tokens)$"], "weights": _INT8}
# Two codes of 4 bits and two places of 2 bits for four weights, where the file has four codes.
_INT4_PACKED = 3 / 4


@dataclass(frozen=True)
class Storage:
    """How a checkpoint stores a model's weights.

    Attributes:
        layers: the quantization of the linear layers: "int8" (W8A8), "int4" (W4A16, a scale for 64 columns), or None.
        sparse: whether the 2:4 layers are stored, or recorded, as such.
        int8_head: whether the embedding and the output head are INT8 weights.
    """

    layers: str | None
    sparse: bool
    int8_head: bool = False

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return "-".join(["sparse" if self.sparse else "dense", self.layers or "bf16", *["head"] * self.int8_head])


DENSE = Storage(None, sparse=False)


def half_billion() -> "PretrainedConfig":
    """Qwen2-0.5B's shape with an output head of its own: 358 M weights in linear layers, 136 M in the head."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )


def one_billion() -> "PretrainedConfig":
    """Llama-3.2-1B's shape: 973 M weights in linear layers, 263 M in the tied head."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )


def _random(config: Callable[[], "PretrainedConfig"]) -> Callable[[Path], None]:
    return lambda folder: write_random_model(config(), folder, sparse=False) and None


def _smollm2(folder: Path) -> None:
    """SmolLM2-135M pruned to 2:4 by magnitude, in bf16."""
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from transformers import AutoModelForCausalLM

    from crepe_llm import samples

    source = samples.smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reset_session()
    oneshot(model=model, recipe="magnitude_2of4")
    # The head is the embedding, and stored as that alone.
    tensors = {name: one.bfloat16() for name, one in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        if file.name != "model.safetensors.index.json":
            shutil.copyfile(file, folder / file.name)


MODELS: dict[str, Callable[[Path], None]] = {
    "0.5b": _random(half_billion),
    "1b": _random(one_billion),
    "smollm2": _smollm2,
}


def stored(model: str, storage: Storage, folder: Path) -> Path:
    """The folder of a model's checkpoint below ``folder``; made where it is missing."""
    found = folder / model / storage.folder
    if not (found / "config.json").is_file():
        with new_folder(found) as place:
            if storage == DENSE:
                MODELS[model](place)
            else:
                _convert(stored(model, DENSE, folder), place, storage)
    return found


def _convert(source: Path, folder: Path, storage: Storage) -> None:
    """Store a dense bf16 checkpoint otherwise, rounded to nearest by llm-compressor where it is quantized."""
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    groups = {"layers": {"targets": ["Linear"]} | _LAYERS[storage.layers]} if storage.layers else {}
    groups |= {"head": _HEAD} if storage.int8_head else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    if groups:
        reset_session()
        ignore = [] if storage.int8_head else ["lm_head"]
        oneshot(model=model, recipe=[QuantizationModifier(ignore=ignore, config_groups=groups)])
    model.save_pretrained(folder)
    if storage.sparse:
        pack_folder(folder, {})


def token_bytes(folder: Path, dtype: str, storage: Storage) -> int:
    """The bytes of weights that a vLLM engine reads for a decoded token: all but the rows of an untied embedding."""
    tensors = read_folder(folder).tensors
    untied = any(name.startswith("lm_head.") for name in tensors)
    read = {name: tensor for name, tensor in tensors.items() if not (untied and "embed_tokens" in name)}
    total = held_bytes(read.values(), dtype)
    if storage.sparse and storage.layers == "int4":
        codes = [tensor for name, tensor in read.items() if name.endswith("_proj.weight_packed")]
        total -= round(held_bytes(codes, dtype) * (1 - _INT4_PACKED))
    return total
