"""The data that `oneshot` is given, and how much of it: what can be known to be wrong before it is tokenized."""

from typing import Any

import pyarrow.compute
import pyarrow.types
from compressed_tensors.registry.registry import standardize_lookup_name
from datasets import Dataset, DatasetDict
from llmcompressor.pipelines.registry import CalibrationPipeline
from llmcompressor.transformers.data import TextGenerationDataset
from torch.utils.data import DataLoader

__all__ = ["check_arguments"]

_COUNTS = ("num_calibration_samples", "max_seq_length", "batch_size")


def check_arguments(arguments: Any, processor: Any) -> None:
    """Raise ValueError if the calibration data cannot be read, or no row or token of them is asked for.

    Args:
        arguments: llm-compressor's arguments of the data.
        processor: the model's tokenizer or processor.
    """
    for name in _COUNTS:
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    _check_name("pipeline", arguments.pipeline, CalibrationPipeline)
    data = arguments.dataset
    if isinstance(data, str):
        _check_name("dataset", data, TextGenerationDataset, ", or what datasets.load_dataset reads")
    if data is None or isinstance(data, str | DataLoader):
        return
    if not isinstance(data, Dataset | DatasetDict):
        raise ValueError(
            f"dataset is of the class {type(data).__name__}: give a datasets.Dataset, such as "
            "datasets.Dataset.from_list([{'text': ...}, ...]), the name of a data set, or a torch DataLoader of batches"
        )
    for rows in data.values() if isinstance(data, DatasetDict) else [data]:
        if not len(rows):
            raise ValueError("the calibration data set has no rows")
        if not isinstance(arguments.data_collator, str) or callable(arguments.preprocessing_func):
            continue  # what the user's function makes of the rows is not known
        if "input_ids" in rows.column_names:
            _check_ids(rows)
        elif arguments.preprocessing_func is None:
            _check_text(rows, arguments.text_column, processor)


def _check_name(field: str, name: str | None, registry: Any, otherwise: str = "") -> None:
    """Raise ValueError if a name is in no registry of llm-compressor, which takes it with `-` or `_`, in any case."""
    known = [*registry.registered_names(), *registry.registered_aliases()]
    if name is not None and standardize_lookup_name(name) not in map(standardize_lookup_name, known):
        raise ValueError(f"{field}={name!r} is unknown: give one of {', '.join(sorted(known))}{otherwise}")


def _check_ids(rows: Dataset) -> None:
    """Raise ValueError if token ids are not lists of integers, or masks are not as long."""
    table = rows.with_format("arrow")[:]
    ids = table["input_ids"]
    if not _is_list(ids.type) or not pyarrow.types.is_integer(ids.type.value_type):
        raise ValueError(f"the column input_ids of the calibration data holds {ids.type}, not lists of integers")
    _check_no_null("input_ids", ids)
    if "attention_mask" in rows.column_names and _is_list(table["attention_mask"].type):
        masks = table["attention_mask"]
        _check_no_null("attention_mask", masks)
        lengths = [pyarrow.compute.list_value_length(column).to_pylist() for column in (ids, masks)]
        for row, (tokens, entries) in enumerate(zip(*lengths, strict=True)):
            if tokens != entries:
                raise ValueError(
                    f"row {row} of the calibration data has {tokens} input_ids and {entries} entries of "
                    "attention_mask: give as many, or leave the mask out"
                )


def _check_text(rows: Dataset, text_column: str, processor: Any) -> None:
    """Raise ValueError if no column is one that a tokenizer takes, or the text is none."""
    taken = {"text", text_column, *getattr(processor, "model_input_names", ())}
    if not taken.intersection(rows.column_names):
        raise ValueError(
            f"the calibration data set has the columns {', '.join(rows.column_names) or 'none'}, and no column `text`: "
            "name the one that holds the text (text_column=...)"
        )
    name = next((name for name in ("text", text_column) if name in rows.column_names), None)
    if name is None:
        return
    column = rows.with_format("arrow")[:][name]
    if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
        raise ValueError(f"the column {name} of the calibration data holds {column.type}, not texts")
    _check_no_null(name, column)


def _check_no_null(name: str, column: Any) -> None:
    if column.null_count:
        row = pyarrow.compute.index(pyarrow.compute.is_null(column), True).as_py()
        raise ValueError(f"row {row} of the calibration data has no {name} (None): leave such rows out")


def _is_list(kind: Any) -> bool:
    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
