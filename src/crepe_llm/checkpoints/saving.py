"""Writing checkpoints with packed 2:4 layers: through llm-compressor's `save_pretrained`, and from folder to folder.

Every checkpoint goes through :func:`crepe_llm.checkpoints.folders.new_folder`, so that under its name it is complete or
absent.
"""

import functools
import importlib
import json
import logging
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from crepe_llm.checkpoints.copying import copy_rest, two_folders
from crepe_llm.checkpoints.experts import expert_of, matrices_of
from crepe_llm.checkpoints.folders import new_folder
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK, FormatError
from crepe_llm.checkpoints.linear_classes import quantize_derived_classes
from crepe_llm.checkpoints.reading import (
    CONFIG,
    INDEX,
    QUANTIZATION,
    SINGLE,
    Checkpoint,
    check_dtypes,
    find_quantization,
    objects_in,
    read_config,
    read_folder,
    set_quantization,
)
from crepe_llm.functional.bitmask import unpack_bits, wrong_byte
from crepe_llm.functional.masks import nonzero

__all__ = ["attach", "compress_folder", "decompress_folder", "int4_2of4", "pack_folder", "plain_2of4"]

_logger = logging.getLogger(__name__)

FORMAT = SPARSE_24_BITMASK  # what is written
SPARSITY = "sparsity_config"

# Two-dimensional weights that are not those of a linear layer, or of all experts in one: never packed, whatever their
# zeros. The output head shares its weight with the embedding where tied.
_NOT_LINEAR = re.compile(
    r"(^|\.)((lm_head|embed_out|wte|wpe|experts(?!\.\d+\.)|router)\.|\w*(embed|norm)\w*(\.\d+)?\.weight$)",
    re.IGNORECASE,
)
_QUANTIZATION_SUFFIXES = ("_scale", "_zero_point", "_global_scale", "_g_idx", "_shape")
# Fields of a configuration that llm-compressor or transformers write as they should be.
_OTHERWISE_WRITTEN = ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version")
# A packed signed int4 value is stored with this offset, so this nibble is a zero weight where there are no zero points.
_INT4_ZERO = 8

Masks = Callable[[], Mapping[str, torch.Tensor]]
Finish = Callable[[Path], None]


@dataclass
class _Additions:
    """What the calls of :func:`attach` gave to one model: sources of masks, and last steps on the folder."""

    masks: list[Masks] = field(default_factory=list)
    finish: list[Finish] = field(default_factory=list)

    def all_masks(self) -> dict[str, torch.Tensor]:
        """The masks of all sources by layer; of two for one layer the one that was added later."""
        return {name: bits for source in self.masks for name, bits in source().items()}


def attach(model: Any, masks: Masks | None = None, finish: Finish | None = None) -> None:
    """Make `model.save_pretrained` write 2:4 layers in the `sparse-24-bitmask` format.

    `model` is a transformers model in llm-compressor's hands: its `save_pretrained` is wrapped as llm-compressor
    wraps it (if it is not yet), and once more. `save_pretrained(folder, save_compressed=True)` then packs every
    linear layer whose stored weight is exactly 2:4, unquantized or quantized to int8 or float8_e4m3fn. Where nothing
    can be packed (`save_compressed=False`, or 4-bit weights in the pack-quantized form) the checkpoint stays as
    llm-compressor writes it and the 2:4 layers are recorded under `sparsity_config` at the top of `config.json`,
    which other readers ignore. The model in memory is left as llm-compressor's own saving leaves it.

    `masks` is called at every save. It returns masks by the names of the stored layers, as bits: uint8
    [d_out, ceil(d_in / 8)], bit j of byte b set where column 8b + j is kept. A layer is packed with its mask, so that a
    kept weight that is exactly 0 stays kept. A mask that does not keep exactly two of every four columns is not used,
    and neither is one outside of which a stored weight is not zero: the layer's mask is then inferred from the zeros.

    `finish` is called with the complete folder before the folder appears under its name. Another call of `attach` adds
    its `masks` and `finish` to those of earlier calls, each once, and changes nothing else.

    The folder is complete or absent. If it already holds a model, the new one is written beside it, under the first
    free of the names `folder-1`, `folder-2`, ..., and FileExistsError says so. OSError is raised before anything is
    written where the disk has no room for it.
    """
    from llmcompressor.transformers.compression.compressed_tensors_utils import modify_save_pretrained

    quantize_derived_classes()
    modify_save_pretrained(model)
    if not hasattr(model.save_pretrained, "_additions"):
        model.save_pretrained = _packing(model.save_pretrained, weakref.ref(model))
    additions = model.save_pretrained._additions
    if masks is not None and masks not in additions.masks:
        additions.masks.append(masks)
    if finish is not None and finish not in additions.finish:
        additions.finish.append(finish)


def _packing(save: Callable[..., None], model: Callable[[], Any]) -> Callable[..., None]:
    """llm-compressor's `save_pretrained` wrapped, so that it packs what it saved."""
    additions = _Additions()

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
        if kwargs.get("variant"):
            raise ValueError(f"variant={kwargs['variant']!r} is not supported here: packed files have no variants")
        size = _least_bytes(model())
        with _taken_back_afterwards(), new_folder(Path(save_directory), keep=True, size=size) as folder:
            save(str(folder), **options)
            if not (folder / CONFIG).is_file():  # a process of a distributed job that is not to write
                return
            _write_changes_of_config(folder, model())
            _list_unquantized(folder, model())
            if save_compressed:
                pack_folder(folder, additions.all_masks())
            else:
                _record_dense(folder)
            for finish in additions.finish:
                finish(folder)

    save_pretrained._additions = additions  # type: ignore[attr-defined]
    return save_pretrained


@contextmanager
def _taken_back_afterwards() -> Iterator[None]:
    """Have llm-compressor undo what it does to a model to save it when the folder is there: if that fails, it stays."""
    from compressed_tensors.utils import patch_attr

    module = importlib.import_module("llmcompressor.transformers.compression.compressed_tensors_utils")
    take_back = module.from_accelerate
    saved: list[Any] = []
    try:
        with patch_attr(module, "from_accelerate", saved.append):
            yield
    finally:
        for model in saved:
            take_back(model)


def _write_changes_of_config(folder: Path, model: Any) -> None:
    """Write into config.json what has been changed in a model's configuration since it was read, such as a vocabulary
    that was made larger: llm-compressor writes the file that the model came with."""
    try:
        read = type(model.config).from_pretrained(model.config._name_or_path, local_files_only=True)
    except (OSError, ValueError):  # a model that was not read
        return
    config = read_config(folder)
    if _add_changes(config, read.to_dict(), model.config.to_dict()):
        _write_json(folder / CONFIG, config)


def _add_changes(config: dict[str, Any], before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Put into `config` what differs between two configurations; whether anything does."""
    changed = False
    for name, value in now.items():
        if name in _OTHERWISE_WRITTEN or value == before.get(name):
            continue
        if isinstance(value, dict) and isinstance(before.get(name), dict) and isinstance(config.get(name), dict):
            changed |= _add_changes(config[name], before[name], value)
        else:
            config[name], changed = value, True
    return changed


def _list_unquantized(folder: Path, model: Any) -> None:
    """Complete what config.json says is left out of the quantization.

    compressed-tensors lists layers of the very classes that it has quantized. Of a model whose blocks have linear
    layers of a class of their own (Falcon), it leaves out the head, which readers then take for quantized.
    """
    from compressed_tensors.utils import match_named_modules

    config = read_config(folder)
    quantization = config.get(QUANTIZATION) or {}
    groups = (quantization.get("config_groups") or {}).values()
    targets = list(dict.fromkeys(target for group in groups for target in group["targets"]))
    ignored = quantization.get("ignore") or []
    found = [
        name
        for name, module in match_named_modules(model, targets, ignored)
        if getattr(module, "quantization_scheme", None) is None
    ]
    if found:
        config[QUANTIZATION] = quantization | {"ignore": [*ignored, *found]}
        _write_json(folder / CONFIG, config)


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
        _record_dense(folder)
    return layers


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
    least = sum(_least_packed_bytes(checkpoint, name) for name in checkpoint.tensors)
    with new_folder(destination, size=least) as folder:
        layers = _convert(checkpoint, folder, functools.partial(_pack_tensor, {}, _plain_experts(checkpoint)), progress)
        if not layers:
            raise FormatError(f"{source} has no 2:4 layer: {_why_none(checkpoint)}")
        copy_rest(source, folder)
        _write_sparse_config(folder, config, layers)
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
    with new_folder(destination, size=_plain_bytes(checkpoint)) as folder:
        _convert(checkpoint, folder, _unpack_tensor, progress)
        copy_rest(source, folder)
        quantization = objects_in(find_quantization(config)[1])
        kept = quantization.get("config_groups") or quantization.get("kv_cache_scheme")
        _write_json(folder / CONFIG, set_quantization(config, quantization | {SPARSITY: {}} if kept else None))
        _record_dense(folder)
    return list(checkpoint.layers)


def plain_2of4(checkpoint: Checkpoint) -> list[str]:
    """The prefixes of the linear layers whose plain weights are exactly 2:4; all weights are read, one at a time."""
    return [name.removesuffix(".weight") for name in checkpoint.tensors if _packs(checkpoint, name)]


def int4_2of4(checkpoint: Checkpoint) -> list[str]:
    """The prefixes of the layers whose 4-bit weights, in compressed-tensors' pack-quantized form, are exactly 2:4."""
    return [name.removesuffix(".weight_packed") for name in checkpoint.tensors if _is_2of4_int4(checkpoint, name)]


def _pack_in_place(folder: Path, masks: Mapping[str, torch.Tensor]) -> list[str]:
    """Pack the shards of a checkpoint that nobody reads yet, each replaced as soon as it is rewritten."""
    checkpoint = read_folder(folder)
    exponents = [name for name in checkpoint.tensors if _has_exponents(checkpoint, name)]
    if exponents:
        _logger.warning(
            "%d layers such as %s are stored plain: their scales are exponents (MXFP8), which no packed layer has",
            *(len(exponents), exponents[0].removesuffix(".weight")),
        )
    if not any(_packs(checkpoint, name) for name in checkpoint.tensors):
        return []
    pack = functools.partial(_pack_tensor, masks, _plain_experts(checkpoint))
    layers = _convert(checkpoint, folder, pack, progress=False)
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
    pattern = f".{FORMAT.pattern}"
    return sorted(name.removesuffix(pattern) for name in weight_map if name.endswith(pattern))


def _packs(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is the weight of a linear layer and is 2:4."""
    return _is_linear_weight(checkpoint, name) and FORMAT.fits(checkpoint.load(name))


def _is_linear_weight(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is the weight of a linear layer that may be packed, or of one of each expert."""
    if not name.endswith(".weight") or _NOT_LINEAR.search(name) or _has_exponents(checkpoint, name):
        return False
    axes = len(checkpoint.tensors[name].shape)
    return axes == 2 or (axes == 3 and bool(matrices_of(name.removesuffix(".weight"))))


def _has_exponents(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is a weight whose scales are stored as exponents of two, bytes."""
    scale = checkpoint.tensors.get(f"{name}_scale")
    return scale is not None and scale.dtype == "U8"


def _plain_experts(checkpoint: Checkpoint) -> set[str]:
    """The groups of experts that are not packed, as not every matrix of them is 2:4; with a warning where some are."""
    experts = [
        expert
        for name in checkpoint.tensors
        if _is_linear_weight(checkpoint, name) and (expert := expert_of(name.removesuffix(".weight")))
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
    if not _is_linear_weight(checkpoint, name) or (expert and expert.group in plain) or not FORMAT.fits(tensor):
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
        if _is_linear_weight(checkpoint, name):
            try:
                FORMAT.pack(checkpoint.load(name))
            except FormatError as error:
                return f"for instance {name}: {error}"
    return "it has no two-dimensional weight of a linear layer"


def _write_sparse_config(folder: Path, config: dict[str, Any], layers: list[str]) -> None:
    quantization = find_quantization(config)[1] or {
        "quant_method": "compressed-tensors",
        "version": FORMAT.version,
        "transform_config": {},
    }
    config.pop(SPARSITY, None)
    quantization |= {SPARSITY: _sparsity_config(read_folder(folder), FORMAT.name, layers)}
    _write_json(folder / CONFIG, set_quantization(config, quantization))


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
    for name in checkpoint.tensors:
        if name.endswith(_QUANTIZATION_SUFFIXES):
            continue
        layer, _, part = name.rpartition(".")
        packed = checkpoint.layers.get(layer)
        if packed is not None and part in packed.format.parts:
            if part == packed.format.values:
                parameters += prod(packed.shape)
                zeros += prod(packed.shape) - int(nonzero(checkpoint.load(name)).count_nonzero())
            continue
        tensor = checkpoint.load(name)
        int4 = _int4_kept(checkpoint, name)
        kept = nonzero(tensor) if int4 is None else int4
        parameters += kept.numel()
        zeros += kept.numel() - int(kept.count_nonzero())
    return zeros / max(1, parameters)


def _is_2of4_int4(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor is an int4 weight in compressed-tensors' pack-quantized form and is 2:4."""
    kept = _int4_kept(checkpoint, name)
    return kept is not None and FORMAT.fits(kept.to(torch.int8))


def _int4_kept(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """Bool [rows, columns]: which weights of an int4 tensor in compressed-tensors' pack-quantized form are not zero.

    None where the tensor is no such one. A code that is its group's zero point is zero.
    """
    layer = name.removesuffix("_packed")
    if not name.endswith(".weight_packed") or f"{layer}_shape" not in checkpoint.tensors:
        return None
    if checkpoint.tensors[name].dtype != "I32":
        return None
    packed = checkpoint.load(name)
    rows, columns = checkpoint.load(f"{layer}_shape").flatten().tolist()
    # Eight values an int32: other widths are not the int4 that this reads.
    if packed.ndim != 2 or packed.shape != (rows, (columns + 7) // 8):
        return None
    codes = _nibbles(packed)[:, :columns]
    if f"{layer}_zero_point" not in checkpoint.tensors:
        return codes != _INT4_ZERO
    zero = _nibbles(checkpoint.load(f"{layer}_zero_point").t()).t()[:rows]
    if zero.shape[0] != rows or columns % zero.shape[1]:
        return None
    return codes != zero.repeat_interleave(columns // zero.shape[1], 1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The eight values of each int32, ascending: uint8 [rows, 8 * words] of int32 [rows, words]."""
    pairs = packed.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)


def _least_bytes(model: Any) -> int:
    """The least number of bytes that a model takes on disk while it is saved, before its layers are packed."""
    from compressed_tensors.offload import disable_onloading

    with disable_onloading():
        bits = {
            id(module.weight): module.quantization_scheme.weights.num_bits
            for module in model.modules()
            if getattr(getattr(module, "quantization_scheme", None), "weights", None) and hasattr(module, "weight")
        }
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        return sum(
            weight.numel() * min(8 * weight.element_size(), bits.get(id(weight), 64)) // 8
            for name, weight in model.named_parameters()
            if name not in tied and not name.endswith(_QUANTIZATION_SUFFIXES)
        )


def _least_packed_bytes(checkpoint: Checkpoint, name: str) -> int:
    """The bytes of a tensor that stays as it is, or of its packed form if it can be that of a 2:4 layer."""
    stored = checkpoint.tensors[name]
    if not _is_linear_weight(checkpoint, name):
        return stored.size
    return stored.size // 2 + prod(stored.shape) // 8


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


def _plain_bytes(checkpoint: Checkpoint) -> int:
    """The bytes of a checkpoint's tensors once its layers are unpacked."""
    parts = {f"{layer}.{part}" for layer, packed in checkpoint.layers.items() for part in packed.format.parts}
    plain = sum(stored.size for name, stored in checkpoint.tensors.items() if name not in parts)
    return plain + sum(prod(layer.shape) * layer.dtype.itemsize for layer in checkpoint.layers.values())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
