"""The runs of quantization.py and their table."""

import argparse

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import quantization
from crepe_llm.training.distillation import DistillationSettings
from tiny_models import configs

MODEL = "SmolLM2-135M-Instruct"


def options(**fields):
    values = {"models": [MODEL], "starts": ["dense", "CRePE", quantization.BEST], "tokens": [1000], "seeds": [0, 1]}
    values |= {"quantizations": list(quantization.QUANTIZATIONS), "windows": 16, "length": 512, "measured": 64}
    return argparse.Namespace(**values | {"dtype": "bfloat16"} | fields)


def test_every_start_meets_every_quantization_and_the_best_alone_is_trained():
    runs = quantization.runs_of(options())
    # The dense model once; CRePE, the best stack, and the best stack after training: each with both seeds.
    assert len(runs) == len(quantization.QUANTIZATIONS) * (1 + 3 * 2)
    assert {run["start"] for run in runs if run["tokens"]} == {quantization.BEST}
    assert not [run for run in quantization.runs_of(options(tokens=[0])) if run["method"]]
    package = DistillationSettings()
    for run in runs:
        if run["tokens"]:
            assert all(run[name] == getattr(package, name) for name in ("relative_rate", "batch", "warmup"))


def test_a_dense_model_is_quantized_by_upstreams_gptq_and_a_sparse_one_under_its_mask():
    for dense, modifier in ((True, "GPTQModifier"), (False, "MaskedGPTQModifier")):
        recipe = yaml.safe_load(quantization.quantization_of("crepe_2of4_w4a16_gptq", dense))
        assert list(recipe["quantization_stage"]["quantization_modifiers"]) == [modifier]


def test_the_table_compares_each_seed_with_itself():
    asked = options(starts=["CRePE"], quantizations=["none", "INT8 (W8A8)"])
    rows = []
    for run in quantization.runs_of(asked):
        level = (100.0 if run["seed"] else 50.0) * (1.1 if run["quantized_by"] else 1.0)
        rows.append(run | {"perplexity": dict.fromkeys(quantization.CORPORA, level), "bytes": 1_500_000})
    table = quantization.table(rows, asked)
    assert f"| {MODEL} | CRePE | none | 75.00 ± 25.00 | 75.00 ± 25.00 | 75.00 ± 25.00 | +0.0% | 1.5 |" in table
    assert f"| {MODEL} | CRePE | INT8 (W8A8) | 82.50 ± 27.50 |" in table and "| +10.0% |" in table


def test_a_lost_mask_is_found(tmp_path):
    model = AutoModelForCausalLM.from_config(configs()["qwen2"]())
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear) and layer is not model.lm_head:
                layer.weight.view(-1, 4)[:, 2:] = 0
    model.save_pretrained(tmp_path / "source")
    quantization.check_masks(tmp_path / "source", tmp_path / "source")
    with torch.no_grad():
        # Still 2:4, by another mask.
        layer = model.model.layers[0].mlp.down_proj
        layer.weight.copy_(layer.weight.view(-1, 4).flip(1).reshape_as(layer.weight))
    model.save_pretrained(tmp_path / "target")
    with pytest.raises(RuntimeError, match=r"down_proj left the mask of"):
        quantization.check_masks(tmp_path / "source", tmp_path / "target")
