"""Calibration data that cannot be read is refused with its column or row, before anything is done."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from llmcompressor import oneshot
from torch.utils.data import DataLoader

from modifier_helpers import linears, load, refused, run

IDS = [[5, 6, 7, 8, 9, 10, 11, 12]] * 8
ROWS = {
    "list": (["the text"], r"dataset is of the class list: give a datasets\.Dataset"),
    "dict": ({"input_ids": IDS}, "dataset is of the class dict"),
    "tensor": (torch.ones(8, 16, dtype=torch.int64), "dataset is of the class Tensor"),
    "stream": (Dataset.from_dict({"input_ids": IDS}).to_iterable_dataset(), "of the class IterableDataset"),
    "no rows": (Dataset.from_dict({"input_ids": []}), "the calibration data set has no rows"),
    "no columns": (Dataset.from_dict({"label": [1] * 8}), r"has the columns label, and no column `text`.*text_column="),
    "floats": (Dataset.from_dict({"input_ids": [[5.0, 6.0]] * 8}), "input_ids of .* holds .*double.*, not lists"),
    "texts as ids": (Dataset.from_dict({"input_ids": ["w5 w6"] * 8}), "input_ids of .* holds string, not lists"),
    "one list": (Dataset.from_dict({"input_ids": [5, 6, 7]}), "input_ids of .* holds int.*, not lists"),
    "no ids": (Dataset.from_dict({"input_ids": [[5, 6], None]}), "row 1 of the calibration data has no input_ids"),
    "short mask": (
        Dataset.from_dict({"input_ids": IDS, "attention_mask": [[1] * 8] * 7 + [[1] * 3]}),
        "row 7 of the calibration data has 8 input_ids and 3 entries of attention_mask",
    ),
    "lists of texts": (Dataset.from_dict({"text": [["w5", "w6"]] * 8}), "column text of .* holds list.*, not texts"),
    "no text": (Dataset.from_dict({"text": ["w5 w6", None]}), r"row 1 of the calibration data has no text \(None\)"),
    "a part": (DatasetDict(train=Dataset.from_dict({"text": ["w5", None]})), r"row 1 of .* has no text"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_data_that_cannot_be_read_are_refused(name, tiny_model_folder):
    data, message = ROWS[name]
    options = {"dataset": data, "num_calibration_samples": 8}
    with pytest.raises(ValueError, match=message):
        oneshot(model=load(tiny_model_folder("llama")), recipe="crepe_2of4", **options)


@pytest.mark.parametrize("field", ["num_calibration_samples", "max_seq_length", "batch_size"])
@pytest.mark.parametrize("value", [0, -3])
def test_counts_start_at_one(field, value, tiny_model_folder, calibration_data):
    message = f"{field}={value} must be at least 1"
    refused(load(tiny_model_folder("llama")), "crepe_2of4", calibration_data, message, **{field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "dataset",
            "a/folder",
            r"dataset='a/folder' is unknown: give one of .*c4.* what datasets\.load_dataset reads",
        ),
        ("pipeline", "layerwise", "pipeline='layerwise' is unknown: give one of .*sequential"),
    ],
)
def test_unknown_names_are_told(field, value, message, tiny_model_folder, calibration_data):
    options = {"dataset": calibration_data, "num_calibration_samples": 8} | {field: value}
    with pytest.raises(ValueError, match=message):
        oneshot(model=load(tiny_model_folder("llama")), recipe="crepe_2of4", **options)


def test_what_can_be_read_is_read(tiny_model_folder):
    """Other columns, another name of the text, a split of several, a loader, a collator of the user's own."""
    texts = [" ".join(f"w{3 + (7 * row + place) % 90}" for place in range(24)) for row in range(8)]
    named = Dataset.from_dict({"content": texts, "id": list(range(8))})
    folder = tiny_model_folder("llama")
    for data, options in (
        (named, {"text_column": "content"}),
        (
            DatasetDict(
                train=Dataset.from_dict({"text": texts}),
                test=named.select_columns("content").rename_column("content", "text"),
            ),
            {},
        ),
        (DataLoader([{"input_ids": torch.tensor(IDS[0])}] * 8, batch_size=2), {}),
        (
            Dataset.from_dict({"input_ids": [[float(token) for token in row] for row in IDS]}),
            {"data_collator": lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows]).long()}},
        ),
    ):
        model = run(load(folder), "crepe_2of4", data, num_calibration_samples=8, max_seq_length=16, **options)
        assert all(float((module.weight == 0).float().mean()) == 0.5 for module in linears(model).values())
