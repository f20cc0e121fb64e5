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
