"""Embeddings and output heads in INT8: transformers gets them expanded, as it looks rows up in plain weights only."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from crepe_llm.checkpoints.formats import FormatError
from crepe_llm.checkpoints.reading import INTEGER_CODES, Checkpoint

__all__ = ["ExpandPacked", "expanding", "holds_embedding", "packed_embeddings"]

_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_DTYPES = {"weight_packed": (INTEGER_CODES,), "weight_scale": ("F32", "F16", "BF16"), "weight_shape": ("I64", "I32")}


class ExpandPacked(ConversionOps):
    """transformers' conversion of a ``pack-quantized`` weight in INT8 with a scale a row into a plain weight."""

    def convert(  # type: ignore[override]  # narrower: one tensor a target, as transformers' own operations return
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Expand one weight, in the dtype that the model was asked for.

        Raises ValueError, naming the weight, if its parts do not belong together.
        """
        # Imports transformers' models, which are being imported when this package registers itself.
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        packed, scale, shape = (input_dict[pattern][0] for pattern in source_patterns)
        parameter = model.get_parameter(full_layer_name)
        if packed.is_meta:  # the headers are being compared with the model
            return {target_patterns[0]: torch.empty_like(parameter, device="meta")}
        if shape.tolist() != list(parameter.shape):
            raise ValueError(
                f"{full_layer_name}: weight_shape is {shape.tolist()}, the model has {list(parameter.shape)} there: "
                "export the model again"
            )
        values = unpack_from_int32(packed, 8, parameter.shape)
        return {target_patterns[0]: (values.to(scale.dtype) * scale).to(parameter.dtype)}


def packed_embeddings(model: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """A model's embeddings and output head that a checkpoint holds in ``pack-quantized`` form, and their names there.

    Raises FormatError if it holds only some parts of one, or parts of other shapes than the model's INT8 rows need.
    """
    head, found = model.get_output_embeddings(), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) or module is head:
            stored = _stored_name(name, model.base_model_prefix, checkpoint)
            missing = [f"{stored}.{part}" for part in _PARTS if f"{stored}.{part}" not in checkpoint.tensors]
            if not missing:
                _check_shapes(stored, module.weight, checkpoint)
                found[name] = stored
            elif len(missing) < len(_PARTS) and f"{stored}.weight" not in checkpoint.tensors:
                raise FormatError(
                    f"{checkpoint.files[0].parent}: tensor {missing[0]} is missing; export the model again"
                )
    return found


def holds_embedding(model: Any, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds an embedding of a model in ``pack-quantized`` form.

    transformers reads that of linear layers, such as a head, and of no others.
    """
    return any(
        f"{_stored_name(name, model.base_model_prefix, checkpoint)}.weight_packed" in checkpoint.tensors
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    )


def _stored_name(name: str, prefix: str, checkpoint: Checkpoint) -> str:
    """What a checkpoint calls a module: a model's body may be read from the whole model's files, and the other way."""
    names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    stored = {one for one in names for part in _PARTS if f"{one}.{part}" in checkpoint.tensors}
    return next((one for one in names if one in stored), name)


def expanding(names: Mapping[str, str]) -> list[WeightConverter]:
    """The conversions that expand layers, by their names in the model, called so in the files.

    transformers adds or takes away the prefix of a model's body, by which the two may differ.
    """
    own = [min(pair, key=len) for pair in names.items()]
    return [
        WeightConverter([f"{name}.{part}$" for part in _PARTS], [f"{name}.weight"], operations=[ExpandPacked()])
        for name in own
    ]


def _check_shapes(name: str, weight: torch.Tensor, checkpoint: Checkpoint) -> None:
    rows, columns = weight.shape
    for part, shape in zip(_PARTS, ((rows, -(-columns // 4)), (rows, 1), (2,)), strict=True):
        found = checkpoint.tensors[f"{name}.{part}"]
        if found.dtype not in _DTYPES[part]:
            raise FormatError(
                f"{found.file}: tensor {name}.{part} is {found.dtype}, not {' or '.join(_DTYPES[part])}: export the "
                "model again"
            )
        if found.shape != shape:
            raise FormatError(
                f"{found.file}: tensor {name}.{part} is {list(found.shape)}, and INT8 rows of the model's {rows} x "
                f"{columns} need {list(shape)}; embeddings and heads are read as INT8 with a scale a row: export the "
                "model again"
            )
