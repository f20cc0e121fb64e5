"""What is kept of a dense model's predictions, and the text that it writes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.training.targets import Whole
from crepe_llm.training.teacher import Teacher, keep_predictions, sample_windows
from tiny_models import VOCABULARY, configs, letters_tokenizer


def model_of(family="llama", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(configs()[family]())


def ids(count=3, length=12):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_held_out_windows_are_predicted_once(family, monkeypatch):
    teacher = Teacher(model_of(family), first_held_out=2)
    asked = []
    hidden = Teacher._hidden
    monkeypatch.setattr(Teacher, "_hidden", lambda self, ids: asked.append(len(ids)) or hidden(self, ids))
    windows = ids()
    for _ in range(2):
        teacher(windows[:2], torch.tensor([0, 1]))
        predictions = teacher(windows[2:], torch.tensor([2]))
    assert asked == [2, 1, 2]
    logits = torch.nn.functional.linear(predictions.hidden, predictions.weight, predictions.bias)
    with torch.no_grad():
        expected = teacher.model(input_ids=windows[2:]).logits[0, :-1]
    torch.testing.assert_close(logits, expected)


def test_what_is_kept_of_predictions_is_their_top_and_read_back(tmp_path):
    teacher, windows = Teacher(model_of(), 99), ids()
    predictions = keep_predictions(teacher, windows, 4, tmp_path / "teacher.safetensors")
    made = (tmp_path / "teacher.safetensors").stat().st_mtime_ns
    again = keep_predictions(teacher, windows, 4, tmp_path / "teacher.safetensors")
    assert (tmp_path / "teacher.safetensors").stat().st_mtime_ns == made
    index = torch.tensor([2, 0])
    with torch.no_grad():
        log_p = torch.log_softmax(teacher.model(input_ids=windows[index]).logits[:, :-1].flatten(0, 1), 1)
    for found in (predictions(windows[index], index), again(windows[index], index)):
        top = log_p.topk(4, 1)
        torch.testing.assert_close(found.log_p.float(), top.values, rtol=1e-3, atol=5e-3)
        torch.testing.assert_close(log_p.gather(1, found.tokens.long()), top.values)
    assert isinstance(teacher(windows, torch.arange(3)), Whole)


def test_the_teacher_writes_windows_that_begin_as_texts_do(tmp_path):
    model = model_of()
    found = sample_windows(model, letters_tokenizer(True), 100, 16, 0, tmp_path / "a.safetensors")
    assert found.shape == (6, 16) and found.dtype == torch.int64 and (found[:, 0] == 0).all()
    assert (found[:, 1:] != model.config.eos_token_id).all()  # no text ends
    same = sample_windows(model, letters_tokenizer(True), 100, 16, 0, tmp_path / "b.safetensors")
    other = sample_windows(model, letters_tokenizer(True), 100, 16, 1, tmp_path / "c.safetensors")
    assert torch.equal(found, same) and not torch.equal(found, other)
    free = sample_windows(model, letters_tokenizer(False), 320, 16, 0, tmp_path / "d.safetensors")
    assert len(free[:, 0].unique()) > 5


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.1, "top_k": 3, "top_p": 0.5, "repetition_penalty": 9.0},
        {"min_p": 0.99},
        {"typical_p": 0.1},
        {"epsilon_cutoff": 0.02},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [*range(3, 90)]},
        {"forced_bos_token_id": 5},
        {"num_beams": 2},
    ],
)
def test_the_teacher_writes_by_its_predictions_alone(settings, tmp_path):
    model, tokenizer = model_of(), letters_tokenizer(True)
    plain = sample_windows(model, tokenizer, 40 * 16, 16, 0, tmp_path / "plain.safetensors")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    found = sample_windows(model, tokenizer, 40 * 16, 16, 0, tmp_path / "other.safetensors")
    assert torch.equal(found, plain) and model.generation_config.to_dict() == before


def test_the_end_of_a_text_is_known_from_config_and_tokenizer(tmp_path):
    model, tokenizer = model_of(), letters_tokenizer(True)
    tokenizer.eos_token = "e"
    model.generation_config.eos_token_id = [1, 50]
    found = sample_windows(model, tokenizer, 400 * 16, 16, 0, tmp_path / "a.safetensors")[:, 1:]
    drawn = set(found.flatten().tolist())
    assert tokenizer.eos_token_id not in drawn and not drawn & {1, 50} and len(drawn) > 80


def test_an_interrupted_teacher_goes_on_writing(tmp_path, monkeypatch):
    model, tokenizer, path = model_of(), letters_tokenizer(True), tmp_path / "a.safetensors"
    whole = sample_windows(model, tokenizer, 80 * 16, 16, 5, tmp_path / "whole.safetensors")
    generate, asked = model.generate, []

    def interrupted(ids, **options):
        asked.append(len(ids))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return generate(ids, **options)

    monkeypatch.setattr(model, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample_windows(model, tokenizer, 80 * 16, 16, 5, path)
    assert torch.equal(sample_windows(model, tokenizer, 80 * 16, 16, 5, path), whole)
    assert asked == [32, 32, 32, 16]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "whole.safetensors"]
