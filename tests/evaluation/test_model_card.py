"""What model cards count and quote."""

import torch

from crepe_llm.evaluation.model_card import LayerZeros, linear_zeros, total_zeros


def test_zeros_of_layers_and_of_one_without_entries():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(8, 0))
    with torch.no_grad():
        model[0].weight.fill_(1)[:, :2] = 0
    layers = linear_zeros(model)
    assert layers == [LayerZeros("0", (4, 8), 0.25), LayerZeros("1", (0, 8), 0.0)]
    assert total_zeros(layers) == 0.25
