"""Experts that vLLM serves from packed weights, against vLLM with the same weights stored dense."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.kernels import cpu
from vllm_runs import (
    assert_same,
    deepseek_moe,
    generate,
    granite_hybrid,
    granite_moe,
    in_process,
    mixtral,
    qwen2_moe,
    twins,
)

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

__all__ = ["in_process"]  # the fixture


def packed_experts(model: torch.nn.Module) -> dict[str, list[tuple[int, str]]]:
    """Of each module of experts, how many experts its packed weights have, and in what format."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    return {
        name: [(weight.count, weight.format.name) for weight in getattr(module, "packed", ())]
        for name, module in model.named_modules()
        if isinstance(module, RoutedExperts)
    }


@pytest.mark.parametrize(
    ("make", "layers"), [(mixtral, 2), (qwen2_moe, 2), (deepseek_moe, 1), (granite_moe, 2), (granite_hybrid, 2)]
)
def test_same_tokens_as_dense_experts(
    make: Callable[[], PretrainedConfig],
    layers: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # its latent attention takes no fp32
    sparse, dense = twins(tmp_path, make())
    ours, experts = generate(sparse, inspect=packed_experts)
    assert list(experts.values()) == layers * [[(4, "fp32"), (4, "fp32")]]
    assert "experts: served dense" not in caplog.text and "experts (" not in caplog.text
    assert_same(ours, generate(dense))


def test_quantized_experts_give_the_tokens_of_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_random_model(mixtral(), tmp_path, sparse=True, dtype=torch.float32, quantization="int8")
    ours, experts = generate(folder, inspect=packed_experts)
    assert list(experts.values()) == 2 * [[(4, "int8"), (4, "int8")]]
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert_same(ours, generate(folder))


def test_half_precision_is_close_to_dense_fp32(tmp_path: Path) -> None:
    sparse, dense = twins(tmp_path, mixtral())
    for (_, ours), (_, theirs) in zip(generate(sparse, dtype="bfloat16"), generate(dense), strict=True):
        shared = ours[0].keys() & theirs[0].keys()
        assert shared
        assert all(abs(ours[0][token] - theirs[0][token]) < 0.2 for token in shared)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = mixtral()
    config.num_hidden_layers = 1
    return write_random_model(config, tmp_path_factory.mktemp("stored"), sparse=True, dtype=torch.float32)


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def test_compiled_same_tokens_as_eager(stored: Path) -> None:
    assert_same(generate(stored, enforce_eager=False), generate(stored))


EXPERTS = "model.layers.0.block_sparse_moe.experts"
PARTS = ("compressed", "bitmask", "shape")


def without(*layers: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: [tensors.pop(f"{layer}.{part}") for layer in layers for part in PARTS]


def uneven(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{EXPERTS}.1.w2.bitmask"][5, 2] = 0xF0


def other_shape(tensors: dict[str, torch.Tensor]) -> None:
    at = f"{EXPERTS}.2.w3"
    tensors[f"{at}.compressed"] = tensors[f"{at}.compressed"][:208].contiguous()
    tensors[f"{at}.bitmask"] = tensors[f"{at}.bitmask"][:208].contiguous()
    tensors[f"{at}.shape"][0] = 208


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without(f"{EXPERTS}.2.w3", f"{EXPERTS}.3.w2"),
            rf"does not hold {EXPERTS}\.2\.w3\.compressed, {EXPERTS}\.2\.w3\.bitmask, {EXPERTS}\.2\.w3\.shape, "
            rf"{EXPERTS}\.3\.w2\.compressed",
        ),
        (without(*(f"{EXPERTS}.{e}.w1" for e in range(4))), rf"does not hold {EXPERTS}\.0\.w1\.compressed"),
        (other_shape, rf"{EXPERTS}\.2\.w3\.\w+ holds \[208, "),
        (uneven, rf"damaged checkpoint: {EXPERTS}\.1\.w2: bitmask keeps 0 of columns 16 to 19 of row 5"),
    ],
    ids=["two missing", "one kind missing", "another shape", "a bad mask"],
)
def test_damaged_experts_are_named(change: Any, message: str, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        generate(changed(stored, tmp_path, change))


def test_missing_experts_are_named_as_the_file_has_them(tmp_path: Path) -> None:
    at = "model.layers.0.block_sparse_moe.output_linear"
    folder = write_random_model(granite_moe(), tmp_path / "whole", sparse=True)
    (tmp_path / "damaged").mkdir()
    damaged = changed(folder, tmp_path / "damaged", without(at))
    with pytest.raises(ValueError, match=f"does not hold {at}.compressed, {at}.bitmask, {at}.shape; download"):
        generate(damaged)


@pytest.mark.parametrize(
    ("make", "one"), [(mixtral, r"layers\.1\..*experts\.2\.w1"), (granite_moe, r"layers\.1\..*output_linear")]
)
def test_experts_of_which_some_are_dense_are_served_dense(
    make: Callable[[], PretrainedConfig], one: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sparse, dense = twins(tmp_path, make(), dense_layers=[one])
    ours, experts = generate(sparse, inspect=packed_experts)
    assert [len(found) for found in experts.values()] == [2, 0]
    assert "model.layers.1.block_sparse_moe.experts: served dense" in caplog.text
    assert "only some of its experts are sparse" in caplog.text
    assert_same(ours, generate(dense))


def test_plain_experts_of_a_checkpoint_that_says_dense_are_packed(tmp_path: Path) -> None:
    sparse, dense = twins(tmp_path, mixtral())
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["format"] = "dense"
    (dense / "config.json").write_text(json.dumps(config))
    ours, experts = generate(dense, inspect=packed_experts)
    assert all(found == [(4, "fp32"), (4, "fp32")] for found in experts.values())
    assert ours == generate(sparse)
