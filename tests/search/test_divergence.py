import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.search.divergence import Divergence, cut_windows


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_the_divergence_is_the_kl_of_all_logits(tiny_model_folder, family):
    """The vocabulary is smaller than what is kept of it, so nothing is lost but half precision's digits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder(family), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, 95, (length,), generator=generator) for length in (20, 9)]

    def logits(window):
        with torch.no_grad():
            return torch.log_softmax(model(input_ids=window[None]).logits[0, :-1].double(), dim=1)

    dense = [logits(window) for window in windows]
    divergence = Divergence(model, windows)
    assert divergence.tokens == (19, 8)
    assert divergence(0) == pytest.approx(0, abs=2e-2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    for number, window in enumerate(windows):
        now = logits(window)
        expected = (dense[number].exp() * (dense[number] - now)).sum().item()
        assert expected > 0.5
        assert divergence(number) == pytest.approx(expected, rel=5e-3, abs=2e-2)


def test_predictions_that_are_not_finite_are_refused(tiny_model_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder("llama"), dtype=torch.float32).eval()
    divergence = Divergence(model, [torch.arange(3, 20)])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        divergence(0)
    with pytest.raises(ValueError, match="no window"):
        Divergence(model, [])


def test_windows_leave_out_short_rests():
    sequences = [torch.arange(length) for length in (1300, 512, 5, 1, 550)]
    windows = cut_windows(sequences, 512)
    assert [len(window) for window in windows] == [512, 512, 276, 512, 5, 512]
    assert windows[1][0] == 512
