"""The runs of quantization.py and their table."""

import argparse

import pytest
import torch
import yaml
from llmcompressor import oneshot
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import quality_per_byte
import quantization
from crepe_llm.checkpoints import attach
from crepe_llm.kernels.reference import quantize_per_chunk, quantize_per_lane
from crepe_llm.training.distillation import DistillationSettings
from tiny_models import configs

MODEL = "SmolLM2-135M-Instruct"


def options(**fields):
    values = {"models": [MODEL], "starts": ["dense", "CRePE", quantization.BEST], "tokens": [1000], "seeds": [0, 1]}
    values |= {"quantizations": list(quantization.QUANTIZATIONS), "windows": 16, "length": 512, "measured": 64}
    return argparse.Namespace(**values | {"dtype": "bfloat16"} | fields)


def test_every_start_meets_every_quantization_and_the_best_alone_is_trained():
    runs = quantization.runs_of(options())
    # The dense model once, but for what is of sparse ones; CRePE, the best stack, and that after training with both
    # seeds.
    assert len(runs) == len(quantization.QUANTIZATIONS) * (1 + 3 * 2) - len(quantization.OF_SPARSE) == 10 * 7 - 4 - 7
    for label in quantization.OF_SPARSE:
        assert {run["start"] for run in runs if run["quantization"] == label} == {"CRePE", quantization.BEST}
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


def sparse_model():
    model = AutoModelForCausalLM.from_config(configs(64, 128)["qwen2"]())
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear) and layer is not model.lm_head:
                layer.weight.view(-1, 4)[:, 2:] = 0
    return model


def test_masks_are_compared_in_the_numbers_that_codes_stand_for(tmp_path):
    sparse_model().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    oneshot(model=model, recipe=quantization.quantization_of("crepe_2of4_w4a16", dense=False))
    attach(model)
    model.save_pretrained(tmp_path / "int4")
    quantization.check_masks(tmp_path / "plain", tmp_path / "int4")
    weights = {name: layer.weight for name, layer in quantization.linear_layers(tmp_path / "int4").items()}
    assert all(not weight.view(-1, 4)[:, 2:].any() and weight.any() for weight in weights.values())


@pytest.mark.parametrize(("recipe", "rounded"), [("crepe_2of4_w4a16", "layers"), ("crepe_2of4_int8_head", "head")])
def test_as_served_rounds_what_the_plugin_rounds(recipe, rounded, tmp_path):
    sparse_model().save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    oneshot(model=model, recipe=quantization.quantization_of(recipe, dense=False))
    quantization.quantize_inputs(model)
    head = model.get_output_embeddings()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    model(torch.arange(24)[None])

    def rounded_again(x, by):
        values, scales = by(x)
        return values * (scales if by is quantize_per_lane else scales.repeat_interleave(32, 1)[:, : x.shape[1]])

    for name, x in seen.items():
        is_head, x = model.get_submodule(name) is head, x.flatten(0, -2)
        again = rounded_again(x, quantize_per_lane if is_head else quantize_per_chunk)
        assert torch.allclose(again, x, rtol=1e-5, atol=1e-6) == (is_head == (rounded == "head")), name


def test_a_lost_mask_is_found(tmp_path):
    model = sparse_model()
    model.save_pretrained(tmp_path / "source")
    quantization.check_masks(tmp_path / "source", tmp_path / "source")
    with torch.no_grad():
        # Still 2:4, by another mask.
        layer = model.model.layers[0].mlp.down_proj
        layer.weight.copy_(layer.weight.view(-1, 4).flip(1).reshape_as(layer.weight))
    model.save_pretrained(tmp_path / "target")
    with pytest.raises(RuntimeError, match=r"down_proj left the mask of"):
        quantization.check_masks(tmp_path / "source", tmp_path / "target")


def test_bytes_a_token_are_of_linear_layers_and_the_head_in_their_order(tmp_path):
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 8),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(8, 8),
        "model.layers.0.input_layernorm.weight": torch.zeros(8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    rows = [
        {
            "model": MODEL,
            "start": start,
            "tokens": 0,
            "quantization": name,
            "perplexity": {"test": p, "valid": p, "news": p},
        }
        for start, name, p in (
            ("dense", "none", 10.0),
            ("CRePE", "INT4 (W4A16), GPTQ", 40.0),
            ("CRePE", "INT4 (W4A16), GPTQ", 20.0),
        )
    ]
    tied = quality_per_byte.token_bytes(tmp_path, 3.25, 16)
    assert tied == 64 * 3.25 / 8 + 80 * 2
    *_, first, second = quality_per_byte.table(rows, {MODEL: tmp_path}, int8_head=True).splitlines()
    assert first.startswith(f"| {MODEL} | CRePE | INT4 (W4A16), GPTQ | 3.25 | 0.0 | 30.00 ± 10.00 |")
    assert second.startswith(f"| {MODEL} | dense | none | 16 | 0.0 | 10.00 |")
    save_file(tensors | {"lm_head.weight": torch.zeros(10, 4)}, tmp_path / "model.safetensors")
    assert quality_per_byte.token_bytes(tmp_path, 16, 8) == 64 * 2 + 40
