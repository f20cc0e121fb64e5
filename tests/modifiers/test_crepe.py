"""CRePEModifier through llm-compressor's own oneshot, checked against computations that share no code with it."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from llmcompressor import oneshot

from crepe_llm.modifiers import MaskedGPTQModifier, WeightCorrectionModifier
from modifier_helpers import OFFLOADED, crepe, inputs_of, linears, load, matrix, run
from tiny_models import FAMILIES

RECIPES = Path(__file__).parents[2] / "recipes"
PRUNING_RECIPES = [
    "crepe_2of4",
    "crepe_4of8",
    "crepe_unstructured_50",
    "ria_2of4",
    "wanda_2of4",
]


def block_of(name):
    return next(int(part) for part in name.split(".") if part.isdecimal())


def expected_scores(weight, inputs, fields):
    """By the formulas in fp64, of the weight and the inputs [tokens, d_in]."""
    a = weight.double().abs()
    if fields.get("score") == "cvr":
        return a * inputs.var(0, correction=0) ** 0.25 * weight.double().var(0) ** (-fields.get("alpha", 1.0) / 2)
    half = fields.get("kernel_size", 3) // 2
    window = torch.nn.functional.avg_pool2d(a[None, None], 2 * half + 1, 1, half, count_include_pad=False)[0, 0]
    scores = fields.get("row", 1.0) * a / a.sum(1, keepdim=True) + fields.get("column", 1.0) * a / a.sum(0)
    scores += fields.get("neighbourhood", 1.0) * a / (math.sqrt(a.numel()) * window)
    return scores * inputs.square().sum(0).sqrt() ** fields.get("activation_exponent", 0.5)


def expected_keep(weight, inputs, fields):
    """The recipe's mask by the formula and plain sorting."""
    scores = expected_scores(weight, inputs, fields)
    n, m = map(int, fields.get("mask_structure", "0:0").split(":"))
    if m:
        groups = scores.reshape(len(weight), -1, m)
    elif fields.get("comparison_group", "row") == "matrix":
        groups = scores.reshape(1, 1, -1)
    else:
        groups = scores.reshape(len(weight), 1, -1)
    pruned = n or int(groups.shape[-1] * fields["sparsity"])
    keep = torch.ones_like(groups, dtype=torch.bool)
    keep.scatter_(-1, groups.argsort(-1)[..., :pruned], False)
    return keep.view_as(weight)


def assert_pruned_as_expected(dense, pruned, data, fields, sequential=True, corrected=False):
    """Every target's mask follows from the inputs it saw: those after earlier blocks were pruned (and corrected)."""
    reference = linears(dense)
    result = linears(pruned)
    blocks = sorted({block_of(name) for name in reference})
    for block in blocks:
        inputs = inputs_of(dense, data)
        for name in (n for n in reference if block_of(n) == block):
            weight, kept = matrix(reference[name]), matrix(result[name])
            keep = expected_keep(weight, inputs[name], fields)
            assert torch.equal(kept != 0, keep), name
            assert corrected or torch.equal(kept, weight * keep), name
        if sequential:
            for name in (n for n in reference if block_of(n) == block):
                reference[name].weight.data.copy_(result[name].weight.data)


@pytest.mark.parametrize("recipe", PRUNING_RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_recipes_prune_every_family_as_computed_independently(
    family, recipe, tiny_model_folder, calibration_data
):
    path = RECIPES / f"{recipe}.yaml"
    folder = tiny_model_folder(family)
    pruned = run(load(folder), str(path), calibration_data)
    (stage,) = yaml.safe_load(path.read_text()).values()
    assert_pruned_as_expected(load(folder), pruned, calibration_data, stage["pruning_modifiers"]["CRePEModifier"])


@pytest.mark.parametrize("alpha", [{}, {"alpha": 0.0}, {"alpha": 0.5}])
@pytest.mark.parametrize("family", FAMILIES)
def test_cvr_prunes_every_family_as_computed_independently(family, alpha, tiny_model_folder, calibration_data):
    folder, fields = tiny_model_folder(family), {"score": "cvr", "mask_structure": "2:4", **alpha}
    pruned = run(load(folder), [crepe(**fields)], calibration_data)
    assert_pruned_as_expected(load(folder), pruned, calibration_data, fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cvr_recipe_corrects_the_weights_under_cvrs_masks(family, tiny_model_folder, calibration_data):
    folder = tiny_model_folder(family)
    model = run(load(folder), str(RECIPES / "cvr_ec_2of4.yaml"), calibration_data)
    fields = {"score": "cvr", "mask_structure": "2:4"}
    assert_pruned_as_expected(load(folder), model, calibration_data, fields, corrected=True)


def test_basic_pipeline_calibrates_every_layer_on_the_dense_model(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    pruned = run(load(folder), [crepe()], calibration_data, pipeline="basic")
    dense = load(folder)
    assert_pruned_as_expected(dense, pruned, calibration_data, {"mask_structure": "2:4"}, sequential=False)


def test_sequential_and_independent_pipelines_agree(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    first, second = (
        run(load(folder), [crepe()], calibration_data, pipeline=pipeline) for pipeline in ("sequential", "independent")
    )
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype, tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    dense, pruned = load(folder, dtype), run(load(folder, dtype), [crepe()], calibration_data)
    for name, module in linears(pruned).items():
        weight, original = module.weight, linears(dense)[name].weight
        assert weight.dtype == dtype
        groups = (weight.view(-1, 4) != 0).sum(1)
        assert bool((groups == 2).all()), name
        assert torch.equal(weight, original * (weight != 0))


def test_padding_does_not_change_the_masks(tiny_model_folder, calibration_data):
    """What stands in the padding is irrelevant: other pad tokens give the same model."""
    folder = tiny_model_folder("llama")

    def repad(row):
        ids = [i if m else 7 for i, m in zip(row["input_ids"], row["attention_mask"], strict=True)]
        return {"input_ids": ids}

    first = run(load(folder), [crepe()], calibration_data)
    second = run(load(folder), [crepe()], calibration_data.map(repad))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_shuffled_batches_from_worker_processes_keep_their_masks(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    expected = run(load(folder), [crepe()], calibration_data, pipeline="basic")
    torch.manual_seed(3)
    shuffled = run(
        load(folder),
        [crepe()],
        calibration_data,
        pipeline="basic",
        shuffle_calibration_samples=True,
        dataloader_num_workers=1,
    )
    for one, other in zip(expected.parameters(), shuffled.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_offloaded_weights(tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("qwen2")
    offloaded = load(folder, device_map=OFFLOADED, offload_folder=tmp_path / "offload")
    run(offloaded, [crepe()], calibration_data, output_dir=str(tmp_path / "out"))
    expected = run(load(folder), [crepe()], calibration_data)
    for name, module in linears(expected).items():
        assert torch.equal(module.weight, linears(offloaded)[name].weight), name


def test_sparsity_by_name_pattern(tiny_model_folder, calibration_data):
    recipe = [crepe(mask_structure="0:0", sparsity={"re:.*self_attn.*": 0.25, "re:.*": 0.75})]
    pruned = run(load(tiny_model_folder("llama")), recipe, calibration_data)
    for name, module in linears(pruned).items():
        zeros = (module.weight == 0).float().mean(1)
        assert bool((zeros == (0.25 if "self_attn" in name else 0.75)).all()), name


def test_mask_structure_by_name_pattern(tiny_model_folder, calibration_data, messages):
    recipe = [crepe(mask_structure={"re:.*self_attn.*": "3:8", "re:.*": "1:4"})]
    pruned = run(load(tiny_model_folder("llama")), recipe, calibration_data)
    for name, module in linears(pruned).items():
        n, m = (3, 8) if "self_attn" in name else (1, 4)
        assert bool(((module.weight.view(-1, m) == 0).sum(1) == n).all()), name
    assert any("Realised sparsity of 14 layers (1:4, 3:8)" in line for line in messages)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparsity_zero_changes_nothing(family, tiny_model_folder, calibration_data):
    folder = tiny_model_folder(family)
    pruned = run(load(folder), [crepe(mask_structure="0:0", sparsity=0.0)], calibration_data)
    for one, other in zip(pruned.parameters(), load(folder).parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "fields",
    [
        {"row": 0.3, "column": 2.0, "neighbourhood": 0.7, "kernel_size": 5, "activation_exponent": 0.9},
        {"score": "cvr", "alpha": 0.7},
        {"mask_structure": {"re:.*mlp.*": "5:8", "re:.*": "1:8"}},
    ],
)
def test_the_saved_recipe_prunes_the_same(fields, tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("llama")
    first = run(load(folder), [crepe(**fields)], calibration_data, output_dir=str(tmp_path / "out"))
    second = run(load(folder), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_recipes_are_found_without_importing_crepe_llm(tiny_model_folder):
    program = f"""
import sys
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tiny_model_folder("llama"))!r})
data = Dataset.from_dict({{"input_ids": [list(range(3, 19))] * 2, "attention_mask": [[1] * 16] * 2}})
oneshot(model=model, recipe={str(RECIPES / "crepe_2of4.yaml")!r}, dataset=data, num_calibration_samples=2)
assert (model.model.layers[0].mlp.up_proj.weight.view(-1, 4) != 0).sum(1).eq(2).all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_a_table_of_realised_sparsity_is_logged_once(tiny_model_folder, calibration_data, messages):
    pruned = run(load(tiny_model_folder("llama")), [crepe()], calibration_data)
    (table,) = [message for message in messages if "Realised sparsity" in message]
    for name, module in linears(pruned).items():
        shape = "x".join(map(str, module.weight.shape))
        assert f"{name} " in table and shape in table
    assert table.count("50.00%") == len(linears(pruned)) + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_structure": "0:0", "sparsity": 1.0}, "sparsity=1.0 must be at least 0 and below 1"),
        ({"mask_structure": "0:0", "sparsity": -0.5}, "sparsity=-0.5"),
        ({"mask_structure": "0:0", "sparsity": {"re:.*mlp.*": 1.5}}, r"sparsity=1.5 for re:\.\*mlp"),
        ({"mask_structure": "2:4", "sparsity": 0.4}, "contradicts.*leave sparsity out or set it to 0.5"),
        ({"mask_structure": "4:2"}, 'mask_structure="4:2"'),
        ({"mask_structure": "half"}, 'mask_structure="half"'),
        ({"kernel_size": 4}, "kernel_size=4 must be odd"),
        ({"kernel_size": -1}, r"kernel_size\n  Input should be greater than or equal to 1"),
        ({"row": 0.0, "column": 0.0, "neighbourhood": 0.0}, "all 0"),
        ({"row": -1.0}, r"row\n  Input should be greater than or equal to 0"),
        ({"activation_exponent": -1.0}, r"activation_exponent\n  Input should be greater than or equal to 0"),
        ({"comparison_group": "layer"}, "comparison_group"),
        ({"mask_structure": {"re:.*": "0:0"}}, r'"0:0" for re:\.\* is unstructured.*map `sparsity` instead'),
        ({"mask_structure": {"re:.*": "8:4"}}, 'mask_structure="8:4"'),
        ({"mask_structure": {"re:.*": "4:8"}, "sparsity": 0.5}, "implies the sparsity of each layer: leave sparsity"),
        ({"score": "cvr", "row": 1.0}, "score: cvr makes no use of row, which belongs to score: crepe: leave it out"),
        ({"score": "cvr", "kernel_size": 3, "column": 2.0}, "no use of column, kernel_size"),
        ({"alpha": 1.0}, "score: crepe makes no use of alpha"),
        ({"score": "cvr", "alpha": -1.0}, r"alpha\n  Input should be greater than or equal to 0"),
        ({"score": "cvr", "alpha": float("inf")}, r"alpha\n  Input should be less than or equal to 9"),
        ({"score": "ria"}, "score"),
        ({"kernel": 3}, "kernel"),
    ],
)
def test_bad_fields_are_refused_with_the_field_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        crepe(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ["Convolution"]}, "match no layer of LlamaForCausalLM.*Linear"),
        ({"ignore": ["Linear"]}, "match no layer"),
        ({"targets": ["Embedding"]}, "shares its weight with the embedding|Embedding"),
        ({"ignore": []}, "lm_head shares its weight with the embedding model.embed_tokens.*add lm_head to `ignore`"),
        ({"mask_structure": "3:7"}, "32 input channels.*groups of 7"),
        ({"mask_structure": {"re:.*": "3:7"}}, '32 input channels.*"3:7" cannot cut into groups of 7'),
        ({"mask_structure": {"re:.*mlp.*": "3:8"}}, "no pattern of mask_structure=.*self_attn.q_proj"),
        ({"mask_structure": "0:0"}, "needs `sparsity`.*or a SparsityAllocationModifier before it"),
        ({"mask_structure": "0:0", "sparsity": {"re:.*mlp.*": 0.5}}, "no pattern.*self_attn.q_proj.*catches the rest"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_calibration(
    fields, message, tiny_model_folder, calibration_data, tmp_path
):
    model = load(tiny_model_folder("llama"))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        run(model, [crepe(**fields)], calibration_data, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_magnitude_prunes_without_data_as_with_it(family, tiny_model_folder, calibration_data, tmp_path):
    folder, recipe = tiny_model_folder(family), [crepe(score="magnitude")]
    given = linears(run(load(folder), recipe, calibration_data))
    oneshot(model=load(folder), recipe="magnitude_2of4", output_dir=str(tmp_path / "saved"))
    for name, module in linears(load(tmp_path / "saved")).items():
        kept = matrix(module).view(len(matrix(module)), -1, 4).count_nonzero(2)
        assert bool((kept == 2).all()) and torch.equal(module.weight, given[name].weight), name


@pytest.mark.parametrize(
    ("other", "needing"),
    [(WeightCorrectionModifier(), "WeightCorrection"), (MaskedGPTQModifier(scheme="W4A16"), "GPTQ")],
)
def test_magnitude_needs_data_where_another_modifier_does(other, needing, tiny_model_folder):
    model = load(tiny_model_folder("llama"))
    with pytest.raises(ValueError, match=f"{needing}Modifier needs calibration data"):
        oneshot(model=model, recipe=[crepe(score="magnitude"), other])


def test_missing_calibration_data_is_refused(tiny_model_folder):
    with pytest.raises(ValueError, match=r"needs calibration data.*pass `dataset=`"):
        oneshot(model=load(tiny_model_folder("llama")), recipe=[crepe()])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_refused_by_layer_and_leave_no_folder(value, tiny_model_folder, calibration_data, tmp_path):
    model = load(tiny_model_folder("llama"))
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = value
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.mlp\.down_proj"):
        run(model, [crepe()], calibration_data, output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_overflowing_activations_are_refused_by_layer(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    model.model.layers[0].post_attention_layernorm.weight.data[4] = float("inf")
    with pytest.raises(ValueError, match=r"inputs of model\.layers\.0\.mlp\.\w+ are NaN or infinite.*first \[4\]"):
        run(model, [crepe()], calibration_data)


def test_all_layers_of_a_part_are_looked_at_before_one_changes(tiny_model_folder, calibration_data):
    """Another process may write a layer's weight while this one looks at it, where they share the memory."""
    model = load(tiny_model_folder("llama"))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"weight of model\.layers\.0\.mlp\.down_proj contains NaN"):
        run(model, [crepe()], calibration_data)
    for name, module in linears(model).items():
        if not name.endswith("0.mlp.down_proj"):
            assert torch.equal(module.weight, before[f"{name}.weight"]), name


def test_dead_channels_rows_and_columns_prune_cleanly(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    layer = model.model.layers[0]
    layer.mlp.down_proj.weight.data[3] = 0
    layer.mlp.down_proj.weight.data[:, 5] = 0
    layer.input_layernorm.weight.data[6] = 0
    run(model, [crepe()], calibration_data)
    for name, module in linears(model).items():
        assert bool(module.weight.isfinite().all()), name
        assert bool(((module.weight.view(-1, 4) != 0).sum(1) <= 2).all()), name


def test_experts_that_saw_no_token(tiny_model_folder, calibration_data):
    """An expert without tokens is an error by default, and stays dense where the recipe says so."""

    def starved():
        model = load(tiny_model_folder("mixtral"))
        from llmcompressor.modeling.moe.linearize import linearize_moe

        linearize_moe(model)
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate.data[2] = 0
            gate.data[:2] = torch.stack([torch.ones(32), -torch.ones(32)]) * 10
        return model

    with pytest.raises(ValueError, match=r"experts\.\d.*never saw a calibration token.*uncalibrated: dense"):
        run(starved(), [crepe()], calibration_data, moe_calibrate_all_experts=False)
    pruned = run(starved(), [crepe(uncalibrated="dense")], calibration_data, moe_calibrate_all_experts=False)
    experts = {name: module for name, module in linears(pruned).items() if ".experts." in name}
    dense = [name for name, module in experts.items() if bool((module.weight != 0).all())]
    sparse = [name for name in experts if name not in dense]
    assert dense and sparse
    for name in sparse:
        assert bool(((experts[name].weight.view(-1, 4) != 0).sum(1) == 2).all()), name
    # What follows CRePEModifier leaves out what it left out.
    correction = WeightCorrectionModifier(method="pcg")
    recipe = [crepe(uncalibrated="dense"), correction]
    corrected = run(starved(), recipe, calibration_data, moe_calibrate_all_experts=False)
    for name in dense:
        assert torch.equal(linears(corrected)[name].weight, experts[name].weight), name
        assert name not in correction.errors
    assert set(sparse) <= set(correction.errors)
