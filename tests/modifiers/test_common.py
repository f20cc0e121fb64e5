"""What every score, allocation, correction, re-pruning and modifier must do, whatever its method.

Each of them is one line of a table. What a module exports and no table names fails the suite.
"""

import inspect
import math
import operator
import re

import pytest
import torch
import yaml
from llmcompressor.recipe import Recipe

import crepe_llm.modifiers
from crepe_llm.functional import allocation, compensation, repruning
from crepe_llm.functional import scores as importance
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import wanda_scores
from crepe_llm.functional.statistics import InputStatistics
from modifier_helpers import OFFLOADED, linears, load, matrix, run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(16, 24), (1, 8), (24, 8), (5, 48)]
STRUCTURES = ["2:4", "1:4", "4:8", "0:0"]


def a_layer(shape=(16, 24), dtype=torch.float32, seed=0):
    """A weight and the statistics of correlated inputs with means."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    inputs = torch.randn(64, shape[1], generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    return weight, statistics(inputs + torch.randn(shape[1], generator=generator))


def statistics(inputs):
    found = InputStatistics(inputs.shape[1], gram=True)
    found.update(inputs)
    return found


def a_damaged_layer(dtype=torch.float32):
    """Zero rows and columns of the weight, channels that are dead and one that is constant."""
    weight, _ = a_layer(dtype=dtype)
    inputs = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    weight[3], weight[:, 5] = 0, 0
    inputs[:, 8:13], inputs[:, 2] = 0, 1.5
    return weight, statistics(inputs)


def exported(module, ending=""):
    return {name for name in module.__all__ if name.endswith(ending) and inspect.isfunction(getattr(module, name))}


SCORES = {
    "magnitude_scores": lambda weight, seen: importance.magnitude_scores(weight),
    "wanda_scores": lambda weight, seen: importance.wanda_scores(weight, seen.norm),
    "crepe_scores": lambda weight, seen: importance.crepe_scores(weight, seen.norm),
    "cvr_scores": lambda weight, seen: importance.cvr_scores(weight, seen.variance),
}
every_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)


def test_every_score_is_in_the_table():
    assert exported(importance, "_scores") == set(SCORES)


@every_score
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_fp32_and_non_negative_and_leave_their_arguments_alone(score, shape, dtype):
    weight, seen = a_layer(shape, dtype)
    before = weight.clone()
    scores = score(weight, seen)
    assert scores.shape == weight.shape and scores.dtype == torch.float32
    assert bool((scores >= 0).all()) and bool(scores.isfinite().all())
    assert torch.equal(weight, before)
    assert torch.equal(scores, score(weight, seen))
    # 16-bit weights are widened before any arithmetic, so the score is that of the same values in fp32.
    assert torch.equal(scores, score(weight.float(), seen)) or dtype == torch.float64


@every_score
def test_zero_weights_score_zero_and_nothing_is_nan(score):
    weight, seen = a_damaged_layer()
    scores = score(weight, seen)
    assert bool(scores.isfinite().all())
    assert not scores[3].any() and not scores[:, 5].any()
    assert score is SCORES["magnitude_scores"] or not scores[:, 8:13].any()
    assert not score(torch.zeros_like(weight), seen).any()


@every_score
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layer", [a_layer, a_damaged_layer])
def test_scores_make_exact_masks(score, structure, layer):
    weight, seen = layer()
    scores = score(weight, seen)
    keep = keep_mask(scores, 0.5, structure)
    n, m = (12, 24) if structure == "0:0" else map(int, structure.split(":"))
    assert bool((keep.view(-1, m).sum(1) == m - n).all())
    # The common scale of a layer's weights ranks nothing; a power of two rounds nothing.
    assert torch.equal(keep, keep_mask(score(weight * 4, seen), 0.5, structure))
    if structure == "0:0":
        assert bool(keep_mask(scores, 0.0).all())


# Measures of the blocks, their sizes and the target, to one sparsity per block.
ALLOCATIONS = {
    "owl": lambda values, sizes, target: allocation.owl(values, target),
    "dlp": lambda values, sizes, target: allocation.dlp(values, target),
    "alpha_pruning": allocation.alpha_pruning,
    "atp": lambda values, sizes, target: allocation.atp(len(values), target),
}
MEASURES = {
    "outlier_ratio": allocation.outlier_ratio,
    "typical_score": allocation.typical_score,
    "tail_exponent": allocation.tail_exponent,
}
every_allocation = pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)


def test_every_allocation_is_in_a_table():
    shared_steps = {"water_fill", "mixed_n_of_m", "plot_allocation", "fraction_of"}
    assert exported(allocation) == set(ALLOCATIONS) | set(MEASURES) | shared_steps


@every_allocation
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("blocks", [1, 2, 7])
def test_allocations_meet_the_target(allocate, blocks, target):
    values, sizes = [1.5 + math.sin(3 * block) for block in range(blocks)], [100 + 7 * block for block in range(blocks)]
    wanted = allocate(values, sizes, target)
    assert len(wanted) == blocks and wanted == allocate(values, sizes, target)
    found = allocation.water_fill(wanted, sizes, target)
    assert all(0 <= sparsity <= 0.99 for sparsity in found)
    assert sum(map(operator.mul, found, sizes)) / sum(sizes) == pytest.approx(target, abs=1e-9)
    if target == 0:
        assert found == pytest.approx([0] * blocks, abs=1e-9)


@every_allocation
def test_equal_blocks_are_treated_alike(allocate):
    if allocate is not ALLOCATIONS["atp"]:  # which looks at depth alone
        assert allocate([3.0] * 4, [1, 2, 3, 4], 0.6) == pytest.approx([0.6] * 4)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_measures_of_blocks_are_never_nan(measure, dtype):
    weight, _ = a_damaged_layer(dtype)
    value = measure(weight.abs())
    assert math.isfinite(value) and value == measure(weight.abs())
    assert value == pytest.approx(measure(weight.float().abs()), rel=1e-6)
    assert not math.isnan(measure(torch.zeros(8, 12, dtype=dtype)))


# A dense weight, a mask and the inputs' statistics, to the weight after a correction or re-pruning.
CORRECTIONS = {
    "energy_compensation": lambda dense, keep, seen: compensation.energy_compensation(dense, keep),
    "mean_compensation": lambda dense, keep, seen: compensation.mean_compensation(
        dense, keep, seen.mean, seen.variance
    ),
    "sparsegpt_update": lambda dense, keep, seen: compensation.sparsegpt_update(dense, keep, seen.gram),
    "conjugate_gradients": lambda dense, keep, seen: compensation.conjugate_gradients(dense, keep, seen.gram),
}
every_correction = pytest.mark.parametrize("correct", CORRECTIONS.values(), ids=CORRECTIONS)
REPRUNINGS = {"dsnot": repruning.dsnot}
every_repruning = pytest.mark.parametrize("reprune", REPRUNINGS.values(), ids=REPRUNINGS)


def repruned(reprune, dense, keep, seen, structure):
    options = repruning.DSnoTOptions(group=None if structure == "0:0" else int(structure.split(":")[1]))
    return reprune(dense * keep, dense, keep, wanda_scores(dense, seen.norm), seen.mean, seen.variance, options)


def test_every_correction_and_repruning_is_in_a_table():
    # The others change no weights: an error, and what to take for the dense weight.
    assert exported(compensation) == set(CORRECTIONS) | {"output_error", "asymmetric_target"}
    assert exported(repruning) == set(REPRUNINGS)


@every_correction
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("structure", ["2:4", "0:0"])
def test_corrections_keep_masks(correct, structure, shape, dtype):
    dense, seen = a_layer(shape, dtype)
    keep = keep_mask(wanda_scores(dense, seen.norm), 0.5, structure)
    before = dense.clone(), keep.clone(), seen.gram.clone()
    corrected = correct(dense, keep, seen)
    assert corrected.dtype == torch.float32 and corrected.shape == dense.shape
    assert bool(corrected.isfinite().all()) and bool((corrected[~keep] == 0).all())
    assert torch.equal(corrected, correct(dense, keep, seen))
    assert all(torch.equal(one, other) for one, other in zip(before, (dense, keep, seen.gram), strict=True))


@every_correction
@pytest.mark.parametrize("dtype", DTYPES)
def test_corrections_without_a_mask_change_nothing(correct, dtype):
    dense, seen = a_layer(dtype=dtype)
    corrected = correct(dense, torch.ones_like(dense, dtype=torch.bool), seen)
    torch.testing.assert_close(corrected, dense.float(), rtol=1e-5, atol=1e-6)


@every_correction
def test_corrections_of_zeros_are_never_nan(correct):
    dense, seen = a_damaged_layer()
    keep = keep_mask(wanda_scores(dense, seen.norm), 0.5, "2:4")
    keep[1], keep[:, 9] = False, False
    for weight, inputs in ((dense, seen), (torch.zeros_like(dense), seen), (dense, statistics(torch.zeros(9, 24)))):
        corrected = correct(weight, keep, inputs)
        assert bool(corrected.isfinite().all()) and bool((corrected[~keep] == 0).all())


@every_repruning
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_repruning_keeps_counts(reprune, structure, shape, dtype):
    dense, seen = a_layer(shape, dtype)
    keep = keep_mask(wanda_scores(dense, seen.norm), 0.5, structure)
    found = repruned(reprune, dense, keep, seen, structure)
    assert torch.equal(found.keep.sum(1), keep.sum(1))
    if structure != "0:0":
        n, m = map(int, structure.split(":"))
        assert bool((found.keep.view(-1, m).sum(1) == m - n).all())
    assert bool((found.after.abs() <= found.before.abs()).all())
    assert torch.equal(found.keep, repruned(reprune, dense, keep, seen, structure).keep)


@every_repruning
@pytest.mark.parametrize("structure", STRUCTURES)
def test_repruning_of_zeros_is_never_nan_and_of_full_masks_nothing(reprune, structure):
    dense, seen = a_damaged_layer()
    keep = keep_mask(wanda_scores(dense, seen.norm), 0.5, structure)
    for weight, inputs in ((dense, seen), (torch.zeros_like(dense), seen), (dense, statistics(torch.zeros(9, 24)))):
        found = repruned(reprune, weight, keep, inputs, structure)
        assert bool(found.after.isfinite().all()) and torch.equal(found.keep.sum(1), keep.sum(1))
    whole = torch.ones_like(keep)
    assert torch.equal(repruned(reprune, dense, whole, seen, structure).keep, whole)


# The smallest recipe in which each modifier works. A new modifier brings its line.
TWO_OF_FOUR = {"mask_structure": "2:4"}
RECIPES = {
    "ADMMModifier": {"CRePEModifier": TWO_OF_FOUR, "ADMMModifier": {}},
    "CFSPModifier": {"CFSPModifier": {"sparsity": 0.25, "round_to": 4}},
    "ChannelPermutationModifier": {"ChannelPermutationModifier": {}, "CRePEModifier": TWO_OF_FOUR},
    "CRePEModifier": {"CRePEModifier": TWO_OF_FOUR},
    "DSnoTModifier": {"CRePEModifier": TWO_OF_FOUR, "DSnoTModifier": {}},
    "MaskedGPTQModifier": {
        "CRePEModifier": TWO_OF_FOUR,
        "MaskedGPTQModifier": {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": "W8A8"},
    },
    "PHOSearchModifier": {
        "PHOSearchModifier": {"candidates": 4, "rows": 8, "layers_per_kind": 1},
        "CRePEModifier": TWO_OF_FOUR,
    },
    "SparsityAllocationModifier": {
        "SparsityAllocationModifier": {"method": "owl", "sparsity": 0.5},
        "CRePEModifier": {},
    },
    "SparseCheckpointModifier": {"CRePEModifier": TWO_OF_FOUR, "SparseCheckpointModifier": {}},
    "WeightCorrectionModifier": {"CRePEModifier": TWO_OF_FOUR, "WeightCorrectionModifier": {}},
}
# Those that cannot work on GPT-2, and how they say so.
NOT_FOR_GPT2 = {
    "MaskedGPTQModifier": "unable to find any modules to quantize",  # compressed-tensors quantizes no Conv1D
}
# Sparsity 0 with the fields of the line; a correction or re-pruning has nothing to work on there, and says so.
AT_SPARSITY_ZERO = {
    "CRePEModifier": {"CRePEModifier": {"sparsity": 0.0}},
    "SparsityAllocationModifier": {
        "SparsityAllocationModifier": {"method": "uniform", "sparsity": 0.0},
        "CRePEModifier": {},
    },
}
every_modifier = pytest.mark.parametrize("modifier", crepe_llm.modifiers.__all__)


def as_yaml(modifiers):
    return yaml.safe_dump({"a_stage": {"b_modifiers": modifiers}}, sort_keys=False)


def recipe_of(modifier):
    return as_yaml(RECIPES[modifier])


def assert_sound(modifier, model, dtype=torch.float32):
    """Weights are finite and of their type, masks are exact, and no hook is left behind."""
    fields = RECIPES[modifier].get("CRePEModifier", {})
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks, f"{name} has a hook left"
    for name, module in linears(model).items():
        weight = matrix(module)
        assert weight.dtype == dtype, name
        if fields == TWO_OF_FOUR:
            kept = (weight.reshape(-1, 4) != 0).sum(1)
            # Rounding to a grid may make a kept weight zero.
            assert bool((kept <= 2 if "MaskedGPTQModifier" in RECIPES[modifier] else kept == 2).all()), name


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # PHO records its search in the working directory


def test_every_modifier_is_in_the_table():
    assert set(RECIPES) == set(crepe_llm.modifiers.__all__), "each modifier needs its line in RECIPES"
    assert all(modifier in recipe for modifier, recipe in RECIPES.items())


@every_modifier
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modifiers_work_in_16_bit(modifier, dtype, tiny_model_folder, calibration_data):
    model = run(load(tiny_model_folder("llama"), dtype), recipe_of(modifier), calibration_data)
    assert_sound(modifier, model, dtype)
    assert bool(model(torch.arange(3, 19)[None]).logits.isfinite().all())


@every_modifier
def test_modifiers_work_on_conv1d(modifier, tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("gpt2"))
    if modifier in NOT_FOR_GPT2:
        with pytest.raises(ValueError, match=NOT_FOR_GPT2[modifier]):
            run(model, recipe_of(modifier), calibration_data)
        return
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run(model, recipe_of(modifier), calibration_data)
    assert_sound(modifier, model)
    after = dict(model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


@every_modifier
def test_modifiers_meet_zeros_without_nan(modifier, tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.mlp.down_proj.weight[3] = 0
        layer.mlp.up_proj.weight[:, 5] = 0
        layer.self_attn.o_proj.weight.zero_()
        layer.input_layernorm.weight[6] = 0
    run(model, recipe_of(modifier), calibration_data)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert bool(model(torch.arange(3, 19)[None]).logits.isfinite().all())


@every_modifier
def test_modifiers_and_saved_recipes_do_the_same_again(modifier, tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("llama")
    first = run(load(folder), recipe_of(modifier), calibration_data, output_dir=str(tmp_path / "out"))
    (tmp_path / "again").mkdir()
    again = run(load(folder), recipe_of(modifier), calibration_data, output_dir=str(tmp_path / "again"))
    saved = run(load(folder), str(tmp_path / "out" / "recipe.yaml"), calibration_data, output_dir=str(tmp_path / "s"))
    for other in (again, saved):
        for (name, one), (_, two) in zip(first.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(one, two), name


@every_modifier
def test_modifiers_reach_offloaded_weights(modifier, tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("qwen2")
    offloaded = load(folder, device_map=OFFLOADED, offload_folder=tmp_path / "offload")
    # With a folder to save to, what is offloaded is back in memory at the end.
    run(offloaded, recipe_of(modifier), calibration_data, output_dir=str(tmp_path / "out"))
    expected = run(load(folder), recipe_of(modifier), calibration_data, output_dir=str(tmp_path / "expected"))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(offloaded.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("modifier", AT_SPARSITY_ZERO)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sparsity_zero_is_the_identity(modifier, family, tiny_model_folder, calibration_data):
    folder = tiny_model_folder(family)
    model = run(load(folder), as_yaml(AT_SPARSITY_ZERO[modifier]), calibration_data)
    for (name, one), (_, other) in zip(model.named_parameters(), load(folder).named_parameters(), strict=True):
        assert torch.equal(one, other), name


def ours(modifier):
    """The modifier's class and its bases that are this package's."""
    return [kind for kind in modifier.__mro__ if kind.__module__.startswith("crepe_llm.")]


def own_fields(modifier):
    """The fields that a modifier has and llm-compressor's base classes have not."""
    return {
        name
        for kind in ours(modifier)
        for name in inspect.get_annotations(kind)
        if name in modifier.model_fields and name != "requires_calibration_data"
    }


@every_modifier
def test_docstrings_describe_every_field_and_hold_a_recipe_that_works(modifier):
    kind = getattr(crepe_llm.modifiers, modifier)
    text = inspect.getdoc(kind)
    for each in ours(kind):
        described = re.findall(r"^ *:param (\w+):", each.__doc__, re.MULTILINE)
        assert sorted(described) == sorted(own_fields(kind) & inspect.get_annotations(each).keys()), each.__name__
    (sample,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert any(type(one) is kind for one in Recipe.create_instance(sample).modifiers)
    assert "Lifecycle:" in text


@every_modifier
def test_unknown_fields_are_refused(modifier):
    fields = {**RECIPES[modifier][modifier], "no_such_field": 1}
    with pytest.raises(ValueError, match="no_such_field"):
        getattr(crepe_llm.modifiers, modifier)(**fields)
