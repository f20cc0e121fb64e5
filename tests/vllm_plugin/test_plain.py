"""Published checkpoints with plain 2:4 weights (`sparsity_config.format: dense`): served from packed ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crepe_llm.checkpoints import FormatError
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.vllm_plugin import QUANTIZATION, register
from vllm_runs import assert_same, generate, in_process, llama, qwen2

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

__all__ = ["in_process"]  # the fixture

RECORD = {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": [], "global_sparsity": 0.4}


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register()


def with_record(folder: Path, **quantization: Any) -> Path:
    content = json.loads((folder / "config.json").read_text())
    kept = content.get("quantization_config") or {"quant_method": "compressed-tensors", "version": "0.6.0"}
    content["quantization_config"] = kept | {"sparsity_config": RECORD} | quantization
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def packed_layers(model: torch.nn.Module) -> list[str]:
    return sorted(name for name, module in model.named_modules() if hasattr(module, "packed"))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_2of4_weights_are_packed_and_served(quantization: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # as in test_models.py
    options: Any = {"dtype": torch.float32, "quantization": quantization}
    if quantization is None:  # vLLM fuses layers of one quantization only
        options["dense_layers"] = [r"layers\.0\.mlp\.up_proj"]
    plain = write_random_model(qwen2(), tmp_path / "plain", sparse=False, **options)
    packed = write_random_model(qwen2(), tmp_path / "packed", sparse=True, **options)
    if quantization is None:
        with_record(plain, config_groups={}, kv_cache_scheme=None)
    else:
        with_record(plain)
    served, layers = generate(plain, inspect=packed_layers)
    wanted, expected = generate(packed, inspect=packed_layers)
    inside = [name for name in layers if "layers." in name]
    assert inside == [name for name in expected if "layers." in name]
    assert len(inside) == (7 if quantization is None else 8)
    assert ("model.layers.0.mlp.gate_up_proj" in inside) == (quantization is not None)  # else one of its parts is dense
    assert_same(served, wanted)


def test_weights_that_are_not_2of4_are_served_dense(tmp_path: Path) -> None:
    dense = write_random_model(llama(), tmp_path / "dense", sparse=False, dtype=torch.float32, dense_layers=["layers"])
    twin = write_random_model(llama(), tmp_path / "twin", sparse=False, dtype=torch.float32, dense_layers=["layers"])
    served, layers = generate(with_record(dense), inspect=packed_layers)
    assert not [name for name in layers if "layers." in name]
    assert_same(served, generate(twin))


def test_the_plugin_claims_them_and_reads_their_weights(tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    from crepe_llm.vllm_plugin.config import Sparse24Config

    folder = with_record(write_random_model(llama(), tmp_path, sparse=False, dtype=torch.float32))
    assert ModelConfig(str(folder), skip_tokenizer_init=True).quantization == QUANTIZATION
    made = Sparse24Config.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    made.maybe_update_config(str(folder))
    assert len(made._checkpoint_name) == 14
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, :4] = 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    made.maybe_update_config(str(folder))
    assert len(made._checkpoint_name) == 13


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    """transformers reads the single file, vLLM the files that the index names."""
    from crepe_llm.vllm_plugin.config import Sparse24Config

    folder = write_random_model(llama(), tmp_path, sparse=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "other.safetensors"}}))
    made = Sparse24Config.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
    with pytest.raises(FormatError, match=r"both model\.safetensors and model\.safetensors\.index\.json"):
        made.maybe_update_config(str(folder))


def test_4_bit_weights_that_are_not_2of4_are_served_by_vllm(tmp_path: Path) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    config = llama(intermediate_size=256)
    source = write_random_model(
        config, tmp_path / "source", sparse=False, dtype=torch.bfloat16, dense_layers=["layers"]
    )
    model = AutoModelForCausalLM.from_pretrained(source)
    oneshot(model=model, recipe=[QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"])])
    for name in ("twin", "plain"):
        model.save_pretrained(tmp_path / name)
    served, layers = generate(with_record(tmp_path / "plain"), dtype="bfloat16", inspect=packed_layers)
    assert not [name for name in layers if "layers." in name]
    assert_same(served, generate(tmp_path / "twin", dtype="bfloat16"), tie=0.05)  # the heads are multiplied otherwise
