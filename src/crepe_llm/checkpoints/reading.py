"""Checked access to a folder of safetensors files that may hold packed layers.

A checkpoint is input from elsewhere: everything is checked against the real size of the files before memory of the
size that it claims is allocated, every error names the file and the tensor, and nothing but safetensors is read.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from crepe_llm.checkpoints.formats import CheckpointFormat, FormatError, StoredTensor, format_of_part

__all__ = [
    "INTEGER_CODES",
    "Checkpoint",
    "SparseLayer",
    "StoredTensor",
    "check_dtypes",
    "check_plain",
    "check_unquantized",
    "find_quantization",
    "has_weights",
    "holds_packed",
    "objects_in",
    "read_config",
    "read_files",
    "read_folder",
    "read_strictly",
    "set_quantization",
    "tensor_names",
    "why_unread",
]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZATION = "quantization_config"
# How the names of tensors end that belong to a quantized weight and are no weights of the model.
QUANTIZATION_SUFFIXES = ("_scale", "_zero_point", "_global_scale", "_g_idx", "_shape")
# What compressed-tensors called it once: vLLM still looks there, transformers does not.
OLD_QUANTIZATION = "compression_config"
_TEXT_MODEL = "text_config"
# The largest index of a published model is about 10 MB; JSON of any size is not parsed.
_MAX_JSON_BYTES = 256 << 20
_HALVES = ("F16", "BF16")
_FLOATS = ("F64", "F32", *_HALVES)
_PLAIN_NAME = re.compile(r"[^/\\\0]+\.safetensors")


@dataclass(frozen=True)
class SparseLayer:
    """One packed layer: its prefix `name`, its format, and dtype and shape of the dense weight: (d_out, d_in), or
    (experts, d_out, d_in) where experts lie in one."""

    name: str
    format: CheckpointFormat
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a checkpoint, all their tensors by name, and the packed layers among them by prefix."""

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    layers: dict[str, SparseLayer]

    def load(self, name: str) -> torch.Tensor:
        """Read the tensor `name` as it is stored. Raises FormatError if the file cannot give it."""
        stored = self.tensors[name]
        try:
            with safe_open(stored.file, framework="pt") as file:
                return file.get_tensor(name)
        except Exception as error:
            raise FormatError(f"{stored.file}: tensor {name} cannot be read: {error}") from error

    def load_weight(self, layer: str) -> torch.Tensor:
        """Read and unpack the packed layer with prefix `layer`: the dense weight.

        Raises FormatError, naming file and layer, if a part is malformed.
        """
        form = self.layers[layer].format
        parts = {part: self.load(f"{layer}.{part}") for part in form.parts}
        try:
            return form.unpack(parts)
        except FormatError as error:
            raise FormatError(f"{self.tensors[f'{layer}.{form.pattern}'].file}: layer {layer}: {error}") from None

    def check_patterns(self) -> None:
        """Read what every packed layer says of its kept positions and check it; FormatError names the first bad one."""
        for name, layer in self.layers.items():
            tensor = f"{name}.{layer.format.pattern}"
            try:
                layer.format.validate(self.load(tensor), layer.shape)
            except FormatError as error:
                raise FormatError(f"{self.tensors[tensor].file}: tensor {tensor}: {error}") from None


def has_weights(folder: str | Path) -> bool:
    """Whether there is such a folder, with safetensors in it that :func:`read_folder` reads."""
    return any((Path(folder) / name).is_file() for name in (SINGLE, INDEX))


def read_folder(folder: str | Path) -> Checkpoint:
    """Read the headers of the checkpoint in `folder`: of `model.safetensors`, or, where that is not there, of the files
    that `model.safetensors.index.json` names. transformers chooses alike.

    No tensor is read but the stored shapes (16 bytes each). Raises FormatError if a file is missing, truncated or
    malformed, if the index names a file outside the folder or a tensor that its file lacks, and if a packed layer is
    incomplete or its parts disagree.
    """
    folder = Path(folder)
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return read_files([folder / SINGLE])
    if not index.is_file():
        raise FormatError(f"{folder}: neither {SINGLE} nor {INDEX} is there; only safetensors are read")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map is not a mapping of tensor names to files")
    names: dict[str, None] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise FormatError(
                f"{index}: tensor {tensor} is said to be in {name!r}, which is not the plain name of a safetensors "
                "file in this folder"
            )
        if name not in names and not (folder / name).is_file():
            raise FormatError(f"{index}: tensor {tensor} is said to be in {name!r}, which does not exist")
        names[name] = None
    checkpoint = read_files([folder / name for name in sorted(names)])
    for tensor, name in weight_map.items():
        stored = checkpoint.tensors.get(tensor)
        if stored is None or stored.file.name != name:
            raise FormatError(f"{index}: tensor {tensor} is said to be in {name!r}, which does not have it")
    return checkpoint


def read_files(files: Iterable[str | Path]) -> Checkpoint:
    """Read the headers of these safetensors files as one checkpoint; as :func:`read_folder` without an index."""
    paths = tuple(Path(file) for file in files)
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in tensors:
                        raise FormatError(f"{path}: tensor {name} is also in {tensors[name].file}")
                    view = file.get_slice(name)
                    tensors[name] = StoredTensor(path, view.get_dtype(), tuple(view.get_shape()))
        except FormatError:
            raise
        except Exception as error:
            raise FormatError(f"{path}: not a readable safetensors file: {_why_unreadable(path, error)}") from error
    checkpoint = Checkpoint(paths, tensors, {})
    for name in tensors:
        layer, _, part = name.rpartition(".")
        form = format_of_part(part)
        if form is None or layer in checkpoint.layers:
            continue
        if part in (form.values, form.pattern) or f"{layer}.weight" not in tensors:
            checkpoint.layers[layer] = _read_layer(checkpoint, layer, form)
    return checkpoint


def read_strictly(folder: Path) -> Checkpoint:
    """Read a folder as :func:`read_folder` does, for a reader that follows the index and compares nothing with a model,
    such as vLLM.

    Raises FormatError also if there is an index of other files beside `model.safetensors`, and of packed layers as
    :func:`check_dtypes`.
    """
    if (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        weight_map = objects_in(_read_json(folder / INDEX).get("weight_map"))
        if any(name != SINGLE for name in weight_map.values()) or not weight_map:
            raise FormatError(f"{folder}: both {SINGLE} and {INDEX} are there and differ; remove the one that is old")
    checkpoint = read_folder(folder)
    if holds_packed(checkpoint):
        check_dtypes(checkpoint)
    return checkpoint


def holds_packed(checkpoint: Checkpoint) -> bool:
    """Whether there are packed layers or packed codes."""
    return bool(checkpoint.layers) or any(name.endswith(".weight_packed") for name in checkpoint.tensors)


# What compressed-tensors packs the codes of integers into, and what else it packs codes into.
INTEGER_CODES = "I32"
_CODES = (INTEGER_CODES, "U8")


def check_dtypes(checkpoint: Checkpoint) -> None:
    """Check the dtypes that can be known wrong without a model, in a checkpoint with packed layers or to be packed.

    Raises FormatError, naming file and tensor, for F8_E5M2, which no reader of these weights multiplies, for F16 beside
    BF16, for integers in place of norms, biases and scales, and for floats in place of packed codes, which readers cast
    in silence.
    """
    for name, stored in checkpoint.tensors.items():
        if stored.dtype == "F8_E5M2":
            raise FormatError(
                f"{stored.file}: tensor {name} is F8_E5M2, which is not read here; export the model again with "
                "float8_e4m3fn or 16-bit weights"
            )
        if name.endswith(".weight_packed") and stored.dtype not in _CODES:
            raise FormatError(
                f"{stored.file}: tensor {name} is {stored.dtype}, but packed codes are integers ({', '.join(_CODES)}); "
                "the file is damaged: write or fetch it again"
            )
    _check_halves(checkpoint)
    check_plain(checkpoint)


def tensor_names(file: Path) -> list[str]:
    """Read the names of a safetensors file's tensors. Raises FormatError if it is no such file."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except Exception as error:
        raise FormatError(f"{file}: not a readable safetensors file: {_why_unreadable(file, error)}") from error


def _why_unreadable(file: Path, error: Exception) -> str:
    """What safetensors says, which calls a file that may not be read a missing one."""
    try:
        file.open("rb").close()
    except OSError as refused:
        return str(refused.strerror)
    return str(error)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read `config.json` of a checkpoint folder. Raises FormatError if it is missing or no JSON object."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FormatError(f"{path} does not exist; is {folder} the folder of a Hugging Face model?")
    return _read_json(path)


def objects_in(value: Any) -> dict[str, Any]:
    """A part of config.json that should be an object of others: itself, or an empty one if it is anything else."""
    return value if isinstance(value, dict) else {}


def find_quantization(config: dict[str, Any]) -> tuple[str, Any]:
    """Find what config.json says of a checkpoint's quantization, and where: at its top, in the part of the text model,
    or under the name of old checkpoints. None if it says nothing."""
    for place, holder, key in (
        (QUANTIZATION, config, QUANTIZATION),
        (f"{_TEXT_MODEL}.{QUANTIZATION}", objects_in(config.get(_TEXT_MODEL)), QUANTIZATION),
        (OLD_QUANTIZATION, config, OLD_QUANTIZATION),
    ):
        if holder.get(key) not in (None, {}):
            return place, holder[key]
    return QUANTIZATION, None


def set_quantization(config: dict[str, Any], quantization: dict[str, Any] | None) -> dict[str, Any]:
    """A config.json that says this of a checkpoint's quantization, at its top, and nothing elsewhere."""
    made = {key: value for key, value in config.items() if key not in (QUANTIZATION, OLD_QUANTIZATION)}
    if isinstance(config.get(_TEXT_MODEL), dict):
        made[_TEXT_MODEL] = {key: value for key, value in config[_TEXT_MODEL].items() if key != QUANTIZATION}
    return made if quantization is None else made | {QUANTIZATION: quantization}


def check_unquantized(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Raise FormatError if tensors are codes with scales: transformers finds no quantization in this config.json, and
    would take the codes for weights."""
    for name, stored in checkpoint.tensors.items():
        scaled = name.endswith(".weight") and f"{name}_scale" in checkpoint.tensors and stored.dtype not in _FLOATS
        if not scaled and not name.endswith(".weight_packed"):
            continue
        raise FormatError(f"{stored.file}: tensor {name} is quantized, but {why_unread(config)}")


def why_unread(config: dict[str, Any]) -> str:
    """Why transformers finds no quantization in config.json that it reads, and the cure."""
    place, quantization = find_quantization(config)
    if quantization is None:
        return f"config.json has no {QUANTIZATION}; put the config.json there that was saved with it"
    if place == OLD_QUANTIZATION:
        return f"config.json has no {QUANTIZATION}: it has {place}, which transformers does not read; rename that"
    method = objects_in(quantization).get("quant_method")
    if method == "compressed-tensors":
        return "the configuration that was given has no such quantization, which config.json has: leave it out"
    return f"config.json's {place} has quant_method={method!r}, which does not read it; export the model again"


def _read_layer(checkpoint: Checkpoint, layer: str, form: CheckpointFormat) -> SparseLayer:
    """Check the parts of one packed layer by what the headers say."""
    tensors = checkpoint.tensors
    missing = [part for part in form.parts if f"{layer}.{part}" not in tensors]
    if missing:
        present = next(part for part in form.parts if part not in missing)
        raise FormatError(
            f"{tensors[f'{layer}.{present}'].file}: layer {layer} has {present} but not {' and '.join(missing)}"
        )
    if f"{layer}.weight" in tensors:
        raise FormatError(f"{tensors[f'{layer}.weight'].file}: layer {layer} is stored both packed and as a weight")
    stored = {part: tensors[f"{layer}.{part}"] for part in form.parts}
    dtype, shape = form.read_layer(layer, stored, lambda part: checkpoint.load(f"{layer}.{part}"))
    return SparseLayer(layer, form, dtype, shape)


def _check_halves(checkpoint: Checkpoint) -> None:
    """Refuse a mixture of the two 16-bit floats: nobody saves one, so that one of the labels is wrong."""
    by_dtype = {
        dtype: [name for name, stored in checkpoint.tensors.items() if stored.dtype == dtype] for dtype in _HALVES
    }
    fewer, more = sorted(_HALVES, key=lambda dtype: len(by_dtype[dtype]))
    if by_dtype[fewer]:
        name = by_dtype[fewer][0]
        raise FormatError(
            f"{checkpoint.tensors[name].file}: tensor {name} is {fewer}, {len(by_dtype[more])} others are {more}; "
            "one of the labels is wrong. Export the model again in one dtype"
        )


def check_plain(checkpoint: Checkpoint) -> None:
    """Raise FormatError for integers where only floats make sense: norms, biases, scales of packed layers, weights
    without a scale."""
    for name, stored in checkpoint.tensors.items():
        prefix, _, part = name.rpartition(".")
        is_scale = part in ("weight_scale", "input_scale") and prefix in checkpoint.layers
        is_scaled = len(stored.shape) > 1 and f"{name}_scale" in checkpoint.tensors
        is_bias = part == "bias" and len(stored.shape) == 1  # old checkpoints of GPTs have masks of this name
        plain = is_bias or is_scale or (part == "weight" and not is_scaled)
        if plain and stored.dtype not in _FLOATS:
            raise FormatError(
                f"{stored.file}: tensor {name} is {stored.dtype} {list(stored.shape)}, not one of {', '.join(_FLOATS)}"
            )


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _MAX_JSON_BYTES:
        raise FormatError(f"{path} has {size} bytes, more than the {_MAX_JSON_BYTES} that are parsed")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{path} is not a JSON object")
    return content
