import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.modifiers import CRePEModifier
from crepe_llm.pruning.block_pass import Calibration, Wanted
from crepe_llm.search.rehearsal import Pruning, input_norms, mask_step, pruned, rehearsed
from crepe_llm.search.space import RIA, Mask
from modifier_helpers import inputs_of, linears, load, matrix, run
from tiny_models import FAMILIES

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
    with rehearsed(model, torch.tensor(data["input_ids"]).unbind(), Pruning(wanted, Calibration(), step)):
        during = {name: matrix(module).clone() for name, module in linears(model).items()}
    assert all(torch.equal(before[name], matrix(module)) for name, module in linears(model).items())
    recipe = [CRePEModifier(mask_structure="2:4", **vars(RIA))]
    expected = run(load(tiny_model_folder(family)), recipe, data, batch_size=1)
    for name, module in linears(expected).items():
        assert torch.equal(during[name], matrix(module)), name


def test_pruning_by_cached_statistics_is_by_the_dense_model_s(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    inputs = inputs_of(model, calibration_data)
    norms = {module: inputs[name].norm(dim=0).float() for module, name in layers_of(model).items()}
    step = mask_step(RIA, TWO_OF_FOUR)
    dense = {name: matrix(module).clone() for name, module in linears(model).items()}
    with pruned(norms, RIA, TWO_OF_FOUR):
        for module, name in layers_of(model).items():
            statistics = InputStatistics(dense[name].shape[1])
            statistics.update(inputs[name])
            keep = step.mask(name, step.scores(name, dense[name], statistics))
            assert torch.equal(matrix(module), dense[name] * keep)
    assert all(torch.equal(dense[name], matrix(module)) for name, module in linears(model).items())


def test_models_are_restored_when_a_measurement_fails(tiny_model_folder):
    model = load(tiny_model_folder("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {module: Wanted(name) for module, name in layers_of(model).items()}
    pruning = Pruning(wanted, Calibration(), mask_step(RIA, TWO_OF_FOUR))
    with pytest.raises(KeyboardInterrupt), rehearsed(model, [torch.arange(3, 20)], pruning):
        assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_input_norms_are_those_of_what_is_run_meanwhile(tiny_model_folder, calibration_data):
    model = load(tiny_model_folder("llama"))
    data = calibration_data.select([1, 2, 4])
    expected = inputs_of(model, data)
    layers = layers_of(model)
    unreached = torch.nn.Linear(3, 3)
    with input_norms([*layers, unreached]) as norms, torch.no_grad():
        for ids in data["input_ids"]:
            model(input_ids=torch.tensor([ids]))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 19)[None])
    assert norms.keys() == layers.keys()
    for module, name in layers.items():
        assert torch.allclose(norms[module], expected[name].norm(dim=0).float(), rtol=1e-5)
