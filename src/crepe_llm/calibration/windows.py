"""Calibration rows as windows: empty rows left out, short ones joined up to the length that was asked for."""

from collections.abc import Iterator
from typing import Any

import numpy
import pyarrow.compute
import torch
from datasets import Dataset
from loguru import logger
from torch.utils.data import DataLoader, RandomSampler

__all__ = ["full_windows", "loader_like"]

_JOINED = ("input_ids", "attention_mask")


def full_windows(loader: Any, tokenizer: Any) -> Any:
    """A loader of token windows in the place of one whose rows are empty or shorter than was asked for.

    Each window but those of a row that is long enough holds the tokens of several rows, in the order in which they are
    drawn. It begins with the beginning-of-sequence token if rows do. Rows with padding, or with more than text, are
    not joined. A loader that has nothing to mend is returned as it is.

    Raises:
        ValueError: if no row has a token.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return loader
    rows, count = _Rows(dataset, getattr(tokenizer, "bos_token_id", None)), len(loader.sampler)
    empty = int((rows.text == 0).sum())
    if empty == len(rows.text):
        raise ValueError(f"the calibration data has no token: all its {empty} rows are empty")
    length = _asked_for(loader, tokenizer)
    short = length is not None and bool((rows.lengths < length).any()) and rows.can_join
    if not (empty or short):
        return loader
    drawn = isinstance(loader.sampler, RandomSampler)
    order = torch.randperm(len(dataset)).numpy() if drawn else numpy.arange(len(dataset))
    order = order[rows.text[order] > 0]
    if empty:
        logger.warning(f"{empty} of {len(dataset)} rows of the calibration data are empty and left out")
    if not short:
        return loader_like(loader, dataset.select(order[:count].tolist()))
    assert length is not None
    windows = _joined((dataset[row]["input_ids"] for row in order.tolist()), length, count, tokenizer)
    logger.warning(
        f"calibration rows of {rows.lengths[order].mean():.0f} tokens on average are joined to "
        f"{len(windows)} windows of {len(windows[0])}{f', though {count} were asked for' * (len(windows) < count)}"
    )
    return loader_like(loader, Dataset.from_dict({name: _column(name, windows) for name in _JOINED}))


class _Rows:
    """The rows of a tokenized data set.

    Attributes:
        lengths: tokens of each row, int64 [rows].
        text: those of them that are neither padding nor the beginning-of-sequence token alone, int64 [rows].
        can_join: whether rows are nothing but tokens without padding.
    """

    def __init__(self, dataset: Dataset, bos: int | None) -> None:
        table = dataset.with_format("arrow")[:]
        ids = table["input_ids"]
        self.lengths = numpy.asarray(pyarrow.compute.list_value_length(ids), dtype=numpy.int64)
        ends = self.lengths.cumsum()
        self.text = self.lengths.copy()
        if "attention_mask" in dataset.column_names:
            mask = numpy.asarray(pyarrow.compute.list_flatten(table["attention_mask"]), dtype=numpy.int64)
            sums = numpy.concatenate([[0], mask.cumsum()])
            self.text = sums[ends] - sums[ends - self.lengths]
        self.can_join = set(dataset.column_names) <= set(_JOINED) and bool((self.text == self.lengths).all())
        if bos is not None:
            flat = numpy.asarray(pyarrow.compute.list_flatten(ids))
            single = self.lengths == 1
            self.text[single] = flat[ends[single] - 1] != bos


def _asked_for(loader: DataLoader[Any], tokenizer: Any) -> int | None:
    """The tokens a row that were asked for, as far as the tokenizer says that the model takes them; None if none."""
    asked = getattr(loader.collate_fn, "max_seq_length", None)
    return None if asked is None else min(asked, getattr(tokenizer, "model_max_length", asked))


def _joined(rows: Iterator[list[int]], length: int, count: int, tokenizer: Any) -> list[list[int]]:
    """At most `count` windows of `length` tokens of these rows; if they have less than that, one window of all."""
    bos = getattr(tokenizer, "bos_token_id", None)
    windows: list[list[int]] = []
    rest: list[int] = []
    for row in rows:
        if len(row) >= length:
            windows.append(row[:length])
        else:
            begins = row[:1] == [bos]
            rest += row[begins:]
            prefix = row[:begins]
            step = length - len(prefix)
            while len(rest) >= step:
                windows.append(prefix + rest[:step])
                rest = rest[step:]
        if len(windows) >= count:
            break
    return windows[:count] or [rest]


def _column(name: str, windows: list[list[int]]) -> list[list[int]]:
    return windows if name == "input_ids" else [[1] * len(window) for window in windows]


def loader_like(loader: DataLoader[Any], dataset: Dataset, kind: type[DataLoader[Any]] = DataLoader) -> DataLoader[Any]:
    """A loader of all rows of a data set, in their order, that is otherwise like another; of a class that is one."""
    return kind(
        dataset,  # type: ignore[arg-type]
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
    )
