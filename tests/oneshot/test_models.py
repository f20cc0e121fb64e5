"""Models that `oneshot` is given by name: loaded whole, or refused."""

import pytest
import torch
from llmcompressor import oneshot
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from modifier_helpers import SMALL, linears, load, save


def by_name(folder, data, recipe="crepe_2of4"):
    words = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")) if folder.exists() else None
    return oneshot(model=str(folder), recipe=recipe, dataset=data, processor=words, num_calibration_samples=8)


def test_a_wrong_recipe_is_told_before_the_model_is_looked_for(tmp_path, calibration_data):
    with pytest.raises(ValueError, match="no recipe 'crepe_2of5'"):
        by_name(tmp_path / "no model", calibration_data, "crepe_2of5")


def test_weights_that_are_not_there_are_not_made_up(tiny_model_folder, calibration_data, tmp_path):
    folder = save(load(tiny_model_folder("llama")), tmp_path / "model", tiny_model_folder("llama"))
    assert any(bool((module.weight == 0).any()) for module in linears(by_name(folder, calibration_data)).values())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight, which would get random values"):
        by_name(folder, calibration_data)


def test_no_part_of_a_model_is_left_behind(tiny_model_folder, calibration_data, tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    seeing = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config={**SMALL, "model_type": "llama"})
    )
    model = by_name(save(seeing, tmp_path / "seeing", tiny_model_folder("llama")), calibration_data)
    assert type(model) is LlavaForConditionalGeneration
    half = {n: bool((m.weight == 0).float().mean() > 0.4) for n, m in linears(model).items()}
    assert len(half) > 14 and all(pruned == ("language_model" in name) for name, pruned in half.items())

    sizes = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(**sizes))
    folder = save(bart, tmp_path / "bart", tiny_model_folder("llama"))
    with pytest.raises(ValueError, match="load it with its own class, BartForConditionalGeneration, and give that to"):
        by_name(folder, calibration_data)
