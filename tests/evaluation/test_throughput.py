"""Measuring engines: the figures are those of a real engine, and compressed weights show in them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from crepe_llm.checkpoints.reading import SINGLE
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.evaluation.throughput import Case, Engine, median, run, weight_bytes


@pytest.mark.vllm
def test_sparse_engine_holds_less_memory_than_dense(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    # 134 M weights in linear layers, next to none elsewhere: 268 MB in bf16, 151 MB compressed.
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=16,
        architectures=["LlamaForCausalLM"],
    )
    found = {}
    for name in ("dense", "sparse"):
        folder = write_random_model(config, tmp_path / name, sparse=name == "sparse")
        found[name] = run(Engine(name, str(folder), "bfloat16"), [Case(8, 1), Case(5, 2)], tokens=4, repeats=1)
    for result in found.values():
        assert [(case["prompt"], case["streams"]) for case in result["cases"]] == [(8, 1), (5, 2)]
        assert all(case["first_token_s"] > 0 and case["tokens_per_s"] > 0 for case in result["cases"])
    assert found["sparse"]["weight_bytes"] == pytest.approx(0.5625 * found["dense"]["weight_bytes"], rel=0.01)
    assert 0 < found["sparse"]["packing_s"] < found["sparse"]["model_s"] < found["sparse"]["load_s"]
    saved = found["dense"]["anonymous_bytes"] - found["sparse"]["anonymous_bytes"]
    # What the process holds shrinks by what the weights shrink, give or take the allocator.
    assert saved > 0.7 * (found["dense"]["weight_bytes"] - found["sparse"]["weight_bytes"])


@pytest.mark.vllm
def test_failing_engine_is_named_with_its_output(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    with pytest.raises(RuntimeError, match=r"(?s)no model: .*config"):
        run(Engine("no model", str(tmp_path), "bfloat16"), [Case(1, 1)])


def test_weight_bytes_follow_the_served_dtype(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    linear, rest = 4 * 16 * 16 + 3 * 16 * 32, 2 * 8 * 16 + 3 * 16
    dense = str(write_random_model(config, tmp_path / "dense", sparse=False, dtype=torch.float32))
    sparse = str(write_random_model(config, tmp_path / "sparse", sparse=True, dtype=torch.bfloat16))
    assert weight_bytes(dense, "bfloat16") == 2 * (linear + rest)
    assert weight_bytes(dense, "float32") == 4 * (linear + rest)
    assert weight_bytes(sparse, "float16") == linear + linear // 8 + 2 * rest + 7 * 16


def test_bytes_of_tensors_that_are_no_floats_of_16_or_32_bits(tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)  # as old checkpoints of GPTs have
    save_file({"a": torch.zeros(10, dtype=torch.float64), "b": mask, "c": torch.zeros(3).long()}, tmp_path / SINGLE)
    assert weight_bytes(str(tmp_path), "bfloat16") == 2 * 10 + 16 + 3 * 8
    assert weight_bytes(str(tmp_path), "float32") == 4 * 10 + 16 + 3 * 8


@pytest.mark.vllm
def test_a_model_in_no_folder_of_safetensors_is_served(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder = write_random_model(config, tmp_path / "bin", sparse=False)
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    found = run(Engine("bin", str(folder), "bfloat16"), [Case(4, 1)], tokens=2, repeats=1)
    assert found["weight_bytes"] is None and median([found, found])["cases"] == found["cases"]


def test_median_is_taken_of_each_figure() -> None:
    def result(value: float) -> dict[str, object]:
        case = {"prompt": 1, "streams": 2, "first_token_s": value, "tokens_per_s": -value}
        return {"load_s": value, "anonymous_bytes": 2 * value, "weight_bytes": 5, "cases": [case]}

    assert median([result(1.0), result(9.0), result(3.0)]) == result(3.0)
