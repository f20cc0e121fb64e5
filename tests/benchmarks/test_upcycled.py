"""The benchmark of experts' statistics: the mixture is the dense model, and ways are compared as they are said to."""

import torch

import upcycled
from modifier_helpers import load


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
