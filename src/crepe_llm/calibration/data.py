"""Calibration data: what a modifier is given, and what can be known to fail before any time is spent."""

from collections.abc import Iterator
from typing import Any, cast

import pyarrow.compute
import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import get_execution_device
from datasets import Dataset
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from llmcompressor.pytorch.utils.helpers import tensors_to_device
from llmcompressor.utils import calibration_forward_context
from loguru import logger

from crepe_llm import processes
from crepe_llm.models.generation import repair_generation_config
from crepe_llm.models.tokens import check_positions, check_vocabulary

__all__ = [
    "calibration_data",
    "first_tokens",
    "mend_generation_config",
    "uncalled_layers",
]

# What batches of text alone may have.
_TEXT = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels", "loss_mask"}
# Enough for every layer to be called, whatever the text.
_FIRST_TOKENS = 8


def calibration_data(modifier: Modifier | None, state: State, checked: bool, **kwargs: Any) -> Any:
    """The data that the calibration will iterate; None if there is none.

    Args:
        modifier: the modifier that needs it; None where none does.
        state: the state of the run.
        checked: whether another modifier has checked it against the model.
        kwargs: what the modifier was initialized with.

    Raises:
        ValueError: if it is needed and there is none, it can be read only once, the processes of this job have not
            found each other, the model cannot take these tokens, or transformers would refuse to save it.
    """
    processes.require_group()
    # Not state.data.calib if there is another: that is a deep copy of the loader that the pipelines iterate.
    data = kwargs.get("calib_data")
    data = state.data.calib if data is None else data
    if data is None and modifier is not None:
        raise ValueError(
            f"{type(modifier).__name__} needs calibration data, and was given none: pass `dataset=` to oneshot (a "
            "name, or a tokenized datasets.Dataset), or `calib_data=` to state.update"
        )
    if isinstance(data, Iterator):
        raise ValueError(
            f"calib_data is of the class {type(data).__name__}, which can be read once, and is read to be checked, "
            "too: give a torch DataLoader or a list of batches"
        )
    if not checked and hasattr(state.model, "get_decoder"):
        mend_generation_config(state.model)
        if data is not None:
            _check_tokens(state.model, data)
    return data


def mend_generation_config(model: Any) -> None:
    """Mend a generation config that transformers would refuse to save, and say how.

    Raises:
        ValueError: if it cannot be mended.
    """
    changes = repair_generation_config(model)
    if changes:
        logger.warning(
            f"generation_config.json is one that transformers loads but refuses to save; it is saved with {changes}"
        )


@torch.no_grad()
def uncalled_layers(model: torch.nn.Module, data: Any) -> set[torch.nn.Module]:
    """The modules with weight matrices that calibration will not reach, such as a vision tower's where all is text.

    Found by running the first few tokens. Experts are left out of account, as these tokens may be routed to others.

    Raises:
        ValueError: if the model cannot be run on what the data holds.
    """
    with disable_onloading():
        matrices = {module for name, module in model.named_modules() if _has_matrix(module) and "expert" not in name}
    uncalled = set(matrices)
    handles = [m.register_forward_pre_hook(lambda module, args: uncalled.discard(module)) for m in matrices]
    batch = first_tokens(data)
    try:
        with calibration_forward_context(model), HooksMixin.disable_hooks():
            model(**cast(dict[str, Any], tensors_to_device(batch, get_execution_device(model))))
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be run on a batch of the calibration data, which holds {', '.join(batch)}: "
            f"{' '.join(str(error).split())[:300]}; give rows with all that the model takes, such as a processor makes "
            "of images or sounds"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return uncalled


def first_tokens(data: Any) -> dict[str, Any]:
    """The first batch of calibration data; of text only the first few tokens of the first row."""
    with torch.random.fork_rng(devices=[]):
        first: Any = next(iter(data), {})
    if not hasattr(first, "keys"):
        raise ValueError(
            f"a batch of the calibration data is of the class {type(first).__name__}: batches are dictionaries of what "
            "the model takes, such as {'input_ids': ...}"
        )
    batch = dict(first)
    if not batch:
        raise ValueError("the calibration data has no batch")
    if batch.keys() <= _TEXT:
        batch = {name: value[:1, :_FIRST_TOKENS] if value.dim() == 2 else value for name, value in batch.items()}
    return batch


def _has_matrix(module: torch.nn.Module) -> bool:
    shape = getattr(module._parameters.get("weight"), "shape", ())
    return len(shape) == 2 and not isinstance(module, torch.nn.Embedding)


def _check_tokens(model: Any, data: Any) -> None:
    """Raise ValueError if calibration data, where it is text, is more than the model can be given, or cannot be told
    from padding."""
    with torch.random.fork_rng(devices=[]):
        if getattr(model.config, "is_encoder_decoder", False):
            _refuse_padding(data)
        found = list(_extents(data))
    if found:
        lengths, lowest, highest = zip(*found, strict=True)
        check_positions(model, max(lengths))
        check_vocabulary(model, min(lowest), max(highest))


def _refuse_padding(data: Any) -> None:
    """Raise ValueError if rows for an encoder and a decoder are padded: which of the two a layer's tokens are of is not
    known, so that one's padding would be taken for the other's."""
    for number, batch in enumerate(data):
        for name in ("attention_mask", "decoder_attention_mask"):
            mask = batch.get(name) if hasattr(batch, "get") else None
            if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not bool(mask.all()):
                raise ValueError(
                    f"{name} of batch {number} of the calibration data has padding, which is not left out of the "
                    "layers of a model with an encoder and a decoder: give rows without it, such as one a batch"
                )


def _extents(data: Any) -> Iterator[tuple[int, int, int]]:
    """Length, lowest and highest token id of batches of text; of a data set those of all rows, as any may be drawn."""
    dataset = getattr(data, "dataset", None)
    if not isinstance(dataset, Dataset) or not set(dataset.column_names) <= _TEXT:
        for number, batch in enumerate(data):
            ids = batch.get("input_ids") if hasattr(batch, "keys") and batch.keys() <= _TEXT else None
            if ids is None:
                continue
            if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
                kind = str(ids.dtype) if isinstance(ids, torch.Tensor) else type(ids).__name__
                raise ValueError(
                    f"input_ids of batch {number} of the calibration data are {kind}: give tensors of whole numbers, "
                    "[batch, length]"
                )
            if not ids.numel():
                raise ValueError(f"batch {number} of the calibration data has no token: leave empty rows out")
            yield ids.shape[-1], int(ids.min()), int(ids.max())
        return
    column = _ids_column(dataset)
    length = getattr(data.collate_fn, "max_seq_length", None)
    if length is not None:
        column = pyarrow.compute.list_slice(column, 0, length)
    ids = pyarrow.compute.min_max(pyarrow.compute.list_flatten(column)).as_py()
    if ids["min"] is not None:
        yield pyarrow.compute.max(pyarrow.compute.list_value_length(column)).as_py(), ids["min"], ids["max"]


def _ids_column(dataset: Dataset) -> Any:
    return dataset.with_format("arrow")[:]["input_ids"]
