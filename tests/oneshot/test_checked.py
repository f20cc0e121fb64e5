"""What oneshot is refused before any calibration."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modifier_helpers import run


def test_a_folder_that_lacks_a_tensor_is_refused(tiny_model_folder, calibration_data, tmp_path):
    folder = shutil.copytree(tiny_model_folder("llama"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(folder)  # is content
    with pytest.raises(ValueError, match=f"the weights of {folder} lack {lost}, which would get random values"):
        run(str(folder), "crepe_2of4", calibration_data)


def test_a_whole_folder_is_pruned_by_its_name(tiny_model_folder, calibration_data, tmp_path):
    run(str(tiny_model_folder("llama")), "crepe_2of4", calibration_data, output_dir=str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (model.model.layers[0].mlp.up_proj.weight.view(-1, 4).count_nonzero(dim=1) == 2).all()


def test_a_folder_that_holds_a_model_is_refused_before_the_work(tiny_model_folder, calibration_data, tmp_path):
    taken = shutil.copytree(tiny_model_folder("llama"), tmp_path / "taken")
    model = AutoModelForCausalLM.from_pretrained(taken)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FileExistsError, match=f"{taken} already holds a model: name another folder"):
        run(model, "crepe_2of4", calibration_data, output_dir=str(taken))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not (tmp_path / "taken-1").exists()


@pytest.mark.parametrize("part", [False, True])
def test_a_compiled_model_is_refused(part, tiny_model_folder, calibration_data):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    message = "the model is compiled by torch.compile: give the model that is not"
    if part:
        model.model.layers[1].compile()
        message = "the part model.layers.1 of the model is compiled"
    with pytest.raises(ValueError, match=message):
        run(model if part else torch.compile(model), "crepe_2of4", calibration_data)


@pytest.mark.parametrize("recipe", ["crepe_2of4_w4a16", "crepe_2of4_w4a16_gptq"])
def test_layers_narrower_than_a_group_are_refused_before_the_work(recipe, tiny_model_folder, calibration_data):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj \(columns=32, group_size=64\)"):
        run(model, recipe, calibration_data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)
