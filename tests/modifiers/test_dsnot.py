"""DSnoTModifier through llm-compressor's own oneshot: masks, errors as computed from outside, stacks, order."""

import pytest
import torch
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM

from crepe_llm.checkpoints import read_folder
from crepe_llm.functional.compensation import conjugate_gradients
from crepe_llm.functional.repruning import DSnoTOptions, dsnot
from crepe_llm.functional.scores import crepe_scores, cvr_scores, wanda_scores
from crepe_llm.modifiers import DSnoTModifier, WeightCorrectionModifier
from crepe_llm.pruning.steps import Refit, Reprune
from crepe_llm.recipe_files import recipe_path
from modifier_helpers import OFFLOADED, crepe, inputs_of, linears, load, matrix, refused, run
from tiny_models import FAMILIES


def row_errors(inputs, dense, changed):
    """Mean over the tokens of what each output lacks."""
    return (inputs @ (dense.double() - changed.double()).T).mean(0)


def is_n_of_m(weight, n, m):
    return bool(((weight.reshape(-1, m) != 0).sum(1) == m - n).all())


@pytest.mark.parametrize("score", ["wanda", "crepe"])
@pytest.mark.parametrize("fields", [{}, {"mask_structure": "0:0", "sparsity": 0.6}], ids=["2of4", "unstructured"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_keep_their_counts_and_none_gets_worse(family, fields, score, tiny_model_folder, calibration_data):
    folder = tiny_model_folder(family)
    pruned = run(load(folder), [crepe(**fields)], calibration_data)
    modifier = DSnoTModifier(score=score)
    repruned = linears(run(load(folder), [crepe(**fields), modifier], calibration_data))
    dense, moved = linears(load(folder)), 0
    assert set(modifier.errors) == set(repruned)
    for name, before in linears(pruned).items():
        weight, start, origin = matrix(repruned[name]), matrix(before), matrix(dense[name])
        assert torch.equal((weight != 0).sum(1), (start != 0).sum(1)), name
        assert torch.equal(weight, origin * (weight != 0)), name
        if not fields:
            assert is_n_of_m(weight, 2, 4), name
        moved += int(((weight != 0) != (start != 0)).sum())
        error_before, error_after = modifier.errors[name]
        assert 0 < error_after <= error_before, name
    assert moved > 0


COEFFICIENTS = {"row": 0.7, "column": 1.5, "kernel_size": 5, "activation_exponent": 0.8}
SCORES = {
    "wanda": (COEFFICIENTS, "wanda", lambda w, x: wanda_scores(w, x.norm(dim=0))),
    "crepe": (COEFFICIENTS, "crepe", lambda w, x: crepe_scores(w, x.norm(dim=0), **COEFFICIENTS)),
    "cvr": ({"score": "cvr"}, "crepe", lambda w, x: cvr_scores(w, x.var(0, correction=0))),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_the_first_block_is_repruned_as_computed_independently(score, pipeline, tiny_model_folder, calibration_data):
    """The first block's inputs are known: those of the dense block, as the work is done in the pruning's epoch."""
    folder = tiny_model_folder("llama")
    pruning, order, scores = SCORES[score]
    fields = {"max_cycles": 5, "threshold": 1e-3, "variance_exponent": 0.5}
    pruned = run(load(folder), [crepe(**pruning)], calibration_data)
    modifier = DSnoTModifier(score=order, **fields)
    repruned = linears(run(load(folder), [crepe(**pruning), modifier], calibration_data, pipeline=pipeline))
    inputs = inputs_of(load(folder), calibration_data)
    for name, layer in linears(load(folder)).items():
        if ".layers.0." not in name:
            continue
        dense, masked, x = layer.weight.detach(), linears(pruned)[name].weight.detach(), inputs[name]
        mean, variance = x.mean(0), x.var(0, correction=0)
        found = dsnot(masked, dense, masked != 0, scores(dense, x), mean, variance, DSnoTOptions(group=4, **fields))
        result = repruned[name].weight.detach()
        assert torch.equal(result, dense * found.keep), name
        before, after = (row_errors(x, dense, weight).abs().mean().item() for weight in (masked, result))
        assert modifier.errors[name] == pytest.approx((before, after), rel=1e-3, abs=1e-7), name
        assert after < before, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype, tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    model = run(load(folder, dtype), [crepe(), DSnoTModifier()], calibration_data)
    for name, dense in linears(load(folder, dtype)).items():
        weight = linears(model)[name].weight
        assert weight.dtype == dtype and is_n_of_m(weight, 2, 4), name
        assert torch.equal(weight, dense.weight * (weight != 0)), name


def test_offloaded_weights(tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("qwen2")
    offloaded = load(folder, device_map=OFFLOADED, offload_folder=tmp_path / "offload")
    run(offloaded, [crepe(), DSnoTModifier()], calibration_data, output_dir=str(tmp_path / "out"))
    expected = run(load(folder), [crepe(), DSnoTModifier()], calibration_data)
    for name, module in linears(expected).items():
        assert torch.equal(module.weight, linears(offloaded)[name].weight), name


@pytest.mark.parametrize("upstream", [WandaPruningModifier, SparseGPTModifier])
@pytest.mark.parametrize("structure", ["0:0", "2:4"])
def test_after_the_toolkits_own_modifiers(upstream, structure, tiny_model_folder, calibration_data):
    """SparseGPT moves what it keeps: those weights stay as it left them, and what grows back is dense."""
    folder = tiny_model_folder("llama")

    def pruning():
        return upstream(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"])

    pruned = linears(run(load(folder), [pruning()], calibration_data))
    modifier = DSnoTModifier()
    repruned = linears(run(load(folder), [pruning(), modifier], calibration_data))
    dense, grown_anywhere = linears(load(folder)), 0
    assert len(modifier.errors) == 14
    for name, layer in repruned.items():
        keep, kept = layer.weight != 0, pruned[name].weight != 0
        assert torch.equal(keep.sum(1), kept.sum(1)), name
        if structure == "2:4":
            assert is_n_of_m(layer.weight, 2, 4)
        grown = keep & ~kept
        grown_anywhere += int(grown.sum())
        assert torch.equal(layer.weight[grown], dense[name].weight[grown]), name
        if ".layers.0." in name:
            # Later blocks see other inputs, so that their masks differ from the start.
            assert torch.equal(layer.weight[keep & kept], pruned[name].weight[keep & kept]), name
    assert grown_anywhere > 0


def test_each_layer_is_repruned_in_the_structure_that_it_was_pruned_in(tiny_model_folder, calibration_data):
    recipe = [
        crepe(targets=["re:.*self_attn.*_proj"]),
        crepe(targets=["re:.*(gate|up)_proj"], mask_structure="4:8"),
        WandaPruningModifier(sparsity=0.5, targets=["re:.*down_proj"]),
        DSnoTModifier(),
    ]
    model = run(load(tiny_model_folder("llama")), recipe, calibration_data)
    below_2of4 = {"4:8": 0, "0:0": 0}
    for name, layer in linears(model).items():
        if "self_attn" in name:
            assert is_n_of_m(layer.weight, 2, 4), name
        elif "down_proj" not in name:
            assert is_n_of_m(layer.weight, 4, 8), name
            below_2of4["4:8"] += not is_n_of_m(layer.weight, 2, 4)
        else:
            assert bool(((layer.weight == 0).sum(1) == 24).all()), name
            below_2of4["0:0"] += not is_n_of_m(layer.weight, 4, 8)
    assert all(below_2of4.values())


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_a_correction_after_it_fits_the_new_mask_to_the_dense_weights(pipeline, tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    repruned = run(load(folder), [crepe(), DSnoTModifier()], calibration_data, pipeline=pipeline)
    correction = WeightCorrectionModifier(method="pcg", true_sequential=False)
    recipe = [crepe(), DSnoTModifier(), correction]
    corrected = linears(run(load(folder), recipe, calibration_data, pipeline=pipeline))
    inputs = inputs_of(load(folder), calibration_data)
    for name, layer in linears(load(folder)).items():
        if ".layers.0." not in name:
            continue
        dense, x = layer.weight.detach(), inputs[name]
        keep = linears(repruned)[name].weight != 0
        assert torch.equal(corrected[name].weight != 0, keep), name
        expected = conjugate_gradients(dense, keep, (x.T @ x).float())
        torch.testing.assert_close(corrected[name].weight.detach(), expected, rtol=1e-2, atol=5e-3)
        wanted, before = x @ dense.double().T, x @ (dense * keep).double().T
        relative = float((before - wanted).square().sum() / wanted.square().sum())
        assert correction.errors[name][0] == pytest.approx(relative, rel=1e-3), name


def test_the_dense_weights_are_held_once_for_both(tiny_model_folder, calibration_data, monkeypatch):
    shared = []

    def watched(kind):
        def watch(step, layer):
            shared.append((kind, layer.name, layer.dense.data_ptr()))
            original(step, layer)

        original = kind.__call__
        return watch

    for kind in (Reprune, Refit):
        monkeypatch.setattr(kind, "__call__", watched(kind))
    recipe = [crepe(), DSnoTModifier(), WeightCorrectionModifier(method="energy")]
    run(load(tiny_model_folder("llama")), recipe, calibration_data)
    places = [{(name, place) for kind, name, place in shared if kind is each} for each in (Reprune, Refit)]
    assert len(places[0]) == 14 and places[0] == places[1]


def test_quantized_after_it_and_saved_sparse(tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("llama")
    quantization = QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])
    run(load(folder), [crepe(), DSnoTModifier(), WeightCorrectionModifier(method="sparsegpt"), quantization],
        calibration_data, output_dir=str(tmp_path / "out"))  # fmt: skip
    assert len(read_folder(tmp_path / "out").layers) == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded(torch.arange(3, 19)[None])  # the first forward pass decompresses the weights
    for name, module in linears(loaded).items():
        assert bool(((module.weight.view(-1, 4) != 0).sum(1) <= 2).all()), name
        assert (module.weight != 0).float().mean() > 0.48, name


def test_the_recipe_of_this_project_and_the_saved_one_do_the_same(tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("llama")
    path = str(recipe_path("crepe_2of4_dsnot"))
    first = run(load(folder), path, calibration_data, output_dir=str(tmp_path / "out"))
    again = run(load(folder), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    alone = run(load(folder), str(recipe_path("crepe_2of4")), calibration_data)
    assert any(not torch.equal(first.get_parameter(name), value) for name, value in alone.named_parameters())
    loaded = load(tmp_path / "out")
    for name, module in linears(first).items():
        assert torch.equal(linears(loaded)[name].weight, module.weight) and is_n_of_m(module.weight, 2, 4), name


def test_swaps_and_errors_are_logged(tiny_model_folder, calibration_data, messages):
    folder = tiny_model_folder("llama")
    pruned = linears(run(load(folder), [crepe()], calibration_data))
    modifier = DSnoTModifier(targets=["re:.*layers.0.self_attn.*_proj"])
    model = linears(run(load(folder), [crepe(), modifier], calibration_data))
    (table,) = [message for message in messages if "Weights swapped in 4 layers" in message]
    for name, (before, after) in modifier.errors.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        swapped = int(((model[name].weight != 0) & (pruned[name].weight == 0)).sum())
        _, count, share, *errors = line.split()
        assert int(count) == swapped > 0
        assert share == f"{swapped / (model[name].weight != 0).sum():.2%}"
        assert errors == [f"{before:.4g}", f"{after:.4g}"]
    for name in pruned:
        assert torch.equal(model[name].weight, pruned[name].weight) or name in modifier.errors or ".layers.1." in name


def test_an_unreachable_threshold_changes_nothing(tiny_model_folder, calibration_data):
    """No row's expected error is larger than the sum of all contributions."""
    folder = tiny_model_folder("gpt2")
    pruned = run(load(folder), [crepe()], calibration_data)
    same = run(load(folder), [crepe(), DSnoTModifier(threshold=1.0)], calibration_data)
    for one, other in zip(pruned.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)


W8A8 = {"targets": ["Linear"], "scheme": "W8A8", "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: [DSnoTModifier()], "DSnoTModifier needs a modifier that prunes before it in the recipe, and has none"),
        (lambda: [DSnoTModifier(), crepe()], "needs a modifier that prunes before it"),
        (
            lambda: [crepe(), QuantizationModifier(**W8A8), DSnoTModifier()],
            "has QuantizationModifier before it .* undo the quantization",
        ),
        (
            lambda: [crepe(), WeightCorrectionModifier(), DSnoTModifier()],
            "has WeightCorrectionModifier before it .* put this one first",
        ),
        (
            lambda: [WandaPruningModifier(sparsity=0.5, targets=["Linear"]), DSnoTModifier(score="crepe")],
            "score: crepe takes the coefficients of a CRePEModifier before it, and there is none: use score: wanda",
        ),
    ],
)
def test_wrong_orders_are_refused_before_calibration(recipe, message, tiny_model_folder, calibration_data):
    refused(load(tiny_model_folder("llama")), recipe(), calibration_data, message)


def test_a_layer_that_another_modifier_pruned_has_no_crepe_score(tiny_model_folder, calibration_data):
    recipe = [
        WandaPruningModifier(sparsity=0.5, targets=["re:.*down_proj"]),
        crepe(targets=["re:.*self_attn.*_proj"]),
        DSnoTModifier(score="crepe"),
    ]
    with pytest.raises(ValueError, match=r"but model\.layers\.0\.mlp\.down_proj was pruned by WandaPruningModifier"):
        run(load(tiny_model_folder("llama")), recipe, calibration_data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "ria"}, "score"),
        ({"max_cycles": 0}, r"max_cycles\n  Input should be greater than or equal to 1"),
        ({"threshold": -1.0}, r"threshold\n  Input should be greater than or equal to 0"),
        ({"threshold": float("inf")}, r"threshold\n  Input should be a finite number"),
        ({"variance_exponent": float("nan")}, r"variance_exponent\n  Input should be a finite number"),
        ({"cycles": 3}, "cycles"),
    ],
)
def test_bad_fields_are_refused_with_the_field_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        DSnoTModifier(**fields)


@pytest.mark.parametrize(("max_cycles", "most"), [(None, 1), (3, 3)])
def test_swaps_are_in_proportion_to_the_width(max_cycles, most, tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    before = linears(run(load(folder), [crepe()], calibration_data))
    after = linears(run(load(folder), [crepe(), DSnoTModifier(max_cycles=max_cycles)], calibration_data))
    name = "model.layers.0.self_attn.q_proj"
    grown = ((after[name].weight != 0) & (before[name].weight == 0)).sum(1)
    assert int(grown.max()) == most
