"""From plain weights to packed 2:4 layers and back: a checkpoint in place, or from folder to folder."""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from crepe_llm.checkpoints.copying import copy_rest, two_folders
from crepe_llm.checkpoints.experts import expert_of
from crepe_llm.checkpoints.folders import new_folder
from crepe_llm.checkpoints.formats import FormatError
from crepe_llm.checkpoints.llama4 import groups_apart, is_llama4, put_together
from crepe_llm.checkpoints.reading import (
    CONFIG,
    INDEX,
    SINGLE,
    Checkpoint,
    check_dtypes,
    find_quantization,
    objects_in,
    read_config,
    read_folder,
    set_quantization,
)
from crepe_llm.checkpoints.space import least_packed_bytes, plain_bytes
from crepe_llm.checkpoints.sparse_config import SPARSITY, record_dense, write_json, write_sparse_config
from crepe_llm.checkpoints.two_of_four import FORMAT, has_exponents, is_2of4_linear, is_linear_weight
from crepe_llm.functional.bitmask import unpack_bits, wrong_byte
from crepe_llm.functional.masks import nonzero

__all__ = ["compress_folder", "decompress_folder", "finish_plain", "pack_folder"]

_logger = logging.getLogger(__name__)


def pack_folder(folder: Path, masks: Mapping[str, torch.Tensor]) -> list[str]:
    """Pack the 2:4 layers of a checkpoint in place; nobody may be reading it.

    Where there is none, config.json says which layers of a plain checkpoint are 2:4, if any.

    Args:
        folder: of a checkpoint with plain weights.
        masks: by layer uint8 [d_out, ceil(d_in / 8)], as for :func:`attach`.

    Returns:
        The names of the packed layers.
    """
    layers = _pack_in_place(folder, masks)
    if not layers:
        finish_plain(folder)
    return layers


def finish_plain(folder: Path) -> None:
    """Make a checkpoint without packed layers, in place, one that transformers reads, and record which are 2:4."""
    config = read_config(folder)
    if is_llama4(config) and find_quantization(config)[1] is None:
        checkpoint = read_folder(folder)
        if groups := groups_apart(checkpoint):
            _convert(checkpoint, folder, functools.partial(put_together, groups), progress=False)
    record_dense(folder)


def compress_folder(source: str | Path, destination: str | Path, *, progress: bool = False) -> list[str]:
    """Convert a checkpoint folder whose linear weights hold 2:4 zeros into `sparse-24-bitmask`.

    `source` holds safetensors with plain weights, unquantized or quantized to int8 or float8_e4m3fn; everything else
    in it is copied. One shard is in memory at a time; `progress` shows a bar. Returns the names of the packed layers.

    Raises FormatError if no layer is 2:4 (naming what the first candidate holds) or the source is malformed, and
    FileExistsError if `destination` already has a model.
    """
    source, destination = two_folders(source, destination)
    checkpoint = read_folder(source)
    if checkpoint.layers:
        raise FormatError(f"{source} is already packed: layer {next(iter(checkpoint.layers))} has a bitmask")
    check_dtypes(checkpoint)
    config = read_config(source)
    least = sum(least_packed_bytes(checkpoint, name) for name in checkpoint.tensors)
    with new_folder(destination, size=least) as folder:
        layers = _convert(checkpoint, folder, functools.partial(_pack_tensor, {}, _plain_experts(checkpoint)), progress)
        if not layers:
            raise FormatError(f"{source} has no 2:4 layer: {_why_none(checkpoint)}")
        copy_rest(source, folder)
        write_sparse_config(folder, config, layers)
    return layers


def decompress_folder(source: str | Path, destination: str | Path, *, progress: bool = False) -> list[str]:
    """Convert a `sparse-24-bitmask` checkpoint folder into plain weights with zeros, the inverse of
    :func:`compress_folder`: a folder that every reader loads.

    One shard is in memory at a time; `progress` shows a bar. Returns the names of the unpacked layers. Raises
    FormatError if the source is malformed or holds no packed layer, and FileExistsError if `destination` already has
    a model.
    """
    source, destination = two_folders(source, destination)
    checkpoint = read_folder(source)
    if not checkpoint.layers:
        raise FormatError(f"{source} has no {FORMAT.name} layer: there is nothing to decompress")
    check_dtypes(checkpoint)
    config = read_config(source)
    _check_types(checkpoint, config)
    with new_folder(destination, size=plain_bytes(checkpoint)) as folder:
        _convert(checkpoint, folder, _unpack_tensor, progress)
        copy_rest(source, folder)
        quantization = objects_in(find_quantization(config)[1])
        rotations = objects_in(quantization.get("transform_config")).get("config_groups")
        kept = quantization.get("config_groups") or quantization.get("kv_cache_scheme") or rotations
        write_json(folder / CONFIG, set_quantization(config, quantization | {SPARSITY: {}} if kept else None))
        finish_plain(folder)
    return list(checkpoint.layers)


def _pack_in_place(folder: Path, masks: Mapping[str, torch.Tensor]) -> list[str]:
    """Pack the shards of a checkpoint that nobody reads yet, each replaced as soon as it is rewritten."""
    checkpoint = read_folder(folder)
    exponents = [name for name in checkpoint.tensors if has_exponents(checkpoint, name)]
    if exponents:
        _logger.warning(
            "%d layers such as %s are stored plain: their scales are exponents (MXFP8), which no packed layer has",
            *(len(exponents), exponents[0].removesuffix(".weight")),
        )
    if not any(is_2of4_linear(checkpoint, name) for name in checkpoint.tensors):
        return []
    pack = functools.partial(_pack_tensor, masks, _plain_experts(checkpoint))
    layers = _convert(checkpoint, folder, pack, progress=False)
    if layers:
        write_sparse_config(folder, read_config(folder), layers)
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
        write_json(folder / INDEX, index)
    pattern = f".{FORMAT.pattern}"
    return sorted(name.removesuffix(pattern) for name in weight_map if name.endswith(pattern))


def _plain_experts(checkpoint: Checkpoint) -> set[str]:
    """The groups of experts that are not packed, as not every matrix of them is 2:4; with a warning where some are."""
    experts = [
        expert
        for name in checkpoint.tensors
        if is_linear_weight(checkpoint, name) and (expert := expert_of(name.removesuffix(".weight")))
    ]
    dense = [expert for expert in experts if not FORMAT.fits(checkpoint.load(f"{expert.name}.weight"))]
    plain = {expert.group for expert in dense}
    for group in sorted(plain):
        count = sum(expert.group == group for expert in experts)
        kept = [expert.name for expert in dense if expert.group == group]
        if len(kept) < count:
            _logger.warning(
                "%s is stored plain: %d of its %d matrices are not 2:4, such as %s, and experts are packed together or "
                "not at all",
                *(group, len(kept), count, kept[0]),
            )
    return plain


def _pack_tensor(
    masks: Mapping[str, torch.Tensor], plain: set[str], checkpoint: Checkpoint, name: str
) -> dict[str, torch.Tensor]:
    """The parts of a linear layer that is 2:4 and in none of the `plain` groups of experts; any other as it is."""
    tensor, layer = checkpoint.load(name), name.removesuffix(".weight")
    expert = expert_of(layer)
    if not is_linear_weight(checkpoint, name) or (expert and expert.group in plain) or not FORMAT.fits(tensor):
        return {name: tensor}
    parts = FORMAT.pack(tensor, _keep_of(tensor, masks.get(layer)))
    return {f"{layer}.{part}": value for part, value in parts.items()}


def _keep_of(weight: torch.Tensor, bits: torch.Tensor | None) -> torch.Tensor | None:
    """The mask bool [d_out, d_in] that `bits` are of this 2:4 weight, or None if they are not its mask."""
    if bits is None or weight.ndim != 2:
        return None
    rows, columns = weight.shape
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-columns // 8)):
        return None
    bits = bits.to(weight.device)
    if wrong_byte(bits, columns) is not None:
        return None
    keep = unpack_bits(bits, columns)
    return None if (nonzero(weight) & ~keep).any() else keep


def _unpack_tensor(checkpoint: Checkpoint, name: str) -> dict[str, torch.Tensor]:
    layer, _, part = name.rpartition(".")
    packed = checkpoint.layers.get(layer)
    if packed is None or part not in packed.format.parts:
        return {name: checkpoint.load(name)}
    return {f"{layer}.weight": checkpoint.load_weight(layer)} if part == packed.format.values else {}


def _why_none(checkpoint: Checkpoint) -> str:
    for name in checkpoint.tensors:
        if is_linear_weight(checkpoint, name):
            try:
                FORMAT.pack(checkpoint.load(name))
            except FormatError as error:
                return f"for instance {name}: {error}"
    return "it has no two-dimensional weight of a linear layer"


def _check_types(checkpoint: Checkpoint, config: dict[str, Any]) -> None:
    """Check that the layers of 8 bits have scales, and are of a type to which config.json quantizes."""
    groups = objects_in(objects_in(find_quantization(config)[1]).get("config_groups"))
    types = {objects_in(objects_in(group).get("weights")).get("type") for group in groups.values()}
    for layer in checkpoint.layers.values():
        if layer.dtype.itemsize != 1:
            continue
        kind = "float" if layer.dtype.is_floating_point else "int"
        name = f"{layer.name}.{layer.format.values}"
        stored = checkpoint.tensors[name]
        if kind not in types:
            raise FormatError(
                f"{stored.file}: tensor {name} is {stored.dtype}, but config.json quantizes nothing to 8-bit {kind}s"
            )
        if f"{layer.name}.weight_scale" not in checkpoint.tensors:
            raise FormatError(
                f"{stored.file}: tensor {name} is {stored.dtype}, but {layer.name}.weight_scale is missing; export the "
                "model again"
            )
