"""The class that loads the whole of a model."""

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BartConfig,
    BertConfig,
    Gemma3Config,
    Llama4Config,
    LlamaConfig,
    Qwen2AudioConfig,
    Qwen2VLConfig,
    ViTConfig,
    WhisperConfig,
)

from crepe_llm.models.classes import auto_class


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (LlamaConfig(architectures=["LlamaForCausalLM"]), AutoModelForCausalLM),
        (LlamaConfig(architectures=["LlamaModel"]), AutoModelForCausalLM),
        (LlamaConfig(), AutoModelForCausalLM),
        (BertConfig(architectures=["BertForMaskedLM"]), AutoModelForCausalLM),
        (BartConfig(architectures=["BartForCausalLM"]), AutoModelForCausalLM),
        (Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]), AutoModelForCausalLM),
        (Llama4Config(architectures=["Llama4ForConditionalGeneration"]), AutoModelForMultimodalLM),
        (Llama4Config(architectures=["Llama4ForCausalLM"]), AutoModelForCausalLM),
        (Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]), AutoModelForMultimodalLM),
        (Qwen2AudioConfig(), AutoModelForMultimodalLM),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_no_part_is_left_out(config, kind):
    assert auto_class(config) is kind


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BartConfig(architectures=["BartForConditionalGeneration"]), "type bart has an encoder and a decoder"),
        (WhisperConfig(), "type whisper has an encoder and a decoder"),
        (ViTConfig(), r"no causal language model of type vit \(ViTConfig\): give a model that predicts"),
    ],
)
def test_what_a_text_does_not_run_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        auto_class(config)
