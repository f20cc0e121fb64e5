"""Random models have the tensors of published checkpoints, which transformers reads."""

import pytest
from transformers import AutoModelForCausalLM

from crepe_llm.evaluation.random_models import shapes_of, write_random_model
from vllm_runs import granite_moe, mixtral, qwen2_moe

MLP, MOE = "model.layers.0.mlp", "model.layers.0.block_sparse_moe"


@pytest.mark.parametrize(
    ("make", "experts"),
    [
        (mixtral, {f"{MOE}.experts.3.w2.weight": (128, 212), f"{MOE}.gate.weight": (4, 128)}),
        (qwen2_moe, {f"{MLP}.experts.3.up_proj.weight": (64, 128), f"{MLP}.shared_expert.up_proj.weight": (64, 128)}),
        (granite_moe, {f"{MOE}.input_linear.weight": (4, 128, 128)}),
    ],
)
def test_names_are_those_of_published_checkpoints(make, experts, tmp_path):
    config = make()
    assert experts.items() <= shapes_of(config).items()
    folder = write_random_model(config, tmp_path, sparse=True)
    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
