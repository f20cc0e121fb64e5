"""Small models in vLLM's hands: how tests write them, run them greedily and compare two runs."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BloomConfig,
    DeepseekV2Config,
    Gemma3TextConfig,
    Glm4Config,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    StableLmConfig,
)

from crepe_llm.evaluation.random_models import write_random_model

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 212,  # half a byte of bitmask at the end of each row
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
PROMPTS = [[3], [17, 4, 99, 250], list(range(40, 110)), [500, 1, 500, 1, 500], list(range(7, 490, 21)), [8] * 33]
TOKENS = 24
# A greedy choice between two tokens whose fp32 log-probabilities differ by less than this is a tie: summing in
# another order may decide it either way.
TIE = 1e-3

Generation = list[tuple[list[int], list[dict[int, float]]]]


def llama(**changes: Any) -> PretrainedConfig:
    return LlamaConfig(**{**SIZES, "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, **changes})


def qwen2() -> PretrainedConfig:
    return Qwen2Config(**SIZES, architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False)


def gemma3() -> PretrainedConfig:
    sizes = {**SIZES, "num_key_value_heads": 1, "num_hidden_layers": 3}
    return Gemma3TextConfig(
        **sizes,
        architectures=["Gemma3ForCausalLM"],
        tie_word_embeddings=True,
        sliding_window=16,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def mixtral() -> PretrainedConfig:
    return MixtralConfig(
        **SIZES,
        architectures=["MixtralForCausalLM"],
        tie_word_embeddings=False,
        num_local_experts=4,
        sliding_window=None,
    )


def qwen2_moe() -> PretrainedConfig:
    return Qwen2MoeConfig(
        **SIZES,
        architectures=["Qwen2MoeForCausalLM"],
        tie_word_embeddings=False,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        decoder_sparse_step=1,
    )


def deepseek_moe() -> PretrainedConfig:
    """Latent attention, and from the second layer on experts beside one that all tokens share."""
    routed = {"first_k_dense_replace": 1, "moe_intermediate_size": 68, "num_experts_per_tok": 2, "n_shared_experts": 1}
    return deepseek(**routed, n_group=1, topk_group=1)


def granite_moe() -> PretrainedConfig:
    return GraniteMoeConfig(
        **{**SIZES, "intermediate_size": 64},
        architectures=["GraniteMoeForCausalLM"],
        tie_word_embeddings=True,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def granite_hybrid() -> PretrainedConfig:
    """vLLM's loader of the hybrid looks for merged experts by the names that it knows."""
    return GraniteMoeHybridConfig(
        **{**SIZES, "intermediate_size": 64},
        architectures=["GraniteMoeHybridForCausalLM"],
        tie_word_embeddings=True,
        layer_types=["attention", "attention"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    )


def stablelm() -> PretrainedConfig:
    """vLLM knows only from the mapper of weight names that it fuses q, k and v, gate and up."""
    return StableLmConfig(**SIZES, architectures=["StableLmForCausalLM"], tie_word_embeddings=False, use_qkv_bias=True)


def bloom() -> PretrainedConfig:
    """vLLM's loader rearranges the rows of q, k and v, which are one tensor in the checkpoint."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    return BloomConfig(**sizes, architectures=["BloomForCausalLM"], tie_word_embeddings=True)


def glm4() -> PretrainedConfig:
    """gate and up are one tensor in the checkpoint; vLLM's table names them apart."""
    return Glm4Config(**SIZES, architectures=["Glm4ForCausalLM"], tie_word_embeddings=False, pad_token_id=0)


def deepseek(**changes: Any) -> PretrainedConfig:
    """Multi-head latent attention."""
    sizes = {**SIZES, "num_key_value_heads": 4, "head_dim": 64}
    return DeepseekV2Config(
        **{
            **sizes,
            "architectures": ["DeepseekV2ForCausalLM"],
            "tie_word_embeddings": False,
            "kv_lora_rank": 512,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "v_head_dim": 32,
            "n_routed_experts": 4,
            "first_k_dense_replace": 2,  # no experts
            **changes,
        }
    )


@contextmanager
def one_collection() -> Iterator[None]:
    """Leave out the full garbage collections with which vLLM starts and ends an engine, all but one at the end.

    Each goes through everything that the tests' process has imported, and seven of them take longer than the rest.
    """
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("collect", "freeze", "unfreeze"):
            patch.setattr(gc, name, lambda *_: 0)
        yield
    gc.collect()


@one_collection()
def generate(
    folder: Path,
    dtype: str = "float32",
    inspect: Callable[[Any], Any] | None = None,
    lora: Path | None = None,
    **options: Any,
) -> Any:
    """Greedy tokens of every prompt with the log-probabilities of the two best; and what ``inspect`` says of it."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    options = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_batched_tokens": 64, **options}
    try:
        engine = LLM(str(folder), dtype=dtype, max_model_len=160, skip_tokenizer_init=True, **options)
    except BaseException:
        cleanup_dist_env_and_memory()  # what was begun of a dense model has no group for the experts of the next one
        raise
    try:
        seen = engine.apply_model(inspect)[0] if inspect else None
        wanted = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=2)
        adapter = None if lora is None else LoRARequest("adapter", 1, str(lora))
        prompts = [{"prompt_token_ids": p} for p in PROMPTS]
        outputs = engine.generate(prompts, wanted, use_tqdm=False, lora_request=adapter)
        made = [
            (
                list(o.outputs[0].token_ids),
                [{token: entry.logprob for token, entry in step.items()} for step in o.outputs[0].logprobs],
            )
            for o in outputs
        ]
        return (made, seen) if inspect else made
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        cleanup_dist_env_and_memory()


def assert_same(sparse: Generation, dense: Generation, tie: float = TIE) -> None:
    """Tokens agree up to the first tie of each prompt; ties decide at most one prompt in three."""
    ties = 0
    for prompt, (ours, theirs) in enumerate(zip(sparse, dense, strict=True)):
        if ours[0] == theirs[0]:
            continue
        step = next(i for i, (a, b) in enumerate(zip(ours[0], theirs[0], strict=True)) if a != b)
        best = sorted(theirs[1][step].values(), reverse=True)
        assert best[0] - best[1] < tie, f"prompt {prompt}, step {step}: {ours[0][step]} instead of {theirs[0][step]}"
        ties += 1
    assert ties <= len(dense) // 3, f"{ties} of {len(dense)} prompts ended in a tie"


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # apply_model of a local function


def twins(tmp_path: Path, config: PretrainedConfig, **options: Any) -> tuple[Path, Path]:
    options = {"dtype": torch.float32, **options}
    return (
        write_random_model(config, tmp_path / "sparse", sparse=True, **options),
        write_random_model(config, tmp_path / "dense", sparse=False, **options),
    )


def write_adapter(folder: Path, embeddings: bool = False) -> Path:
    """A LoRA adapter that turns every output of attention and FFN, and on demand the embedding's and the head's."""
    sizes = {"q_proj": (128, 128), "v_proj": (64, 128), "o_proj": (128, 128), "down_proj": (128, 212)}
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for block in range(2):
        for name, (rows, columns) in sizes.items():
            at = f"base_model.model.model.layers.{block}.{'mlp' if name == 'down_proj' else 'self_attn'}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, columns, generator=generator) / 8
            tensors[f"{at}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) / 8
    if embeddings:
        for at, (rows, columns) in {
            "lm_head.lora_{}.weight": (512, 128),
            "model.embed_tokens.lora_embedding_{}": (128, 512),
        }.items():
            tensors[f"base_model.model.{at.format('A')}"] = torch.randn(8, columns, generator=generator) / 8
            tensors[f"base_model.model.{at.format('B')}"] = torch.randn(rows, 8, generator=generator) / 8
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = [*sizes, *(["lm_head", "embed_tokens"] if embeddings else [])]
    described = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder
