"""SparsityAllocationModifier through llm-compressor's own oneshot, against numbers computed from captured inputs."""

from pathlib import Path

import pytest
import torch
from llmcompressor.modifiers.pruning import WandaPruningModifier
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from crepe_llm.modifiers import (
    CRePEModifier,
    SparsityAllocationModifier,
)
from modifier_helpers import linears, load, run

RECIPES = Path(__file__).parent.parent / "recipes"
METHODS = ["owl", "alphapruning", "dlp", "atp", "uniform"]
BLOCKS = 11


def allocation(method="owl", sparsity=0.7, **fields):
    return SparsityAllocationModifier(method=method, sparsity=sparsity, **fields)


def crepe(**fields):
    return CRePEModifier(**{"comparison_group": "matrix", **fields})


def wanda(**fields):
    return WandaPruningModifier(**{"sparsity": None, "targets": ["Linear"], "ignore": ["re:.*lm_head"], **fields})


@pytest.fixture(scope="module")
def deep_folder(tiny_model_folder, tmp_path_factory):
    """Eleven blocks, so that layers.1 and layers.10 are different names that begin alike, with weights that grow."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for block, layer in enumerate(model.model.layers):
        for module in linears(layer).values():
            weight = module.weight.data
            weight *= torch.rand(weight.shape).pow(block % 4) * (1 + 0.1 * block)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_model_folder("llama")).save_pretrained(folder)
    return folder


def block_of(name):
    parts = name.split(".")
    return ".".join(parts[: next(place for place, part in enumerate(parts) if part.isdecimal()) + 1])


def by_block(model):
    """The layers of each block: block's name to the layers' names and modules."""
    blocks = {}
    for name, module in linears(model).items():
        blocks.setdefault(block_of(name), {})[name] = module
    return blocks


def realised(model):
    """Fraction of zeros of each block, and of all blocks."""
    zeros = {
        block: (
            sum(int((m.weight == 0).sum()) for m in layers.values()),
            sum(m.weight.numel() for m in layers.values()),
        )
        for block, layers in by_block(model).items()
    }
    total = [sum(numbers) for numbers in zip(*zeros.values(), strict=True)]
    return {block: zero / size for block, (zero, size) in zeros.items()}, total[0] / total[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_pruned_to_the_target_and_blocks_as_found(method, deep_folder, calibration_data, tmp_path):
    modifier = allocation(method)
    run(load(deep_folder), [modifier, crepe()], calibration_data, output_dir=str(tmp_path / "out"))
    blocks, everything = realised(load(tmp_path / "out"))
    # Each of the 77 matrices has less than one weight too few pruned.
    assert everything == pytest.approx(0.7, abs=77 / (BLOCKS * 7680)) and everything <= 0.7
    assert blocks.keys() == modifier.found.keys()
    for block, fraction in blocks.items():
        assert fraction == pytest.approx(modifier.found[block], abs=7 / 7680), block
    assert (len(set(modifier.found.values())) == 1) == (method == "uniform")
