"""Loading of checkpoints with packed layers by transformers.

transformers knows compressed-tensors checkpoints by `quant_method` and hands them to one quantizer class. `register`
puts a subclass in its place that behaves as its parent until the files hold packed layers; those it unpacks through
transformers' own weight conversions while they are read. `register_refusal` makes an error of packed layers that no
quantizer is told of, which transformers would leave at random values.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

from crepe_llm.checkpoints.embeddings import ExpandPacked, expanding, holds_embedding, packed_embeddings
from crepe_llm.checkpoints.expert_conversions import (
    merging_experts,
    merging_llama4,
    names_of_whole,
    unpacking_experts,
    unpacking_fused,
)
from crepe_llm.checkpoints.experts import check_experts, expert_of, matrices_of
from crepe_llm.checkpoints.formats import FORMATS, SPARSE_24_BITMASK, CheckpointFormat, FormatError
from crepe_llm.checkpoints.linear_classes import quantize_derived_classes
from crepe_llm.checkpoints.llama4 import has_whole_experts
from crepe_llm.checkpoints.model_check import check_model
from crepe_llm.checkpoints.reading import (
    Checkpoint,
    check_unquantized,
    find_quantization,
    objects_in,
    read_config,
    read_files,
    tensor_names,
    why_unread,
)
from crepe_llm.functional.bitmask import RECORDED
from crepe_llm.versions import check_versions

__all__ = ["Sparse24HfQuantizer", "Unpack", "register", "register_refusal", "says_packed"]

# From 5.23 on transformers dequantizes while it reads; before, compressed modules that were read whole.
_DEQUANTIZES_WHILE_READING = "_process_model_after_weight_loading" not in vars(CompressedTensorsHfQuantizer)

# How tensors of quantized layers are called.
_QUANTIZED = (".weight_scale", ".weight_packed")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32)


def register() -> None:
    """Make transformers load checkpoints with packed layers. Idempotent."""
    AUTO_QUANTIZER_MAPPING["compressed-tensors"] = Sparse24HfQuantizer


def register_refusal() -> None:
    """Make transformers refuse packed layers in a folder whose config.json does not say so. Idempotent."""
    from transformers.modeling_utils import PreTrainedModel

    load = PreTrainedModel._load_pretrained_model
    if getattr(load, "_refuses_packed", False):
        return

    @functools.wraps(load)
    def checked(model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
        if state_dict is not None and any(name.rpartition(".")[2] == "bitmask" for name in state_dict):
            raise FormatError("state_dict holds packed 2:4 layers, which are unpacked from files only: give the folder")
        if state_dict is None and not isinstance(load_config.hf_quantizer, Sparse24HfQuantizer):
            files = [Path(file) for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
            _refuse_packed(files)
            own = (name for name, _ in [*model.named_parameters(), *model.named_buffers()])
            if load_config.hf_quantizer is None and not any(name.endswith(_QUANTIZED) for name in own):
                _refuse_quantized(files)
        return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    checked._refuses_packed = True  # type: ignore[attr-defined]
    PreTrainedModel._load_pretrained_model = staticmethod(checked)  # type: ignore[method-assign]


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

        Its bitmask is recorded with the module, so that kept weights that are zero are known as such.

        Raises FormatError, naming the weight, if its parts are malformed.
        """
        parts = {part: input_dict[pattern][0] for part, pattern in zip(self.form.parts, source_patterns, strict=True)}
        parameter = model.get_parameter(full_layer_name)
        try:
            weight = self.form.unpack(parts)
        except FormatError as error:
            raise FormatError(f"{full_layer_name}: {error}") from None
        if self.form.pattern == "bitmask" and weight.ndim == 2:
            setattr(model.get_submodule(str(full_layer_name).rpartition(".")[0]), RECORDED, parts["bitmask"].cpu())
        return {target_patterns[0]: weight if weight.element_size() == 1 else weight.to(parameter.dtype)}


class Sparse24HfQuantizer(CompressedTensorsHfQuantizer):
    """transformers' compressed-tensors quantizer, which also reads packed layers.

    A sparse-only checkpoint, packed or not, becomes an ordinary model with the zeros in place; with quantization on
    top, the model is the one that the same checkpoint with plain weights would give. The files' headers are compared
    with the model first: transformers itself does not where a quantizer is at work.
    """

    _packed: Checkpoint | None = None
    # Embeddings and an output head in INT8, which become plain weights, and their names in the files.
    _expanded: Mapping[str, str] = MappingProxyType({})
    # What is to be compared with the model as soon as its conversions are known, which is before weights are read.
    _unchecked: tuple[Any, Checkpoint] | None = None
    # Whether modules are to be decompressed once they are read, as unpacked layers have to be.
    _decompress = False
    # Of the model's parameters, before they are read.
    _dtypes: dict[str, torch.dtype] | None = None
    # The conversions that read packed or quantized experts, or packed layers that are split, each with transformers'
    # own, which writes plain ones.
    _experts: dict[WeightConverter, WeightConverter | WeightRenaming] | None = None
    # What reads experts that are stored apart, of Llama 4, which transformers then writes whole.
    _merging: Sequence[WeightConverter] = ()
    # Whether experts are stored as they are in a model that is quantized otherwise.
    _plain_experts = False

    def _convert_model_for_quantization(self, model: Any) -> None:
        """Take experts apart where they are quantized: others are whole in a model that was never compressed."""
        if self.compressor.quantization_config is not None:
            super()._convert_model_for_quantization(model)

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        files = [Path(file) for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
        quantized = self.compressor.quantization_config is not None
        config = _config_beside(files)
        if _any_packed(files):
            check_versions("transformers")
            folders = {os.path.abspath(file.parent) for file in files}
            if len(folders) > 1:
                raise FormatError(f"the index names files outside the checkpoint's folder: {sorted(folders)}")
            self._packed = read_files(files)
            # transformers turns an error inside a conversion into a line of a report; here it is raised as it is.
            self._packed.check_patterns()
            check_experts(self._packed)
        elif says_packed(config):
            raise FormatError(
                f"{files[0].parent}: config.json says {SPARSE_24_BITMASK.name}, but no tensor is named "
                f"*.{SPARSE_24_BITMASK.values}; export the model again, or remove sparsity_config from config.json if "
                "its weights are dense"
            )
        self._plain_experts = quantized and _has_plain_experts(files)
        if self._packed is not None:
            self._dtypes = {name: one.dtype for name, one in model.named_parameters() if one.dtype in _FLOATS}
        stored = read_files(files) if self._packed is None and files else self._packed
        if quantized and stored is not None and (self._packed is not None or holds_embedding(model, stored)):
            self._leave_plain(model, packed_embeddings(model, stored))
        dequantize = _DEQUANTIZES_WHILE_READING and self.quantization_config.dequantize
        if quantized and self._packed is not None and dequantize:
            self._decompress, self.quantization_config.dequantize = True, False
        if quantized:
            quantize_derived_classes()
            super()._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
        if not quantized and has_whole_experts(model):
            self._merging = merging_llama4()
        if stored is not None and (self._packed is not None or not quantized or _records_2of4(config)):
            self._unchecked = model, stored

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Add the unpacking of layers; from transformers 5.21 on the model is given, too."""
        weight_conversions = [*self._merging, *weight_conversions]
        found = {}
        if self._packed is not None:
            found = unpacking_experts(weight_conversions, self._packed)
            found |= unpacking_fused(weight_conversions, self._packed)
        self._experts = {unpacking: plain for plain, unpacking in found.items()}
        # The parent looks for the quantization scheme of merged experts, which a sparse-only checkpoint has none of.
        if self.compressor.quantization_config is not None:
            merging = [conversion for conversion in merging_experts(weight_conversions) if conversion not in found]
            plain = merging if self._plain_experts else []
            others = [one for one in weight_conversions if one not in found and one not in plain]
            quantized = super().update_weight_conversions(others, *model)
            self._experts |= {
                made: one
                for one, made in zip(others, quantized, strict=False)
                if made is not one and isinstance(made, WeightConverter)
            }
            conversions = [*found.values(), *plain, *quantized]
        else:
            conversions = [*found.values(), *weight_conversions]
        if self._packed is not None:
            whole = _unpacking_whole(weight_conversions, self._packed)
            self._experts |= whole
            conversions = [*whole, *conversions, *_unpacking()]
        conversions = [*expanding(self._expanded), *conversions]
        if self._unchecked is not None:
            (loaded, checkpoint), self._unchecked = self._unchecked, None
            integers = {name: one.dtype for name, one in loaded.named_parameters() if one.dtype in _INTEGERS}
            self._dtypes = (self._dtypes or {}) | integers
            check_model(checkpoint, loaded, conversions)
        return conversions

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Make an ordinary model of one that is not quantized, or that was to be dequantized."""
        if self._decompress or self.compressor.quantization_config is None:
            self.quantization_config.dequantize = True
        return super().postprocess_model(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._decompress:
            from compressed_tensors.quantization import QuantizationMetadata  # which imports what registers this

            self.compressor.decompress_model(model=model)
            for module in model.modules():
                QuantizationMetadata.clear_quantization(module)
        self._cast(model)
        plain = self._experts or {}
        if plain and self.compressor.quantization_config is not None:
            self._ignore(["re:.*\\bexperts\\..*"])  # merged, they are no layers that could be quantized
        ours = self._packed is not None or plain or self._expanded or self._merging
        if ours and hasattr(model, "_weight_conversions"):
            # Left there, they would be reverted on saving, and a plain model would be written half packed.
            used = [plain.get(conversion, conversion) for conversion in model._weight_conversions]
            model._weight_conversions = [
                conversion
                for conversion in dict.fromkeys(used)
                if conversion not in self._merging
                and not any(isinstance(op, Unpack | ExpandPacked) for op in getattr(conversion, "operations", ()))
            ]
        super()._process_model_after_weight_loading(model, **kwargs)

    def _cast(self, model: Any) -> None:
        """Cast what transformers leaves in the dtype of the file: integers, and every tensor that it renames."""
        kept = [*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())]
        for name, parameter in model.named_parameters():
            wanted = (self._dtypes or {}).get(name, parameter.dtype)
            alike = any(parameter.dtype in kind and wanted in kind for kind in (_FLOATS, _INTEGERS))
            if alike and parameter.dtype != wanted and not any(part in name for part in kept):
                parameter.data = parameter.data.to(wanted)

    def _leave_plain(self, model: Any, names: Mapping[str, str]) -> None:
        """Leave layers out of the quantization, in what is saved of it, too; a head tied to one shares its weight."""
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        shared = [one for one, other in tied.items() if other.removesuffix(".weight") in names]
        ignored = [*names, *(name.removesuffix(".weight") for name in shared)]
        self._expanded = names
        self._ignore(ignored)

    def _ignore(self, names: list[str]) -> None:
        """Say of layers that they are not quantized, in what is saved of the quantization, too."""
        for config in (self.compressor.quantization_config, self.quantization_config.quantization_config):
            assert config is not None
            config.ignore = [*config.ignore, *(name for name in names if name not in config.ignore)]


def _unpacking() -> list[WeightConverter]:
    return [
        WeightConverter([rf"\.{part}$" for part in form.parts], [".weight"], operations=[Unpack(form)])
        for form in FORMATS.values()
    ]


def _unpacking_whole(conversions: Sequence[Any], checkpoint: Checkpoint) -> dict[WeightConverter, WeightRenaming]:
    """What reads packed experts that lie in one tensor, with the renaming that does where they are plain."""
    if not any(map(matrices_of, checkpoint.layers)):
        return {}
    made = {}
    for stem, renaming in names_of_whole(conversions).items():
        sources = [rf"{stem}\.{part}$" for part in SPARSE_24_BITMASK.parts]
        targets = list(renaming._original_target_patterns)
        made[WeightConverter(sources, targets, operations=[Unpack(SPARSE_24_BITMASK)])] = renaming
    return made


def _refuse_packed(files: Sequence[Path]) -> None:
    for file in files:
        try:
            packed = _any_packed([file])
        except FormatError:
            return  # a file that transformers itself finds unreadable
        if packed:
            raise FormatError(f"{file}: holds packed 2:4 layers, but {why_unread(_config_beside(files))}")


def _refuse_quantized(files: Sequence[Path]) -> None:
    """Refuse codes with scales, of which no quantizer is told: transformers would cast the codes to floats."""
    try:
        found = any(name.endswith(_QUANTIZED) for file in files for name in tensor_names(file))
        checkpoint = read_files(files) if found else None
    except FormatError:
        return  # a file that transformers itself finds unreadable
    if checkpoint is not None:
        check_unquantized(checkpoint, _config_beside(files))


def _config_beside(files: Sequence[Path]) -> dict[str, Any]:
    """config.json of the folder that the files are in; empty where it cannot be read."""
    try:
        return read_config(files[0].parent) if files else {}
    except FormatError:
        return {}


def says_packed(config: dict[str, Any]) -> bool:
    """Whether config.json says that layers are packed."""
    return objects_in(objects_in(find_quantization(config)[1]).get("sparsity_config")).get("format") in FORMATS


def _records_2of4(config: dict[str, Any]) -> bool:
    """Whether config.json records at its top that plain or 4-bit layers are 2:4, as this package writes it."""
    return bool(objects_in(config.get("sparsity_config")))


def _has_plain_experts(files: Sequence[Path]) -> bool:
    """Whether the files name a weight of one expert that has no scale."""
    names = {name for file in files for name in tensor_names(file)}
    return any(
        name.endswith(".weight") and f"{name}_scale" not in names and expert_of(name.removesuffix(".weight"))
        for name in names
    )


def _any_packed(files: Sequence[Path]) -> bool:
    """Whether one of the files names a tensor as a part of a packed layer; only their headers are read."""
    marks = tuple(f".{part}" for form in FORMATS.values() for part in (form.values, form.pattern))
    return any(name.endswith(marks) for file in files for name in tensor_names(file))
