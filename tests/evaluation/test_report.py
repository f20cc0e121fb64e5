"""What a report measures of a model."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from crepe_llm.evaluation.report import PROMPTS, measure
from tiny_models import letters_tokenizer


def test_completions_are_greedy_whatever_the_models_settings():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, eos_token_id=95
    )
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), letters_tokenizer(True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # away from the uniform distribution
    settings = model.generation_config
    settings.repetition_penalty, settings.num_beams, settings.temperature = 3.0, 4, 0.5
    said = measure("x", model, tokenizer, torch.arange(32).view(2, 16), "numbers", None).completions
    for prompt, text in zip(PROMPTS, said, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        length = ids.shape[1]
        for _ in range(32):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert text == tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    assert model.generation_config is settings and settings.num_beams == 4
