"""What the tests of modifiers share: running a recipe on a tiny model, and looking at what it did from outside."""

import pytest
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm.modifiers import CRePEModifier
from tiny_models import VOCABULARY

# Where each part of a tiny Llama or Qwen2 lives, to see that modifiers reach weights that are not in memory.
OFFLOADED = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}

# Fields of a small model of any family.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def save(model, folder, tokenizer_folder):
    """The folder, with the model and a tokenizer from another folder in it."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


def load(folder, dtype=torch.float32, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def run(model, recipe, data, **kwargs):
    """The model itself, after a recipe was applied to it."""
    defaults = {"num_calibration_samples": len(data), "shuffle_calibration_samples": False, "batch_size": 4}
    oneshot(model=model, recipe=recipe, dataset=data, **{**defaults, **kwargs})
    return model


def crepe(**fields):
    return CRePEModifier(**{"mask_structure": "2:4", **fields})


def linears(model):
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and not name.endswith("lm_head")
    }


def matrix(module):
    """The weight as [d_out, d_in]."""
    weight = module.weight.detach()
    return weight.T if type(module).__name__ == "Conv1D" else weight


def output_norms(module, x):
    """fp64 [tokens, 1] of inputs [tokens, d_in]: dividing inputs by these makes errors of outputs relative ones."""
    bias = 0 if module.bias is None else module.bias.detach().double()
    return (x @ matrix(module).double().T + bias).norm(dim=1, keepdim=True)


def refused(model, recipe, data, message, **kwargs):
    """The recipe is refused with the message, and no weight has changed."""
    before = {name: module.weight.clone() for name, module in linears(model).items()}
    with pytest.raises(ValueError, match=message):
        run(model, recipe, data, **kwargs)
    assert all(torch.equal(before[name], module.weight) for name, module in linears(model).items())


def inputs_of(model, data):
    """fp64 [tokens, d_in] for each linear layer, padding left out."""
    inputs, handles, mask = {}, [], torch.tensor(data["attention_mask"])

    def hook(name):
        def capture(module, args):
            inputs[name] = args[0].detach().double().reshape(-1, args[0].shape[-1])[mask.reshape(-1).bool()]

        return capture

    for name, module in linears(model).items():
        handles.append(module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        model(input_ids=torch.tensor(data["input_ids"]), attention_mask=mask)
    for handle in handles:
        handle.remove()
    return inputs
