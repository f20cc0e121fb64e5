"""Rows of text as oneshot tokenizes them: empty ones left out, short ones joined."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler
from transformers import AutoTokenizer

from crepe_llm.calibration.windows import full_windows
from modifier_helpers import load, run
from tiny_models import letters_tokenizer


class Collate:
    """What oneshot's own collator says of itself."""

    def __init__(self, max_seq_length):
        self.max_seq_length = max_seq_length

    def __call__(self, rows):
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def loader_of(rows, length, count=None, **columns):
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], **columns})
    sampler = RandomSampler(dataset, num_samples=count or len(rows))
    return DataLoader(dataset, sampler=sampler, collate_fn=Collate(length))


def windows_of(loader):
    return [batch["input_ids"][0].tolist() for batch in loader]


def numbers(*lengths):
    """Rows of consecutive numbers from 3 on."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [list(range(3 + start, 3 + end)) for start, end in pairwise(ends)]


def test_short_rows_are_joined_and_empty_ones_counted(messages):
    rows = numbers(0, 5, 3, 0, 7, 8)
    loader = full_windows(loader_of(rows, 8), letters_tokenizer(False))
    windows = windows_of(loader)
    assert windows == windows_of(loader), "every epoch has the same windows"
    assert [len(window) for window in windows] == [8, 8]
    assert rows[-1] in windows, "a row that is long enough stays as it is"
    (joined,) = [window for window in windows if window != rows[-1]]
    assert set(joined) < {number for row in rows[:-1] for number in row}
    assert any("2 of 6 rows of the calibration data are empty" in line for line in messages)
    assert any("joined to 2 windows of 8, though 6 were asked for" in line for line in messages)


def test_windows_begin_as_rows_do():
    rows = [[0, *row] for row in numbers(3, 4, 5, 4)]
    windows = windows_of(full_windows(loader_of(rows, 6), letters_tokenizer(True)))
    assert len(windows) == 3 and all(window[0] == 0 and 0 not in window[1:] for window in windows)


def test_what_needs_no_mending_is_left_alone():
    for loader in (
        loader_of(numbers(8, 9), 8),  # long enough
        loader_of(numbers(5, 9), None),  # no length was asked for
        loader_of(numbers(5, 9), 8, pixel_values=[[1.0], [2.0]]),  # more than text
        [{"input_ids": torch.ones(1, 4)}],
        DataLoader([1, 2]),
    ):
        assert full_windows(loader, letters_tokenizer(False)) is loader


def test_padded_rows_are_not_joined():
    dataset = Dataset.from_dict({"input_ids": [[3, 4, 0], [5, 6, 7], []], "attention_mask": [[1, 1, 0], [1, 1, 1], []]})
    loader = full_windows(DataLoader(dataset, collate_fn=Collate(8)), letters_tokenizer(False))
    assert windows_of(loader) == [[3, 4, 0], [5, 6, 7]]


def test_rows_of_padding_or_of_a_beginning_alone_are_empty(messages):
    rows = {"input_ids": [[3, 4], [2, 2], [5, 2]], "attention_mask": [[1, 1], [0, 0], [1, 0]]}
    loader = DataLoader(Dataset.from_dict(rows), collate_fn=Collate(8))
    assert windows_of(full_windows(loader, letters_tokenizer(False))) == [[3, 4], [5, 2]]
    assert windows_of(full_windows(loader_of([[0], [3, 4], [0], [5]], None), letters_tokenizer(True))) in (
        [[3, 4], [5]], [[5], [3, 4]],
    )  # fmt: skip
    assert any("1 of 3 rows" in line for line in messages) and any("2 of 4 rows" in line for line in messages)


def test_no_more_than_the_tokenizer_says_that_the_model_takes():
    tokenizer = letters_tokenizer(False)
    tokenizer.model_max_length = 6
    assert [len(w) for w in windows_of(full_windows(loader_of(numbers(4, 4, 4), 100), tokenizer))] == [6, 6]


def test_less_than_a_window_is_one_window():
    assert windows_of(full_windows(loader_of(numbers(2, 0, 1), 8), letters_tokenizer(False))) in (
        [[3, 4, 5]], [[5, 3, 4]],
    )  # fmt: skip


def test_no_text_at_all_is_refused():
    with pytest.raises(ValueError, match="has no token: all its 3 rows are empty"):
        full_windows(loader_of([[], [], []], 8), letters_tokenizer(False))


@pytest.mark.parametrize(
    "options", [{}, {"batch_size": 4}, {"shuffle_calibration_samples": True}, {"pipeline": "basic"}]
)
def test_oneshot_on_text_with_empty_rows(options, tiny_model_folder, messages):
    folder = tiny_model_folder("llama")
    text = Dataset.from_dict({"text": ["", " ".join(f"w{number}" for number in range(3, 33)), "w9 w8 w7", ""] * 6})
    kwargs = {"processor": AutoTokenizer.from_pretrained(folder), "max_seq_length": 16, "num_calibration_samples": 8}
    run(load(folder), "crepe_2of4", text, **{**kwargs, **options})
    assert any("12 of 24 rows of the calibration data are empty" in line for line in messages)
