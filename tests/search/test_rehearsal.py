import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crepe_llm.modifiers import CRePEModifier
from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.search.rehearsal import Pruning, calls_of, input_statistics, mask_step, pruned, rehearsed, remembering
from crepe_llm.search.space import RIA, WANDA, Mask
from modifier_helpers import inputs_of, linears, load, matrix, run
from tiny_models import FAMILIES, save_model

TWO_OF_FOUR = Mask("2:4", 0.5)


def layers_of(model):
    return {module: name for name, module in linears(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rehearsal_prunes_as_oneshot_does(tiny_model_folder, calibration_data, family):
    """CRePE by RIA's coefficients in llm-compressor's own pipeline, against the rehearsal; then the model is dense."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family), dtype=torch.float32).eval()
    before = {name: matrix(module).clone() for name, module in linears(model).items()}
    data = calibration_data.select([1, 2, 4, 5])  # without padding
    step = mask_step(RIA, TWO_OF_FOUR)
    wanted = {module: Wanted(name) for module, name in layers_of(model).items()}
    with rehearsed(calls_of(model, torch.tensor(data["input_ids"]).unbind()), Pruning(wanted, Calibration(), step)):
        during = {name: matrix(module).clone() for name, module in linears(model).items()}
    assert all(torch.equal(before[name], matrix(module)) for name, module in linears(model).items())
    recipe = [CRePEModifier(mask_structure="2:4", **RIA.of_score)]
    expected = run(load(tiny_model_folder(family)), recipe, data, batch_size=1)
    for name, module in linears(expected).items():
        assert torch.equal(during[name], matrix(module)), name


@pytest.mark.parametrize(("family", "window"), [("mistral", None), ("mistral", 4), ("mixtral", None), ("phi3", None)])
def test_a_rehearsal_has_the_attention_masks_of_the_model(calibration_data, tmp_path, family, window):
    """Also where the model chooses among functions that make masks: what layers are given, when nothing is pruned."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    save_model(AutoConfig.for_model(family, **sizes, **heads, sliding_window=window, initializer_range=0.2), tmp_path)
    model = load(tmp_path).eval()
    sequences = torch.tensor(calibration_data["input_ids"])[[1, 2, 4]]
    found = {}
    wanted = {module: Wanted(name) for module, name in layers_of(model).items()}
    look = Pruning(wanted, Calibration(), lambda layer: found.update({layer.module: layer.statistics.norm}))
    with rehearsed(calls_of(model, sequences.unbind()), look):
        pass
    with input_statistics(wanted) as expected, torch.no_grad():
        model(input_ids=sequences)
    assert found.keys() == wanted.keys()
    for module, statistics in expected.items():
        torch.testing.assert_close(found[module], statistics.norm, rtol=1e-4, atol=1e-5)


def test_pruning_by_statistics_of_a_rehearsal_is_the_rehearsal_s(tiny_model_folder, calibration_data):
    """With the coefficients of the rehearsal that they are from, masks are the same; else statistics are the same."""
    model = load(tiny_model_folder("llama"))
    sequences = torch.tensor(calibration_data["input_ids"])[[1, 2, 4]].unbind()
    dense = {name: matrix(module).clone() for name, module in linears(model).items()}
    wanted = {module: Wanted(name, gram=True) for module, name in layers_of(model).items()}
    pruning, statistics = Pruning(wanted, Calibration(), mask_step(RIA, TWO_OF_FOUR)), {}
    with rehearsed(calls_of(model, sequences), remembering(pruning, statistics)):
        rehearsal = {name: matrix(module).clone() for name, module in linears(model).items()}
    assert statistics.keys() == wanted.keys()
    assert all(found.gram is None for found in statistics.values())
    for coefficients in (RIA, WANDA):
        step = mask_step(coefficients, TWO_OF_FOUR)
        with pruned(statistics, Pruning(wanted, Calibration(), step)):
            for module, name in layers_of(model).items():
                keep = step.mask(name, step.scores(name, dense[name], statistics[module]))
                assert torch.equal(matrix(module), dense[name] * keep)
                assert coefficients != RIA or torch.equal(matrix(module), rehearsal[name])
    assert all(torch.equal(dense[name], matrix(module)) for name, module in linears(model).items())


def test_models_are_restored_when_a_measurement_fails(tiny_model_folder):
    model = load(tiny_model_folder("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {module: Wanted(name) for module, name in layers_of(model).items()}
    pruning = Pruning(wanted, Calibration(), mask_step(RIA, TWO_OF_FOUR))
    with pytest.raises(KeyboardInterrupt), rehearsed(calls_of(model, [torch.arange(3, 20)]), pruning):
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_input_statistics_are_those_of_what_is_run_meanwhile(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    data = calibration_data.select([1, 2, 4])
    expected = inputs_of(model, data)
    layers = layers_of(model)
    unreached = torch.nn.Linear(3, 3)
    wanted = {module: Wanted(name) for module, name in layers.items()} | {unreached: Wanted("unreached")}
    with input_statistics(wanted) as found, torch.no_grad():
        for ids in data["input_ids"]:
            model(input_ids=torch.tensor([ids]))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 19)[None])
    assert found.keys() == layers.keys()
    for module, name in layers.items():
        assert torch.allclose(found[module].norm, expected[name].norm(dim=0).float(), rtol=1e-5)
