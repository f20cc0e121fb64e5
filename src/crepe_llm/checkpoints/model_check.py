"""The comparison of a checkpoint's headers with the model that transformers is about to fill from it.

transformers compares no shape once a quantizer is set, casts any dtype, and puts what is missing or unexpected into a
line of a report. Here each of these is an error, before a weight is read.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.utils.loading_report import LoadStateDictInfo

from crepe_llm.checkpoints.expert_conversions import UnpackExperts
from crepe_llm.checkpoints.formats import FormatError, StoredTensor
from crepe_llm.checkpoints.reading import Checkpoint, SparseLayer, check_dtypes, holds_packed

__all__ = ["check_model"]

# Of each class, a stored tensor may have any dtype where the model has any: their values are cast.
_CLASSES = (("F64", "F32", "F16", "BF16"), ("I64", "I32"))
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def check_model(checkpoint: Checkpoint, model: Any, conversions: Sequence[Any]) -> None:
    """Check that every tensor of a checkpoint has the place, shape and kind of dtype that `model` has for it, and that
    none is missing.

    `model` is a transformers model before its weights are loaded (its parameters may be on the meta device),
    `conversions` transformers' list of weight conversions for it. Where the model's class is not the one that
    config.json names (another head, or none), only what is missing inside the base model counts, and nothing is
    unexpected. Raises FormatError, naming file, tensor, what was found and what is expected.
    """
    if holds_packed(checkpoint):
        check_dtypes(checkpoint)
    _Comparison(checkpoint, model, conversions).run()


class _Comparison:
    def __init__(self, checkpoint: Checkpoint, model: Any, conversions: Sequence[Any]) -> None:
        self.checkpoint = checkpoint
        self.model = model
        state = model.state_dict(keep_vars=True)
        self.expected: dict[str, torch.Tensor] = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        self.renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.source: dict[str, str] = {}  # the model's name of a tensor -> the checkpoint's
        architectures = getattr(model.config, "architectures", None)
        self.same_class = not architectures or type(model).__name__ in architectures

    def run(self) -> None:
        by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        merged: dict[str, WeightConverter] = {}
        unexpected: dict[str, str] = {}
        for name in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = self._target(name)
            layer = self._packed(name)
            if target not in self.expected:
                unexpected[target] = name
            elif layer is not None and (pattern is None or not _merges(by_pattern[pattern])):
                self._compare_layer(layer, target)
            elif pattern is None:
                self._compare(target, name)
                if target.endswith(".weight_shape"):
                    self._compare_words(target, name)
            else:
                empty: Any = _empty(self.checkpoint.tensors[name])
                merged.setdefault(target, deepcopy(by_pattern[pattern])).add_tensor(target, name, pattern, empty)
                self.source.setdefault(target, name)
        for target, converter in merged.items():
            self._compare_merged(target, converter)
        self._check_names(unexpected)

    def _target(self, name: str) -> tuple[str, str | None]:
        """The model's name of a stored tensor and the pattern of the conversion that takes it, as transformers does."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, self.renamings, self.converters, prefix, self.expected)
        if target not in self.expected and name in self.expected:
            target, pattern = rename_source_key(name, [], [], prefix, self.expected)
        return target, pattern

    def _packed(self, name: str) -> SparseLayer | None:
        """The packed layer that a tensor is a part of."""
        prefix, _, part = name.rpartition(".")
        layer = self.checkpoint.layers.get(prefix)
        return layer if layer is not None and part in layer.format.parts else None

    def _compare_layer(self, layer: SparseLayer, target: str) -> None:
        values = f"{layer.name}.{layer.format.values}"
        source = self.source.setdefault(target, values)
        if source != values:
            raise self._error(values, f"is the model's {target}, as {source} is")
        wanted = self.expected[target]
        found = self.checkpoint.tensors[values]
        if layer.shape != tuple(wanted.shape) or not _casts(found.dtype, wanted.dtype):
            raise self._error(
                values,
                f"is packed from {found.dtype} {list(layer.shape)}, the model has {_name(wanted)} "
                f"{list(wanted.shape)} there",
            )

    def _compare(self, target: str, name: str) -> None:
        if target in self.source:
            raise self._error(name, f"is the model's {target}, as {self.source[target]} is")
        self.source[target] = name
        found, wanted = self.checkpoint.tensors[name], self.expected[target]
        if (found.dtype, found.shape) == ("I32", self._packed_zero_points(target)):
            return
        if found.shape != tuple(wanted.shape) or not _casts(found.dtype, wanted.dtype):
            raise self._error(
                name, f"is {found.dtype} {list(found.shape)}, the model has {_name(wanted)} {list(wanted.shape)} there"
            )

    def _packed_zero_points(self, target: str) -> tuple[int, ...] | None:
        """The shape in which zero points of a layer's rows are stored: several rows to a word of 32 bits."""
        prefix, _, part = target.rpartition(".")
        scheme = getattr(self.model.get_submodule(prefix), "quantization_scheme", None)
        bits = getattr(getattr(scheme, "weights", None), "num_bits", None)
        if part != "weight_zero_point" or bits is None:
            return None
        rows, *rest = self.expected[target].shape
        return (-(-rows // (32 // bits)), *rest)

    def _compare_words(self, target: str, name: str) -> None:
        """Compare the shape that a weight packed in words of 32 bits says it has; it is read, 16 bytes."""
        module = self.model.get_submodule(target.rpartition(".")[0])
        wanted = [getattr(module, field, None) for field in ("out_features", "in_features")]
        found = self.checkpoint.load(name).flatten().tolist()
        if None not in wanted and found != wanted:
            raise self._error(name, f"says {found}, the model has {wanted} there: export the model again")

    def _compare_merged(self, target: str, converter: WeightConverter) -> None:
        """Compare what a conversion of several tensors makes, such as merged experts; of empty tensors here."""
        try:
            made = converter.convert(target, model=self.model, config=self.model.config)
        except Exception:  # one that needs values: transformers reports the errors of a conversion itself
            self.source.update(dict.fromkeys(self._targets(target, converter), self.source[target]))
            return
        for name, values in made.items():
            value = values[0] if isinstance(values, list) else values
            self.source.setdefault(name, self.source[target])
            wanted = self.expected.get(name)
            if wanted is not None and (value.shape != wanted.shape or not _casts(_name(value), wanted.dtype)):
                raise self._error(
                    self.source[target],
                    f"and those merged with it make {name} {_name(value)} {list(value.shape)}, the model has "
                    f"{_name(wanted)} {list(wanted.shape)} there",
                )

    def _targets(self, target: str, converter: WeightConverter) -> list[str]:
        first, *_ = converter.target_patterns
        return [target.replace(first, pattern) for pattern in converter.target_patterns]

    def _check_names(self, unexpected: dict[str, str]) -> None:
        found = {id(self.expected[name]) for name in self.source if name in self.expected}  # modules may be shared
        missing = {name for name, tensor in self.expected.items() if id(tensor) not in found}
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        for one, other in [*tied.items(), *((source, target) for target, source in tied.items())]:
            if other in self.source:
                missing.discard(one)
        info = LoadStateDictInfo(missing, set(unexpected) - self._left_over(unexpected), set(), [], {}, set())
        self.model._adjust_missing_and_unexpected_keys(info)
        prefix = f"{self.model.base_model_prefix}."
        if not self.same_class and any(name.startswith(prefix) for name in self.expected):
            info.missing_keys = {name for name in info.missing_keys if name.startswith(prefix)}
        if info.missing_keys:
            name = min(info.missing_keys, key=dot_natural_key)
            wanted = self.expected[name]
            raise FormatError(
                f"{self._where()}: tensor {name} is missing, the model has {_name(wanted)} {list(wanted.shape)} there"
                + _and_more(info.missing_keys)
            )
        if info.unexpected_keys and self.same_class:
            name = min(info.unexpected_keys, key=dot_natural_key)
            raise self._error(
                unexpected[name],
                f"is not one of the model's, {type(self.model).__name__}" + _and_more(info.unexpected_keys),
            )

    def _left_over(self, unexpected: dict[str, str]) -> set[str]:
        """What old checkpoints hold and models now compute: buffers that are not saved any more, masks of attention.

        And the shape that compressed-tensors leaves with a layer whose weight it has unpacked.
        """
        prefix = self.model.base_model_prefix
        buffers = {name.removeprefix(f"{prefix}.") for name, _ in self.model.named_buffers()}
        return {
            target
            for target, name in unexpected.items()
            if target.removeprefix(f"{prefix}.") in buffers
            or target.endswith(".masked_bias")
            or (target.endswith(".weight_shape") and name.removesuffix("_shape") in self.checkpoint.tensors)
            or (target.endswith(".bias") and len(self.checkpoint.tensors[name].shape) == 4)
        }

    def _error(self, name: str, what: str) -> FormatError:
        return FormatError(f"{self.checkpoint.tensors[name].file}: tensor {name} {what}")

    def _where(self) -> str:
        files = self.checkpoint.files
        return str(files[0] if len(files) == 1 else files[0].parent)


def _merges(conversion: WeightConverter) -> bool:
    """Whether a conversion makes one tensor of the packed layers of several experts."""
    return any(isinstance(operation, UnpackExperts) for operation in conversion.operations)


def _empty(stored: StoredTensor) -> torch.Tensor:
    """A tensor of a stored one's shape and dtype that takes no memory; complex, which no weight is, if unknown here."""
    return torch.empty(stored.shape, dtype=_DTYPES.get(stored.dtype, torch.complex64), device="meta")


def _name(tensor: torch.Tensor) -> str:
    """safetensors' name of a tensor's dtype."""
    return _NAMES.get(tensor.dtype, str(tensor.dtype))


def _casts(found: str, wanted: torch.dtype) -> bool:
    """Whether values stored as `found` are cast to `wanted` with the same meaning."""
    name = _NAMES.get(wanted)
    return found == name or any(found in group and name in group for group in _CLASSES)


def _and_more(names: set[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
