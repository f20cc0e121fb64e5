"""A model that is calibrated block by block has the attention that it has otherwise."""

import pytest
import torch
from transformers import AutoConfig

from crepe_llm.models.blocks import find_blocks
from modifier_helpers import crepe, load, run
from tiny_models import save_model

SIZES = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0},
}


@pytest.mark.parametrize(
    ("family", "window"), [("mistral", None), ("mistral", 4), ("mixtral", None), ("phi3", None), ("qwen3_moe", 4)]
)
def test_blocks_give_in_the_calibration_what_they_give_in_the_model(family, window, calibration_data, tmp_path):
    config = AutoConfig.for_model(family, **SIZES, sliding_window=window, initializer_range=0.2)
    save_model(config, tmp_path)
    model = load(tmp_path).eval()
    ids, mask = (torch.tensor(calibration_data[name])[:4] for name in ("input_ids", "attention_mask"))
    given = []
    first = next(iter(find_blocks(model).values()))
    first.register_forward_hook(lambda module, args, out: given.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    wanted = given.pop().clone()
    run(model, [crepe(uncalibrated="dense")], calibration_data)
    found = next(out for out in given if out.shape == wanted.shape)
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
