"""Mixtures of experts after oneshot: what is saved is what transformers reads, whatever oneshot makes of experts."""

import copy
import json
import re

import pytest
import torch
import transformers as t
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file

from crepe_llm.checkpoints import compress_folder, decompress_folder, read_folder
from crepe_llm.functional.bitmask import RECORDED, unpack_bits
from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.modifiers import (
    CRePEModifier,
    DSnoTModifier,
    MaskedGPTQModifier,
    PHOSearchModifier,
    SparseCheckpointModifier,
    SparsityAllocationModifier,
    WeightCorrectionModifier,
    routing,
)
from crepe_llm.modifiers.experts import check_experts
from crepe_llm.search.study import Study
from modifier_helpers import SMALL, crepe, linears, load, run, save

TWO = {"num_experts_per_tok": 2}
MODELS = {
    "mixtral": (t.MixtralConfig, {"num_local_experts": 4, "sliding_window": None}),
    "phimoe": (t.PhimoeConfig, {"num_local_experts": 4, "sliding_window": None}),
    "qwen2_moe": (
        t.Qwen2MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (t.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8}),
    "olmoe": (t.OlmoeConfig, {"num_experts": 4}),
    "granitemoe": (t.GraniteMoeConfig, {"num_local_experts": 4}),
    "llama4_text": (
        t.Llama4TextConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "head_dim": 8},
    ),
    "gpt_oss": (t.GptOssConfig, {"head_dim": 8, "num_local_experts": 4, "sliding_window": 8}),
}
# What holds an expert, or all of them: a packed layer, or a tensor.
STORED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.1.w1",
    "phimoe": "model.layers.0.block_sparse_moe.experts.1.w1",
    "qwen2_moe": "model.layers.0.mlp.experts.1.gate_proj",
    "qwen3_moe": "model.layers.0.mlp.experts.1.gate_proj",
    "olmoe": "model.layers.0.mlp.experts.1.gate_proj",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear",
    # transformers takes them apart where a checkpoint is compressed
    "llama4_text": "model.layers.0.feed_forward.experts.1.gate_proj",
    "gpt_oss": "model.layers.0.mlp.experts.gate_up_proj",
}


@pytest.fixture(scope="module")
def folder_of(tiny_model_folder, tmp_path_factory):
    folders = {}

    def make(family):
        if family not in folders:
            torch.manual_seed(0)
            kind, fields = MODELS[family]
            config = kind(**{**SMALL, "initializer_range": 0.1, **TWO, **fields})
            model = t.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():  # biases, too
                    parameter.add_(0.05 * torch.randn_like(parameter))
            folders[family] = save(model, tmp_path_factory.mktemp(family), tiny_model_folder("llama"))
        return folders[family]

    return make


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[5, 7, 50, 60, 33]])).logits


RECIPES = {
    "crepe": lambda: [crepe()],
    "two": lambda: [crepe(), DSnoTModifier()],
    "wanda": lambda: [WandaPruningModifier(sparsity=0.5, mask_structure="2:4"), SparseCheckpointModifier()],
}


CASES = [(family, "crepe") for family in MODELS] + [
    (family, recipe) for family in ("mixtral", "gpt_oss") for recipe in ("two", "wanda")
]


@pytest.mark.parametrize(("family", "recipe"), CASES)
def test_experts_are_read_back(family, recipe, folder_of, calibration_data, tmp_path, messages):
    model = run(load(folder_of(family)), RECIPES[recipe](), calibration_data, output_dir=str(tmp_path / "out"))
    wanted = logits(model)
    assert float((wanted - logits(load(folder_of(family)))).abs().max()) > 1e-3, "nothing was pruned"
    again, info = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-6)
    # Of each expert, two of four weights are gone, in whatever form it is stored.
    checkpoint = read_folder(tmp_path / "out")
    whole = family == "gpt_oss"
    if recipe == "crepe":
        assert any("layers of experts" in line and "saved dense" in line for line in messages) == whole
    stored = checkpoint.load(STORED[family]) if whole else checkpoint.load_weight(STORED[family])
    assert float((stored == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    before = read_folder(folder_of(family))
    routers = [
        name for name in before.tensors if name.endswith((".gate.weight", "router.weight", "router.layer.weight"))
    ]
    assert routers and all(torch.equal(checkpoint.load(name), before.load(name)) for name in routers)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "llama4_text", "gpt_oss"])
@pytest.mark.parametrize("recipe", ["crepe", "pcg", "relative"])
def test_what_counts_for_an_expert_are_its_own_tokens(family, recipe, folder_of, calibration_data, monkeypatch):
    """Where others count nothing, every token in every expert comes to the same as each in its own experts alone."""
    data = calibration_data.remove_columns("attention_mask")  # which experts do not see with their own tokens alone
    refitting = {"asymmetric_calibration": 0.0, "true_sequential": True}
    weighting = "relative" if recipe == "relative" else "uniform"
    recipes = [crepe(uncalibrated="dense")]
    if recipe != "crepe":
        recipes.append(WeightCorrectionModifier(method="pcg", token_weighting=weighting, **refitting))
    alone = run(load(folder_of(family)), copy.deepcopy(recipes), data, moe_calibrate_all_experts=False)
    by_default = run(load(folder_of(family)), copy.deepcopy(recipes), data)
    monkeypatch.setattr(routing, "UNROUTED", 0.0)
    own = run(load(folder_of(family)), copy.deepcopy(recipes), data)
    monkeypatch.setattr(routing, "UNROUTED", 1.0)
    every = run(load(folder_of(family)), copy.deepcopy(recipes), data)
    first, default, second, third = map(first_products, (alone, by_default, own, every))
    assert torch.equal(first == 0, second == 0)
    torch.testing.assert_close(second, first, rtol=0, atol=5e-3)  # sums in another order, which pcg makes more of
    if family != "llama4_text" or recipe != "crepe":  # there each token is another for each expert
        assert float((third - first).norm()) > 2 * float((default - first).norm())


@pytest.mark.parametrize("searches", ["atp", "pho"])
def test_trials_count_for_an_expert_what_the_recipe_counts(
    searches, folder_of, calibration_data, tmp_path, monkeypatch, messages
):
    found = []
    for unrouted in (routing.UNROUTED, 1.0):
        monkeypatch.setattr(routing, "UNROUTED", unrouted)
        if searches == "atp":
            allocation = SparsityAllocationModifier(method="atp", sparsity=0.5, spread="measured")
            recipe = [allocation, CRePEModifier(comparison_group="row")]
        else:
            record = tmp_path / f"{unrouted}.json"
            fields = {"candidates": 2, "tokens": 800, "rows": 16, "layers_per_kind": 1, "starts": []}
            recipe = [PHOSearchModifier(**fields, record=str(record)), crepe()]
        messages.clear()
        run(load(folder_of("mixtral")), recipe, calibration_data)
        if searches == "atp":
            found.append([line.split("|")[-1] for line in messages if "a spread of" in line])
        else:
            found.append(Study.load(record).stages[-1].trials[0].losses)
    assert found[0] != found[1]


def first_products(model):
    """The weights of the experts of the first layer that are given what the router is given."""
    found = [
        tensor.detach().flatten()
        for name, tensor in model.named_parameters()
        if ".layers.0." in name and ".experts." in name and re.search(r"(gate|up)_proj(\.weight)?$", name)
    ]
    return torch.cat(found)


def test_an_expert_without_tokens_is_calibrated_on_those_of_others(folder_of, calibration_data):
    model = load(folder_of("mixtral"))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[2:] = 0
            layer.mlp.gate.weight[:2] = 10 * torch.tensor([[1.0], [-1.0]])
    pruned = run(model, [crepe()], calibration_data)
    weights = [module.weight for name, module in linears(pruned).items() if ".experts." in name]
    assert weights and all(bool(((weight.view(-1, 4) != 0).sum(1) == 2).all()) for weight in weights)


def test_experts_are_corrected_by_the_gram_matrices_of_their_own_tokens(folder_of, calibration_data):
    folder, data = folder_of("mixtral"), calibration_data.remove_columns("attention_mask")
    model, routed = load(folder), {}
    model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, args: routed.update(hidden=args[0].flatten(0, -2), chosen=args[1].flatten(0, -2))
    )
    with torch.no_grad():
        model(input_ids=torch.tensor(data["input_ids"]))
    pruned = run(load(folder), [crepe()], data, moe_calibrate_all_experts=False)
    recipe = [crepe(), WeightCorrectionModifier(method="pcg", true_sequential=False)]
    corrected = run(load(folder), recipe, data, moe_calibrate_all_experts=False)
    for expert in range(4):
        inputs = routed["hidden"][(routed["chosen"] == expert).any(-1)]
        assert 0 < len(inputs) < len(routed["hidden"])
        gate = f"model.layers.0.mlp.experts.{expert}.gate_proj"
        keep = pruned.get_submodule(gate).weight != 0
        dense = model.model.layers[0].mlp.experts.gate_up_proj[expert].detach().chunk(2)[0]
        expected = conjugate_gradients(dense, keep, inputs.T @ inputs)
        torch.testing.assert_close(corrected.get_submodule(gate).weight.detach(), expected, rtol=1e-2, atol=5e-3)
        all_tokens = conjugate_gradients(dense, keep, routed["hidden"].T @ routed["hidden"])
        assert float((expected - all_tokens).abs().max()) > 0.02


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
@pytest.mark.parametrize("recipe", ["crepe", "pcg", "gptq"])
def test_what_stands_in_padding_does_not_change_experts(family, recipe, folder_of, calibration_data):
    """Llama 4's are given the batch's tokens once for each expert, and so its padding."""

    def repad(row):
        return {"input_ids": [i if m else 7 for i, m in zip(row["input_ids"], row["attention_mask"], strict=True)]}

    recipes = [crepe()]
    if recipe == "pcg":
        recipes.append(WeightCorrectionModifier(method="pcg", asymmetric_calibration=0.0, true_sequential=True))
    if recipe == "gptq":
        recipes.append(MaskedGPTQModifier(ignore=["lm_head", "re:.*router"], scheme="W8A8"))
    first = run(load(folder_of(family)), copy.deepcopy(recipes), calibration_data)
    second = run(load(folder_of(family)), copy.deepcopy(recipes), calibration_data.map(repad))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_kept_weights_of_experts_that_are_zero_stay_kept(family, folder_of, calibration_data, tmp_path):
    model = run(load(folder_of(family)), [crepe()], calibration_data)
    expert = model.get_submodule("model.layers.0.mlp.experts.1.gate_proj")
    bits = getattr(expert, RECORDED)
    with torch.no_grad():
        expert.weight[unpack_bits(bits, expert.in_features)] = 0
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(read_folder(tmp_path / "out").load(f"{STORED[family]}.bitmask"), bits)


def test_llama4_is_saved_whole_where_nothing_is_packed(folder_of, calibration_data, tmp_path):
    recipe = [crepe(mask_structure="0:0", sparsity=0.5)]
    model = run(load(folder_of("llama4_text")), recipe, calibration_data, output_dir=str(tmp_path / "out"))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-6)
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.feed_forward.experts.gate_up_proj"]
    assert float((stored == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def read_back(folder):
    """The model of a folder that holds all its tensors and no others."""
    model, info = t.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


def test_llama4_is_saved_whole_where_its_config_is_an_ordinary_one(folder_of, calibration_data, tmp_path):
    model = run(load(folder_of("llama4_text")), [crepe()], calibration_data)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "plain", save_compressed=False, max_shard_size="20KB")
    decompress_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert len(read_folder(tmp_path / "unpacked").files) > 2
    loaded = read_back(tmp_path / "packed")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("plain", "unpacked", "again"):
        torch.testing.assert_close(logits(read_back(tmp_path / folder)), wanted, rtol=1e-5, atol=1e-6)
    # What an ordinary model holds whole is read back from a folder whose other layers are packed.
    compress_folder(tmp_path / "unpacked", tmp_path / "repacked")
    torch.testing.assert_close(logits(read_back(tmp_path / "repacked")), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("structure", ["2:4", "4:8"])
def test_llama4_stays_apart_where_anything_is_quantized(structure, folder_of, calibration_data, tmp_path):
    quantize = QuantizationModifier(
        targets=["Linear"], scheme="W8A8", ignore=["lm_head", "re:.*experts.*", "re:.*router"]
    )
    recipe = [crepe(mask_structure=structure), quantize]
    model = run(load(folder_of("llama4_text")), recipe, calibration_data, output_dir=str(tmp_path / "out"))
    torch.testing.assert_close(logits(read_back(tmp_path / "out")), logits(model), rtol=1e-5, atol=1e-6)


def test_families_that_store_whole_experts_refuse_to_quantize_them(folder_of, calibration_data, tmp_path):
    recipe = [crepe(), QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])]
    with pytest.raises(ValueError, match=r'quantize the experts of GptOssForCausalLM.*"re:\.\*experts\.\*"'):
        run(load(folder_of("gpt_oss")), recipe, calibration_data)
    recipe[1] = QuantizationModifier(
        targets=["Linear"], scheme="W8A8", ignore=["lm_head", "re:.*experts.*", "re:.*router.*"]
    )
    recipe[0] = crepe()
    out = tmp_path / "out"
    model = run(load(folder_of("gpt_oss")), recipe, calibration_data, output_dir=str(out))
    assert torch.isfinite(logits(model)).all()
    _, info = t.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "llama4_text"])
def test_quantized_experts_are_packed_and_read_dequantized(family, folder_of, calibration_data, tmp_path):
    recipe = [crepe(), QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])]
    model = run(load(folder_of(family)), recipe, calibration_data, output_dir=str(tmp_path / "out"))
    checkpoint = read_folder(tmp_path / "out")
    assert checkpoint.layers[STORED[family]].dtype == torch.int8
    again, info = t.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # The model in memory rounds the inputs of its experts, too.
    wanted = logits(model)
    assert float((logits(again) - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_a_model_without_experts_passes(tiny_model_folder):
    check_experts(load(tiny_model_folder("llama")), [])
