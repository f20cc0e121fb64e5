import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
)

from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.models import losses as module

VOCABULARY = 96
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=64),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        intermediate_size=32,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=0.5,
        max_position_embeddings=64,
    ),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt": OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=64),
    # Granite divides its logits, which the slices know nothing of: the whole logits must be used.
    "granite": GraniteConfig(
        **SMALL, intermediate_size=32, num_key_value_heads=1, logits_scaling=4.0, max_position_embeddings=64
    ),
}


def small_model(family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # away from the uniform distribution, where every mistake looks right
    return model


def naive_nll(model, windows):
    """One forward pass per predicted token."""
    total = 0.0
    for window in windows:
        for position in range(1, len(window)):
            logits = model(input_ids=window[None, :position], use_cache=False).logits[0, -1].double()
            total -= torch.log_softmax(logits, dim=0)[window[position]].item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_agrees_with_a_naive_loop(family, monkeypatch):
    model = small_model(family)
    windows = torch.randint(VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = naive_nll(model, windows)
    for slice_numel in (1 << 25, 5 * VOCABULARY, 1):  # one slice, slices with a rest, a position each
        monkeypatch.setattr(module, "_SLICE_NUMEL", slice_numel)
        result = perplexity(model, windows, corpus="random ids", progress=False)
        assert result.nll == pytest.approx(expected, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert abs(expected - math.log(VOCABULARY)) > 0.01
    assert (result.tokens, result.windows, result.window) == (3 * 23, 3, 24)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_logits_exist_in_slices_only(family, monkeypatch):
    model = small_model(family)
    monkeypatch.setattr(module, "_SLICE_NUMEL", 4 * VOCABULARY)
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda m, i, output: rows.append(output[..., 0].numel()))
    perplexity(model, torch.zeros(1, 33, dtype=torch.int64), corpus="zeros", progress=False)
    assert max(rows) == 4 and sum(rows[-8:]) == 32


def test_bfloat16_takes_log_sum_exp_in_fp32():
    model = small_model("llama").bfloat16()
    windows = torch.randint(VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=windows, use_cache=False).logits[0, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits, windows[0, 1:]).item()
    result = perplexity(model, windows, corpus="random ids", progress=False)
    assert result.nll == pytest.approx(expected, rel=1e-5)
    assert result.dtype == "bfloat16"


def test_training_state_is_restored_and_dropout_is_off():
    model = small_model("gpt2").train()
    windows = torch.arange(40).view(1, 40)
    first, second = (perplexity(model, windows, corpus="ids", progress=False).nll for _ in range(2))
    assert model.training and first == second


def test_a_result_names_every_condition():
    result = perplexity(small_model("llama"), torch.arange(20).view(2, 10), corpus="counting", progress=False)
    assert result.corpus == "counting" and result.window == 10 and result.tokens == 18
    assert result.dtype == "float32"
    assert "counting" in str(result) and "windows of 10" in str(result)


def test_refusals_say_what_is_wrong():
    model = small_model("llama")
    with pytest.raises(ValueError, match="65 tokens exceeds the model's context of 64"):
        perplexity(model, torch.zeros(1, 65, dtype=torch.int64), corpus="")
    with pytest.raises(ValueError, match=f"token id {VOCABULARY} is outside"):
        perplexity(model, torch.full((1, 4), VOCABULARY), corpus="")
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        perplexity(model, torch.zeros(4, dtype=torch.int64), corpus="")
    roberta = AutoModelForCausalLM.from_config(
        RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=18, is_decoder=True)
    )
    with pytest.raises(ValueError, match="17 tokens exceeds the model's context of 16"):  # 2 are no position's
        perplexity(roberta, torch.full((1, 17), 5), corpus="")
    assert perplexity(roberta, torch.full((1, 16), 5), corpus="", progress=False).tokens == 15
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="window 0 has NaN"):
        perplexity(model, torch.zeros(1, 4, dtype=torch.int64), corpus="", progress=False)
