import pytest
import torch

from crepe_llm.models.blocks import block_of, find_blocks, kind_of
from tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_by_the_names_that_their_modules_have(family, tiny_model_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family))
    blocks = find_blocks(model)
    assert list(blocks) == [name for name in dict.fromkeys(block_of(name) for name, _ in model.named_modules()) if name]
    for name, block in blocks.items():
        assert model.get_submodule(name) is block
        assert {block_of(f"{name}.{inner}") for inner, _ in block.named_modules() if inner} == {name}
    assert len({kind_of(name) for name in blocks}) == 1


def test_blocks_of_a_language_model_within_a_model_and_beside_other_lists():
    import transformers as t

    small = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "pad_token_id": 2, "layer_types": ["full_attention"] * 3, "num_hidden_layers": 3,
    }  # fmt: skip
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    text = {**small, "num_local_experts": 2, "intermediate_size_mlp": 48}
    llama4 = t.Llama4ForConditionalGeneration(t.Llama4Config(text_config=text, vision_config=vision))
    assert list(find_blocks(llama4)) == [f"language_model.model.layers.{block}" for block in range(3)]
    assert list(find_blocks(llama4.language_model)) == [f"model.layers.{block}" for block in range(3)]
    altup = {"altup_num_inputs": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
    gemma3n = t.Gemma3nForCausalLM(
        t.Gemma3nTextConfig(
            **{**small, "intermediate_size": [48] * 3}, **altup, laurel_rank=4, num_kv_shared_layers=0,
            activation_sparsity_pattern=[0.0] * 3,
        )
    )  # fmt: skip
    assert list(find_blocks(gemma3n)) == [f"model.layers.{block}" for block in range(3)]


def test_a_decoder_without_one_list_of_blocks_is_refused():
    class Model(torch.nn.Module):
        def __init__(self, lists):
            super().__init__()
            self.lists = torch.nn.ModuleList(torch.nn.ModuleList([torch.nn.Linear(1, 1)]) for _ in range(lists))

        def get_decoder(self):
            return self.lists

    assert list(find_blocks(Model(1))) == ["lists.0.0"]
    for lists in (0, 2):
        with pytest.raises(ValueError, match=f"Model has {lists} lists of decoder blocks"):
            find_blocks(Model(lists))


@pytest.mark.parametrize(
    ("name", "block", "kind"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3", "model.layers.*.mlp.up_proj"),
        ("model.layers.3.mlp.experts.12.w1", "model.layers.3", "model.layers.*.mlp.experts.*.w1"),
        ("model.decoder.layers.0.fc2", "model.decoder.layers.0", "model.decoder.layers.*.fc2"),
        ("transformer.h.11", "transformer.h.11", "transformer.h.*"),
        ("lm_head", "", "lm_head"),
    ],
)
def test_names_tell_the_block_and_the_kind(name, block, kind):
    assert block_of(name) == block
    assert kind_of(name) == kind
