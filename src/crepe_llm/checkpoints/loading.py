"""Loading of checkpoints with packed layers by transformers.

transformers knows compressed-tensors checkpoints by `quant_method` and hands them to one quantizer class. `register`
puts a subclass in its place that behaves as its parent until the files hold packed layers; those it unpacks through
transformers' own weight conversions while they are read.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from crepe_llm.checkpoints.formats import FORMATS, CheckpointFormat, FormatError
from crepe_llm.checkpoints.reading import Checkpoint, read_files

__all__ = ["Sparse24HfQuantizer", "Unpack", "register"]


def register() -> None:
    """Make transformers load checkpoints with packed layers. Idempotent."""
    AUTO_QUANTIZER_MAPPING["compressed-tensors"] = Sparse24HfQuantizer


class Unpack(ConversionOps):
    """transformers' conversion of the parts of a layer packed in `form` into `P.weight`."""

    def __init__(self, form: CheckpointFormat) -> None:
        self.form = form

    def convert(  # type: ignore[override]  # narrower: one tensor a target, as transformers' own operations return
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Unpack one layer; a floating-point weight is cast to the dtype that the model was asked for.

        Raises FormatError, naming the weight, if its parts are malformed or do not have the model's shape.
        """
        parts = {part: input_dict[pattern][0] for part, pattern in zip(self.form.parts, source_patterns, strict=True)}
        parameter = model.get_parameter(full_layer_name)
        try:
            weight = self.form.unpack(parts)
            if weight.shape != parameter.shape:
                raise FormatError(f"has shape {tuple(weight.shape)}, the model's is {tuple(parameter.shape)}")
            if weight.element_size() == 1 and weight.dtype != parameter.dtype:
                raise FormatError(f"is stored as {weight.dtype}, which config.json does not give this layer")
        except FormatError as error:
            raise FormatError(f"{full_layer_name}: {error}") from None
        return {target_patterns[0]: weight if weight.element_size() == 1 else weight.to(parameter.dtype)}


class Sparse24HfQuantizer(CompressedTensorsHfQuantizer):
    """transformers' compressed-tensors quantizer, which also reads packed layers.

    A sparse-only checkpoint becomes an ordinary model with the zeros in place; with quantization on top, the model is
    the one that the same checkpoint with plain weights would give.
    """

    _packed: Checkpoint | None = None

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        files = [Path(file) for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        if _any_packed(files):
            folders = {os.path.abspath(file.parent) for file in files}
            if len(folders) > 1:
                raise FormatError(f"the index names files outside the checkpoint's folder: {sorted(folders)}")
            self._packed = read_files(files)
            # transformers turns an error inside a conversion into a line of a report; here it is raised as it is.
            self._packed.check_patterns()
        if self._packed is None or self.compressor.quantization_config is not None:
            super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        if self._packed is None:
            return super().update_weight_conversions(weight_conversions)
        # The parent looks for the quantization scheme of merged experts, which a sparse-only checkpoint has none of.
        quantized = self.compressor.quantization_config is not None
        conversions = super().update_weight_conversions(weight_conversions) if quantized else weight_conversions
        unpacking = [
            WeightConverter([rf"\.{part}$" for part in form.parts], [".weight"], operations=[Unpack(form)])
            for form in FORMATS.values()
        ]
        return [*conversions, *unpacking]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._packed is not None:
            # Left there, it would be reverted on saving, and a plain model would be written half packed.
            model._weight_conversions = [
                conversion
                for conversion in model._weight_conversions
                if not any(isinstance(op, Unpack) for op in getattr(conversion, "operations", ()))
            ]
        super()._process_model_after_weight_loading(model, **kwargs)


def _any_packed(files: Sequence[Path]) -> bool:
    """Whether one of the files names a tensor as a part of a packed layer; only their headers are read."""
    marks = tuple(f".{part}" for form in FORMATS.values() for part in (form.values, form.pattern))
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                if any(name.endswith(marks) for name in file.keys()):  # noqa: SIM118
                    return True
        except Exception as error:
            raise FormatError(f"{path}: not a readable safetensors file: {error}") from error
    return False
