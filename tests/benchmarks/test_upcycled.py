"""The benchmark of experts' statistics: the mixture is the dense model, and tokens count as they are said to."""

import torch
from transformers import AutoModelForCausalLM

import upcycled
from crepe_llm.pruning.layer import recorded_masks
from modifier_helpers import crepe, load, run


def test_an_upcycled_model_gives_what_the_dense_one_gives(tiny_model_folder):
    dense = load(tiny_model_folder("llama"))
    windows = torch.arange(3, 35).view(2, 16)
    mixture = upcycled.upcycled(dense, windows, 3)
    torch.testing.assert_close(mixture(windows).logits, dense(windows).logits, rtol=1e-4, atol=1e-5)
    before = mixture.state_dict()["model.layers.0.mlp.experts.down_proj"].clone()
    losses = upcycled.train(mixture, windows.repeat(4, 1), 2, 5e-2)
    assert losses[-1] < losses[0]
    assert not torch.equal(mixture.model.layers[0].mlp.experts.down_proj, before)
    assert upcycled._apart(mixture.model.layers[0].mlp.experts.down_proj) > 0


def masks(folder, data, way=None):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe = [crepe(uncalibrated="dense", ignore=["lm_head", "re:.*gate$"])]
    if way is None:
        run(model, recipe, data, moe_calibrate_all_experts=False)
    else:
        with upcycled.counting(*upcycled.WAYS[way]):
            run(model, recipe, data, moe_calibrate_all_experts=True)
    return recorded_masks(model)


def test_tokens_that_do_not_count_change_no_mask(tiny_model_folder, calibration_data):
    """Without padding, which experts that only run on their own tokens cannot tell."""
    calibration_data = calibration_data.remove_columns("attention_mask")
    folder = tiny_model_folder("mixtral")
    expected, routed, every = (masks(folder, calibration_data, way) for way in (None, "routed", "all"))
    experts = [name for name in expected if ".experts." in name and "layers.0" in name]
    assert experts and all(torch.equal(routed[name], expected[name]) for name in experts)
    assert any(not torch.equal(every[name], expected[name]) for name in experts)


def test_ways_are_compared_window_by_window():
    made = {"protocol": upcycled.PROTOCOL, "windows": 8, "tokens": 1024}
    rows = [{"protocol": upcycled.PROTOCOL, "tokens": 1024, "way": "dense", "perplexity": 2.0}]
    for seed, shift in ((0, 0.0), (1, 5.0)):  # what a seed adds to all ways alike is no difference
        for way, losses in (("routed", [1.0, 2.0, 3.0]), ("all", [1.5, 2.5, 3.8 + seed])):
            rows.append(made | {"way": way, "seed": seed, "perplexity": 7.0, "losses": [one + shift for one in losses]})
    told = upcycled.report(rows)
    assert "| dense | 2.00 | 2.00 |" in told and "| all | 7.00 | 7.00 |" in told
    assert "all less routed, seed 0: +0.6000 +- 0.1000 nats over 3 windows" in told
    assert "all less routed, 2 seeds: +0.7667 +- 0.1667 nats" in told
    assert "shrunk less routed" not in told
