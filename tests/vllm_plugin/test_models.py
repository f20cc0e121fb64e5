"""vLLM with the plugin against vLLM with the same masked weights stored dense: greedy tokens must be the same."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from crepe_llm.evaluation.random_models import write_random_model
from vllm_runs import (
    assert_same,
    bloom,
    deepseek,
    gemma3,
    generate,
    glm4,
    in_process,
    llama,
    qwen2,
    qwen2_moe,
    stablelm,
    twins,
    write_adapter,
)

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")


__all__ = ["in_process"]  # the fixture


def linear_parameters(model: torch.nn.Module) -> dict[str, list[str]]:
    """What is left of each linear layer after loading: its parameters' names, and "PackedWeight" where it has one."""
    from vllm.model_executor.layers.linear import LinearBase

    return {
        name: sorted([n for n, _ in module.named_parameters(recurse=False)])
        + ["PackedWeight" for _ in [0] if hasattr(module, "packed")]
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
    }


@pytest.mark.parametrize("make", [llama, qwen2, gemma3, stablelm, glm4, bloom])
def test_same_tokens_as_dense(make: Callable[[], PretrainedConfig], tmp_path: Path) -> None:
    sparse, dense = twins(tmp_path, make())
    ours, layers = generate(sparse, inspect=linear_parameters)
    assert layers
    for name, left in layers.items():
        biased = make is bloom or (make in (qwen2, stablelm, glm4) and name.endswith("qkv_proj"))
        assert left == (["bias"] if biased else []) + ["PackedWeight"], name
    assert_same(ours, generate(dense))


def test_partly_sparse_fused_layer_is_served_dense(tmp_path: Path) -> None:
    sparse, dense = twins(tmp_path, llama(), dense_layers=[r"layers\.0\.self_attn\.k_proj", r"layers\.1\.mlp"])
    ours, layers = generate(sparse, inspect=linear_parameters)
    packed = {name for name, left in layers.items() if "PackedWeight" in left}
    assert packed == {
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.1.self_attn.o_proj",
    }
    assert_same(ours, generate(dense))


def test_a_gate_that_vllm_does_not_quantize_is_served_dense(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sparse, dense = twins(tmp_path, qwen2_moe())
    ours, layers = generate(sparse, inspect=linear_parameters)
    packed = {name.rsplit(".", 1)[1] for name, left in layers.items() if "PackedWeight" in left}
    assert packed == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert "model.layers.*.mlp.shared_expert_gate (2 layers): served dense" in caplog.text
    assert_same(ours, generate(dense))


def dequantize(folder: Path, kind: str) -> None:
    """Stores a kind of layer in fp32: on a CPU, vLLM alone cannot serve latent attention with an INT8 kv_b_proj."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    for name in [name for name in tensors if name.endswith(f"{kind}.weight")]:
        tensors[name] = tensors[name].float() * tensors.pop(f"{name}_scale")
        config["quantization_config"]["ignore"].append(name.removesuffix(".weight"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_latent_attention_has_its_dense_weight(
    quantization: Literal["int8"] | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    sparse, dense = twins(tmp_path, deepseek(), quantization=quantization)
    if quantization:
        dequantize(dense, "kv_b_proj")
    ours, layers = generate(sparse, inspect=linear_parameters)
    dense_layers = {name.rsplit(".", 1)[1] for name, left in layers.items() if "PackedWeight" not in left}
    assert dense_layers == {"kv_b_proj"}
    assert "kv_b_proj (2 layers): served dense" in caplog.text
    assert "multi-head latent attention" in caplog.text
    assert_same(ours, generate(dense))


def test_latent_attention_on_amx_says_what_serves_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    folder = write_random_model(deepseek(num_hidden_layers=1), tmp_path, sparse=True, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"0\.self_attn\.kv_b_proj: .* has no fp32; use --dtype bfloat16"):
        generate(folder)


def test_lora_over_sparse_layers_gives_the_tokens_of_lora_over_dense_ones(tmp_path: Path) -> None:
    sparse, dense = twins(tmp_path, llama())
    options = {"enable_lora": True, "max_lora_rank": 8}
    adapter = write_adapter(tmp_path / "adapter")
    ours = generate(sparse, lora=adapter, **options)
    assert_same(ours, generate(dense, lora=adapter, **options))
    without = generate(sparse, **options)
    assert [tokens for tokens, _ in without] != [tokens for tokens, _ in ours]
    assert_same(without, generate(dense))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_quantized_same_tokens_as_vllms_own_w8a8(
    quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM's own INT8 product for AMX takes no fp32 inputs; the one that it has for other processors does.
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    sparse, dense = twins(tmp_path, qwen2(), quantization=quantization)
    ours, layers = generate(sparse, inspect=linear_parameters)
    assert all("PackedWeight" in left for left in layers.values())
    assert_same(ours, generate(dense))


def test_half_precision_is_close_to_dense_fp32(tmp_path: Path) -> None:
    sparse, dense = twins(tmp_path, llama())
    exact = generate(dense)
    for dtype, tolerance in (("bfloat16", 0.2), ("float16", 0.02)):
        for (_, ours), (_, theirs) in zip(generate(sparse, dtype=dtype), exact, strict=True):
            shared = ours[0].keys() & theirs[0].keys()
            assert shared
            for token in shared:
                assert abs(ours[0][token] - theirs[0][token]) < tolerance, dtype


def test_compiled_same_tokens_as_eager(tmp_path: Path) -> None:
    sparse = write_random_model(llama(num_hidden_layers=1), tmp_path, sparse=True, dtype=torch.float32)
    assert_same(generate(sparse, enforce_eager=False), generate(sparse))


def test_two_tensor_parallel_ranks_same_tokens_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One key-value head, which both ranks hold, and 104 of 208 columns of down_proj for each.
    config = llama(num_key_value_heads=1, intermediate_size=208)
    sparse = write_random_model(config, tmp_path, sparse=True, dtype=torch.float32)
    one = generate(sparse)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1" if os.cpu_count() != 1 else "0|0")
    two, layers = generate(sparse, inspect=linear_parameters, tensor_parallel_size=2)
    assert all(left == ["PackedWeight"] for left in layers.values())
    assert_same(two, one)
