"""Writing `sparse-24-bitmask` checkpoints: through llm-compressor's `save_pretrained`, and from folder to folder.

Every checkpoint goes through :func:`crepe_llm.checkpoints.folders.new_folder`, so that under its name it is complete or
absent.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from crepe_llm.checkpoints.folders import new_folder
from crepe_llm.checkpoints.formats.bitmask import FormatError, is_2of4, pack
from crepe_llm.checkpoints.reading import CONFIG, INDEX, PARTS, SINGLE, Checkpoint, read_config, read_folder

__all__ = ["attach", "compress_folder", "decompress_folder"]

FORMAT = "sparse-24-bitmask"
# The release of compressed-tensors whose writer defined the format and was the last to have one.
FORMAT_VERSION = "0.14.0.1"
SPARSITY = "sparsity_config"
QUANTIZATION = "quantization_config"

# Two-dimensional weights that are not those of a linear layer, or that serving engines hold in merged tensors
# (experts): never packed, whatever their zeros. The output head shares its weight with the embedding where tied.
_NOT_LINEAR = re.compile(
    r"(^|\.)(lm_head|embed_out|output_embedding\w*|\w*embed\w*|wte|wpe|\w*norm\w*|experts|router)(\.|$)", re.IGNORECASE
)
_QUANTIZATION_SUFFIXES = ("_scale", "_zero_point", "_global_scale", "_g_idx", "_shape", ".shape", ".bitmask")
# A packed signed int4 value is stored with this offset, so this nibble is a zero weight.
_INT4_ZERO = 8


def attach(model: Any) -> None:
    """Make `model.save_pretrained` write 2:4 layers in the `sparse-24-bitmask` format.

    `model` is a transformers model in llm-compressor's hands: its `save_pretrained` is wrapped as llm-compressor
    wraps it (if it is not yet), and once more. `save_pretrained(folder, save_compressed=True)` then packs every
    linear layer whose stored weight is exactly 2:4, unquantized or quantized to int8 or float8_e4m3fn. Where nothing
    can be packed (`save_compressed=False`, or 4-bit weights in the pack-quantized form) the checkpoint stays as
    llm-compressor writes it and the 2:4 layers are recorded under `sparsity_config` at the top of `config.json`,
    which other readers ignore. The model in memory is left as llm-compressor's own saving leaves it. Idempotent.

    The folder is complete or absent. If it already holds a model, the new one is written beside it, under the first
    free of the names `folder-1`, `folder-2`, ..., and FileExistsError says so.
    """
    from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained

    from crepe_llm.models.per_block import write_config

    modify_save_pretrained(model)
    save = model.save_pretrained
    if getattr(save, "_packs_2of4", False):
        return

    @functools.wraps(save)
    def save_pretrained(
        save_directory: str | os.PathLike[str],
        quantization_format: str | None = None,
        save_compressed: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {"quantization_format": quantization_format, "save_compressed": save_compressed, **kwargs}
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub is not supported here: save to a folder, then upload that")
        with new_folder(Path(save_directory), keep=True) as folder:
            save(str(folder), **options)
            if not (folder / CONFIG).is_file():  # a process of a distributed job that is not to write
                return
            write_config(model.config, folder)
            layers = _pack_in_place(folder) if save_compressed else []
            if not layers:
                _record_dense(folder)

    save_pretrained._packs_2of4 = True  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


def compress_folder(source: str | Path, destination: str | Path, *, progress: bool = False) -> list[str]:
    """Convert a checkpoint folder whose linear weights hold 2:4 zeros into `sparse-24-bitmask`.

    `source` holds safetensors with plain weights, unquantized or quantized to int8 or float8_e4m3fn; everything else
    in it is copied. One shard is in memory at a time; `progress` shows a bar. Returns the names of the packed layers.

    Raises FormatError if no layer is 2:4 (naming what the first candidate holds) or the source is malformed, and
    FileExistsError if `destination` already has a model.
    """
    source, destination = Path(source), Path(destination)
    checkpoint = read_folder(source)
    if checkpoint.layers:
        raise FormatError(f"{source} is already packed: layer {next(iter(checkpoint.layers))} has a bitmask")
    config = read_config(source)
    with new_folder(destination) as folder:
        layers = _convert(checkpoint, folder, _pack_tensor, progress)
        if not layers:
            raise FormatError(f"{source} has no 2:4 layer: {_why_none(checkpoint)}")
        _copy_rest(checkpoint, source, folder)
        _write_sparse_config(folder, config, layers)
    return layers


def decompress_folder(source: str | Path, destination: str | Path, *, progress: bool = False) -> list[str]:
    """Convert a `sparse-24-bitmask` checkpoint folder into plain weights with zeros, the inverse of
    :func:`compress_folder`: a folder that every reader loads.

    One shard is in memory at a time; `progress` shows a bar. Returns the names of the unpacked layers. Raises
    FormatError if the source is malformed or holds no packed layer, and FileExistsError if `destination` already has
    a model.
    """
    source, destination = Path(source), Path(destination)
    checkpoint = read_folder(source)
    if not checkpoint.layers:
        raise FormatError(f"{source} has no {FORMAT} layer: there is nothing to decompress")
    config = read_config(source)
    with new_folder(destination) as folder:
        _convert(checkpoint, folder, _unpack_tensor, progress)
        _copy_rest(checkpoint, source, folder)
        quantization = {k: v for k, v in config.get(QUANTIZATION, {}).items() if k != SPARSITY}
        config.pop(QUANTIZATION, None)
        if quantization.get("config_groups"):
            config[QUANTIZATION] = quantization | {SPARSITY: {}}
        _write_json(folder / CONFIG, config)
        _record_dense(folder)
    return list(checkpoint.layers)


def _pack_in_place(folder: Path) -> list[str]:
    """Pack the shards of a checkpoint that nobody reads yet, each replaced as soon as it is rewritten."""
    checkpoint = read_folder(folder)
    if not any(_packs(checkpoint, name) for name in checkpoint.tensors):
        return []
    layers = _convert(checkpoint, folder, _pack_tensor, progress=False)
    if layers:
        _write_sparse_config(folder, read_config(folder), layers)
    return layers


Transform = Callable[[Checkpoint, str], dict[str, torch.Tensor]]


def _convert(checkpoint: Checkpoint, folder: Path, transform: Transform, progress: bool) -> list[str]:
    """Write every shard of `checkpoint`, its tensors sent through `transform`, into `folder`, with a new index if
    there is more than one. Returns the prefixes of the layers that the transform packed."""
    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(total=len(checkpoint.tensors), unit="tensor", disable=not progress) as bar:
        for file in checkpoint.files:
            tensors: dict[str, torch.Tensor] = {}
            for name, stored in checkpoint.tensors.items():
                if stored.file == file:
                    tensors |= transform(checkpoint, name)
                    bar.update()
            part = folder / f".{file.name}.part"
            save_file(tensors, part, metadata={"format": "pt"})
            os.replace(part, folder / file.name)
            weight_map |= dict.fromkeys(tensors, file.name)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            del tensors
    if len(checkpoint.files) > 1 or checkpoint.files[0].name != SINGLE:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / INDEX, index)
    return sorted(name.removesuffix(".bitmask") for name in weight_map if name.endswith(".bitmask"))


def _packs(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is the weight of a linear layer and is 2:4."""
    return _is_linear_weight(checkpoint, name) and is_2of4(checkpoint.load(name))


def _is_linear_weight(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and len(checkpoint.tensors[name].shape) == 2 and not _NOT_LINEAR.search(name)


def _pack_tensor(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    tensor = checkpoint.load(name)
    if not _is_linear_weight(checkpoint, name) or not is_2of4(tensor):
        return {name: tensor}
    compressed, bitmask = pack(tensor)
    shape = torch.tensor(tensor.shape, dtype=torch.int64).reshape(2, 1)
    layer = name.removesuffix(".weight")
    return {f"{layer}.{part}": value for part, value in zip(PARTS, (compressed, bitmask, shape), strict=True)}


def _unpack_tensor(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    layer, _, part = name.rpartition(".")
    if layer not in checkpoint.layers or part not in PARTS:
        return {name: checkpoint.load(name)}
    return {f"{layer}.weight": checkpoint.load_weight(layer)} if part == "compressed" else {}


def _why_none(checkpoint: Checkpoint) -> str:
    for name in checkpoint.tensors:
        if _is_linear_weight(checkpoint, name):
            try:
                pack(checkpoint.load(name))
            except FormatError as error:
                return f"for instance {name}: {error}"
    return "it has no two-dimensional weight of a linear layer"


def _write_sparse_config(folder: Path, config: dict[str, Any], layers: list[str]) -> None:
    quantization = config.pop(QUANTIZATION, None) or {
        "quant_method": "compressed-tensors",
        "version": FORMAT_VERSION,
        "transform_config": {},
    }
    config.pop(SPARSITY, None)
    checkpoint = read_folder(folder)
    config[QUANTIZATION] = quantization | {SPARSITY: _sparsity_config(checkpoint, FORMAT, layers)}
    _write_json(folder / CONFIG, config)


def _record_dense(folder: Path) -> None:
    """Record under a top-level key of config.json which layers of a plain or 4-bit checkpoint are 2:4.

    Inside `quantization_config` the record would make transformers and vLLM refuse the checkpoint.
    """
    checkpoint = read_folder(folder)
    layers = [
        name.removesuffix(".weight").removesuffix(".weight_packed")
        for name in checkpoint.tensors
        if _packs(checkpoint, name) or _is_2of4_int4(checkpoint, name)
    ]
    if layers:
        config = read_config(folder)
        _write_json(folder / CONFIG, config | {SPARSITY: _sparsity_config(checkpoint, "dense", layers)})


def _sparsity_config(checkpoint: Checkpoint, form: str, layers: list[str]) -> dict[str, Any]:
    listed = set(layers)
    linear = {
        name.removesuffix(".weight").removesuffix(".weight_packed")
        for name in checkpoint.tensors
        if name.endswith(".weight_packed") or _is_linear_weight(checkpoint, name)
    }
    everything = linear <= listed
    return {
        "format": form,
        "global_sparsity": _zero_fraction(checkpoint),
        "ignore": ["lm_head"] if everything else [],
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4",
        "targets": ["Linear"] if everything else sorted(listed),
    }


def _zero_fraction(checkpoint: Checkpoint) -> float:
    """The fraction of zeros over all parameters of the model that the checkpoint stands for."""
    zeros = parameters = 0
    for name, stored in checkpoint.tensors.items():
        if name.endswith(_QUANTIZATION_SUFFIXES):
            continue
        tensor = checkpoint.load(name)
        if name.endswith(".compressed"):
            # The other half of the dense weight is zeros.
            parameters += 2 * tensor.numel()
            zeros += 2 * tensor.numel() - _count_nonzero(tensor)
        elif name.endswith(".weight_packed") and stored.dtype == "I32":
            nibbles = _int4_nonzero(tensor)
            parameters += nibbles.numel()
            zeros += nibbles.numel() - int(nibbles.count_nonzero())
        else:
            parameters += tensor.numel()
            zeros += tensor.numel() - _count_nonzero(tensor)
    return zeros / max(1, parameters)


def _count_nonzero(tensor: torch.Tensor) -> int:
    if tensor.dtype == torch.float8_e4m3fn:
        return int((tensor.view(torch.uint8) & 0x7F).count_nonzero())
    return int(tensor.count_nonzero())


def _is_2of4_int4(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a symmetric int4 weight in compressed-tensors' pack-quantized form is 2:4."""
    layer = name.removesuffix("_packed")
    if not name.endswith(".weight_packed") or f"{layer}_shape" not in checkpoint.tensors:
        return False
    if f"{layer}_zero_point" in checkpoint.tensors or checkpoint.tensors[name].dtype != "I32":
        return False
    packed = checkpoint.load(name)
    rows, columns = checkpoint.load(f"{layer}_shape").flatten().tolist()
    # Eight values an int32: other widths are not the int4 that this reads.
    if packed.ndim != 2 or packed.shape != (rows, (columns + 7) // 8):
        return False
    return is_2of4(_int4_nonzero(packed)[:, :columns].to(torch.int8))


def _int4_nonzero(packed: torch.Tensor) -> torch.Tensor:
    """Bool [rows, 8 * words] of int32 [rows, words]: which of the eight values a word are not zero, ascending."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2) != _INT4_ZERO


def _copy_rest(checkpoint: Checkpoint, source: Path, folder: Path) -> None:
    """Copy what is neither weights nor their index nor hidden: config, tokenizer, recipe, code."""
    skip = {file.name for file in checkpoint.files} | {INDEX}
    for path in source.iterdir():
        if path.name in skip or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
