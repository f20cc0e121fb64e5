"""Which model is the dense one that a pruned model was made of."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.models.parent import check_config, check_embeddings
from tiny_models import configs


def model_of():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs()["llama"]())


def changed(change):
    """A model with other embeddings, and the one that they were made from."""
    model, parent = model_of(), model_of()
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.copy_(change(weight))
    return model, parent


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight,
        lambda weight: weight[:, torch.randperm(weight.shape[1])],
        lambda weight: weight.bfloat16().float(),
        lambda weight: (weight / weight.abs().max() * 7).round() / 7 * weight.abs().max(),  # 4 bits
    ],
)
def test_permuted_and_rounded_embeddings_are_those_of_the_parent(change):
    check_embeddings(*changed(change), "model", "teacher=dense")


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: 0.02 * torch.randn(weight.shape),
        lambda weight: weight[torch.randperm(len(weight))],  # tokens, not channels
        lambda weight: torch.full_like(weight, float("nan")),
    ],
)
def test_other_embeddings_are_a_strangers(change):
    with pytest.raises(ValueError, match="teacher=dense is not the parent of model"):
        check_embeddings(*changed(change), "model", "teacher=dense")


def test_the_config_tells_strangers_apart():
    llama, opt, qwen2 = (configs()[family]() for family in ("llama", "opt", "qwen2"))
    check_config(llama, configs(intermediate_size=96)["llama"](), "model", "--dense other")  # cut by CFSP
    for other in (opt, qwen2):
        with pytest.raises(ValueError, match="--dense other is not the parent of model: its model_type is"):
            check_config(llama, other, "model", "--dense other")
