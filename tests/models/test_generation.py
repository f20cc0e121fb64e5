import json

import pytest
from transformers import AutoModelForCausalLM

from crepe_llm.models.generation import repair_generation_config


def model_with(folder, settings, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "saved"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"early_stopping": True, "num_beams": 1}, {"early_stopping": None, "num_beams": 1}),
        ({"pad_token_id": -1, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6, "pad_token_id": None}),
        ({"output_scores": True}, {"output_scores": None}),
    ],
)
def test_what_transformers_refuses_to_save_is_mended(settings, saved, tiny_model_folder, tmp_path):
    model = model_with(tiny_model_folder("llama"), settings, tmp_path)
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path / "refused")
    assert repair_generation_config(model)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: written.get(name) for name in saved} == saved
    assert repair_generation_config(model) == ""


def test_what_can_be_saved_stays(tiny_model_folder, tmp_path):
    model = model_with(tiny_model_folder("llama"), {"do_sample": True, "temperature": 0.6}, tmp_path)
    before = model.generation_config.to_dict()
    assert repair_generation_config(model) == "" and model.generation_config.to_dict() == before


def test_what_cannot_be_mended_is_refused_by_the_files_name(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"))
    model.generation_config.streamer = "no field of a generation config"
    with pytest.raises(ValueError, match=r"generation_config\.json is invalid.*streamer"):
        repair_generation_config(model)
