"""ADMMModifier through llm-compressor's own oneshot: masks, errors as computed from outside, stacks, order."""

import pytest
import torch
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

from crepe_llm.functional.admm import ADMMOptions, admm
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import crepe_scores
from crepe_llm.modifiers import ADMMModifier, CRePEModifier, DSnoTModifier, WeightCorrectionModifier
from crepe_llm.recipe_files import recipe_path
from modifier_helpers import crepe, inputs_of, linears, load, matrix, output_norms, refused, run
from tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_n_of_m_and_closer_than_with_pcg_alone(family, tiny_model_folder, calibration_data):
    folder = tiny_model_folder(family)
    modifier, correction = ADMMModifier(), WeightCorrectionModifier()
    layers = linears(run(load(folder), [crepe(), modifier], calibration_data))
    run(load(folder), [crepe(), correction], calibration_data)
    assert set(modifier.errors) == set(layers)
    for name, module in layers.items():
        assert bool(((matrix(module).reshape(-1, 4) != 0).sum(1) == 2).all()), name
        before, after = modifier.errors[name]
        assert 0 < after < before, name
    fixed, chosen = (sum(after for _, after in found.errors.values()) for found in (correction, modifier))
    assert chosen < fixed


@pytest.mark.parametrize(
    ("fields", "weighting"),
    [({}, "uniform"), ({"rounds": 3, "iterations": 5, "penalty": 0.5, "dampening": 0.1}, "relative")],
)
def test_the_first_block_is_pruned_as_computed_independently(fields, weighting, tiny_model_folder, calibration_data):
    """The first block's inputs are the dense model's."""
    folder = tiny_model_folder("llama")
    modifier = ADMMModifier(true_sequential=False, token_weighting=weighting, **fields)
    layers = linears(run(load(folder), [crepe(), modifier], calibration_data))
    inputs = inputs_of(load(folder), calibration_data)
    for name, module in linears(load(folder)).items():
        if ".layers.0." not in name:
            continue
        dense, x = module.weight.detach(), inputs[name]
        if weighting == "relative":
            x = x / output_norms(module, x)
        gram = (x.T @ x).float()
        norm = gram.diagonal().sqrt()

        def scores(weight, norm=norm):
            return crepe_scores(weight, norm)

        expected = admm(dense, gram, scores, lambda found: keep_mask(found, 0.5, "2:4"), ADMMOptions(**fields))
        found = layers[name].weight.detach()
        # Sums of inputs in another order may turn a few close decisions.
        assert ((found != 0) == expected.keep).float().mean() > 0.99, name
        same = ((found != 0) == expected.keep).all(1)
        torch.testing.assert_close(found[same], expected.weight[same], rtol=1e-2, atol=5e-3)
        before, after = modifier.errors[name]
        wanted = x @ dense.double().T
        distance = ((x @ found.double().T - wanted) ** 2).sum() / (wanted**2).sum()
        assert after == pytest.approx(float(distance), rel=1e-3) and after < before


def test_unstructured_layers_keep_their_own_sparsity(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    sparsity = {"re:.*down_proj": 0.5, "re:.*": 0.75}
    recipe = [CRePEModifier(sparsity=sparsity, comparison_group="matrix"), ADMMModifier(rounds=4, iterations=5)]
    for name, module in linears(run(load(folder), recipe, calibration_data)).items():
        wanted = 0.5 if "down_proj" in name else 0.75
        assert int((module.weight == 0).sum()) == int(module.weight.numel() * wanted), name


def test_it_composes_with_quantization_and_the_packed_checkpoint(tiny_model_folder, calibration_data, tmp_path):
    folder = tiny_model_folder("llama")
    quantization = QuantizationModifier(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])
    model = run(load(folder), [crepe(), ADMMModifier(), quantization], calibration_data)
    assert all(bool(((module.weight.view(-1, 4) != 0).sum(1) <= 2).all()) for module in linears(model).values())
    first = run(load(folder), [crepe(), ADMMModifier()], calibration_data, output_dir=str(tmp_path / "out"))
    loaded = linears(load(tmp_path / "out"))
    for name, module in linears(first).items():
        assert torch.equal(loaded[name].weight, module.weight), name
    again = run(load(folder), str(tmp_path / "out" / "recipe.yaml"), calibration_data)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_errors_are_logged(tiny_model_folder, calibration_data, messages):
    modifier = ADMMModifier(targets=["re:.*down_proj"])
    run(load(tiny_model_folder("llama")), [crepe(), modifier], calibration_data)
    (table,) = [message for message in messages if "Squared output error of 2 layers" in message]
    assert "before and after ADMM" in table
    for name, (before, after) in modifier.errors.items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[1:] == [f"{before:.2%}", f"{after:.2%}"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda: [ADMMModifier()], "ADMMModifier needs one CRePEModifier before it in the recipe, and has none"),
        (
            lambda: [WandaPruningModifier(sparsity=0.5, targets=["Linear"]), ADMMModifier()],
            "needs one CRePEModifier before it .*no other modifier may prune",
        ),
        (lambda: [crepe(), crepe(), ADMMModifier()], "needs one CRePEModifier before it .* has CRePEModifier, CRePE"),
        (
            lambda: [crepe(), DSnoTModifier(), ADMMModifier()],
            "has DSnoTModifier before it in the recipe: it chooses masks .* would undo",
        ),
        (
            lambda: [crepe(), WeightCorrectionModifier(), ADMMModifier()],
            "has WeightCorrectionModifier before it .* would undo",
        ),
        (
            lambda: [crepe(), ADMMModifier(), WeightCorrectionModifier()],
            "has ADMMModifier before it .* would undo that",
        ),
        (lambda: [crepe(), ADMMModifier(), DSnoTModifier()], "has ADMMModifier before it .* would undo that"),
    ],
)
def test_wrong_orders_are_refused_before_calibration(recipe, message, tiny_model_folder, calibration_data):
    refused(load(tiny_model_folder("llama")), recipe(), calibration_data, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounds": 0}, r"rounds\n  Input should be greater than or equal to 1"),
        ({"rounds": 21}, "at most iterations=20"),
        ({"penalty": 0.0}, r"penalty\n  Input should be greater than 0"),
        ({"dampening": float("nan")}, r"dampening\n  Input should be a finite number"),
        ({"refinement": 0}, r"refinement\n  Input should be greater than or equal to 1"),
        ({"steps": 3}, "steps"),
    ],
)
def test_bad_fields_are_refused_with_the_field_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        ADMMModifier(**fields)


def test_the_best_recipe_comes_closer_to_dense_than_crepe_alone(tiny_model_folder, calibration_data):
    folder = tiny_model_folder("llama")
    ids = torch.tensor(calibration_data["input_ids"])[:2]
    with torch.no_grad():
        dense = load(folder)(ids).logits
        errors = []
        for recipe in ("crepe_2of4", "crepe_2of4_best"):
            model = run(load(folder), str(recipe_path(recipe)), calibration_data)
            for name, module in linears(model).items():
                assert bool(((module.weight.view(-1, 4) != 0).sum(1) == 2).all()), name
            errors.append(float((model(ids).logits - dense).square().mean()))
    assert errors[1] < 0.9 * errors[0]
