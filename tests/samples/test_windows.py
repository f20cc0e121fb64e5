import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crepe_llm.samples.windows import calibration_windows, token_windows
from tiny_models import letters_tokenizer


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text("abc xyz", min_size=1, max_size=40), min_size=1, max_size=4),
    window=st.integers(2, 12),
    bos=st.booleans(),
)
def test_windows_are_the_text_cut_up(texts, window, bos):
    tokenizer = letters_tokenizer(bos)
    stream = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    step = window - bos
    if not "".join(texts).strip() or len(stream) < step:
        with pytest.raises(ValueError, match=r"empty|less than one window"):
            token_windows(tokenizer, texts, window)
        return
    windows = token_windows(tokenizer, texts, window)
    assert windows.shape == (len(stream) // step, window)
    assert not bos or (windows[:, 0] == 0).all()
    assert windows[:, bos:].flatten().tolist() == stream[: len(windows) * step]


def test_fewer_tokens_are_spread_over_the_text():
    tokenizer = letters_tokenizer(False)
    every = token_windows(tokenizer, ["abcdefgh" * 20], 5)
    some = token_windows(tokenizer, ["abcdefgh" * 20], 5, tokens=44)
    assert torch.equal(some, every[[0, 4, 8, 12, 16, 20, 24, 28]])
    assert len(token_windows(tokenizer, ["abcdefgh" * 20], 5, tokens=1)) == 1


def test_refusals_say_what_is_wrong():
    tokenizer = letters_tokenizer(False)
    with pytest.raises(ValueError, match="empty"):
        token_windows(tokenizer, [" ", "\n"], 8)
    with pytest.raises(ValueError, match="has 3 tokens, less than one window of 8"):
        token_windows(tokenizer, ["abc"], 8)
    with pytest.raises(ValueError, match="window is 1"):
        token_windows(tokenizer, ["abc"], 1)
    with pytest.raises(ValueError, match="tokens is 0"):
        token_windows(tokenizer, ["abc"], 2, tokens=0)


def test_calibration_windows_are_a_seeded_draw_without_replacement():
    tokenizer = letters_tokenizer(True)
    texts = ["".join(random.Random(i).choices("abcdefghij ", k=200)) for i in range(3)]
    every = {tuple(window) for window in token_windows(tokenizer, texts, 16).tolist()}
    drawn = calibration_windows(tokenizer, texts, windows=20, length=16, seed=3)
    rows = [tuple(ids) for ids in drawn["input_ids"]]
    assert len(set(rows)) == 20 and set(rows) <= every
    assert drawn["attention_mask"] == [[1] * 16] * 20
    again = calibration_windows(tokenizer, texts, windows=20, length=16, seed=3)
    other = calibration_windows(tokenizer, texts, windows=20, length=16, seed=4)
    assert again["input_ids"] == drawn["input_ids"] != other["input_ids"]
    with pytest.raises(ValueError, match=r"1000 calibration windows of 16 tokens .* hold 40"):
        calibration_windows(tokenizer, texts, windows=1000, length=16, seed=3)
    with pytest.raises(ValueError, match="windows is 0"):
        calibration_windows(tokenizer, texts, windows=0, length=16, seed=3)
