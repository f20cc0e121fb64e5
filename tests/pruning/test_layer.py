"""A mask goes with its layer from the step that makes it to the file, and zeros do not decide it."""

import pytest
import torch
from llmcompressor.modifiers.quantization import QuantizationModifier

from crepe_llm.checkpoints import read_folder
from crepe_llm.functional.bitmask import unpack_bits
from crepe_llm.modifiers import ADMMModifier, DSnoTModifier, MaskedGPTQModifier, WeightCorrectionModifier
from crepe_llm.pruning.layer import mask_of, record_mask, recorded_masks
from modifier_helpers import crepe, linears, load, run
from tiny_models import FAMILIES

NAME = "model.layers.0.self_attn.q_proj"


def with_zeros(folder):
    """The tiny model, in one layer of which two channels of every four are zero from the start."""
    model = load(folder)
    with torch.no_grad():
        model.get_submodule(NAME).weight.view(-1, 4)[:, :2] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("later", [[], [WeightCorrectionModifier], [DSnoTModifier], [ADMMModifier]])
def test_every_pruned_layer_has_the_mask_that_its_weight_obeys(family, later, tiny_model_folder, calibration_data):
    model = run(load(tiny_model_folder(family)), [crepe(), *(kind() for kind in later)], calibration_data)
    for name, module in linears(model).items():
        keep = mask_of(module)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        assert not bool(weight[~keep].any()), name
        assert bool((keep.view(-1, 4).sum(1) == 2).all()), name


def test_a_kept_weight_that_is_zero_stays_kept(tiny_model_folder, calibration_data, tmp_path):
    """Three of every four are pruned in a weight with two zeros of four; one kept of two zeros is the mask's choice."""
    keeps = {}

    class Watched(type(crepe())):
        def mask(self, name, scores):
            # Keep what the scores would prune, so that kept weights are zeros.
            keeps[name] = ~super().mask(name, scores) if name == NAME else super().mask(name, scores)
            return keeps[name]

    model = run(
        with_zeros(tiny_model_folder("llama")),
        [Watched(mask_structure="2:4")],
        calibration_data,
        output_dir=str(tmp_path / "out"),
    )
    keep, weight = keeps[NAME], model.get_submodule(NAME).weight
    assert not bool(weight.any()), "all that is kept here is zero"
    assert torch.equal(mask_of(model.get_submodule(NAME)), keep)
    bitmask = read_folder(tmp_path / "out").load(f"{NAME}.bitmask")
    assert torch.equal(unpack_bits(bitmask, keep.shape[1]), keep)


def test_corrected_zeros_become_weights(tiny_model_folder, calibration_data):
    """What is kept is refitted also where it was zero."""
    keeps = {}

    class Watched(type(crepe())):
        def mask(self, name, scores):
            keeps[name] = ~super().mask(name, scores) if name == NAME else super().mask(name, scores)
            return keeps[name]

    recipe = [Watched(mask_structure="2:4"), WeightCorrectionModifier()]
    model = run(with_zeros(tiny_model_folder("llama")), recipe, calibration_data)
    weight = model.get_submodule(NAME).weight
    assert bool(weight[keeps[NAME]].any()) and not bool(weight[~keeps[NAME]].any())


@pytest.mark.parametrize("quantization", ["masked GPTQ", "nearest"])
def test_masks_outlive_quantization(quantization, tiny_model_folder, calibration_data):
    kind = MaskedGPTQModifier if quantization == "masked GPTQ" else QuantizationModifier
    recipe = [crepe(), kind(targets=["Linear"], scheme="W8A8", ignore=["lm_head"])]
    plain = run(load(tiny_model_folder("llama")), [crepe()], calibration_data)
    model = run(load(tiny_model_folder("llama")), recipe, calibration_data)
    for (name, module), other in zip(linears(model).items(), linears(plain).values(), strict=True):
        assert torch.equal(mask_of(module), mask_of(other)), name


def test_a_mask_that_no_longer_holds_gives_way_to_the_zeros():
    module = torch.nn.Linear(8, 4)
    keep = torch.zeros(4, 8, dtype=torch.bool)
    keep[:, ::2] = True
    module.weight.data *= keep
    record_mask(module, keep)
    assert torch.equal(mask_of(module), keep)
    module.weight.data[0, 1] = 1.0
    assert torch.equal(mask_of(module), module.weight != 0)


def test_recorded_masks_are_by_name_and_leave_the_state_alone():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 4))
    before = set(model.state_dict())
    keep = torch.rand(4, 8) < 0.5
    record_mask(model[0], keep)
    masks = recorded_masks(model)
    assert masks.keys() == {"0"} and torch.equal(unpack_bits(masks["0"], 8), keep)
    assert set(model.state_dict()) == before
