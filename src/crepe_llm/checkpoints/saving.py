"""Writing checkpoints with packed 2:4 layers through llm-compressor's `save_pretrained`.

Every checkpoint goes through :func:`crepe_llm.checkpoints.folders.new_folder`, so that under its name it is complete or
absent.
"""

import functools
import importlib
import os
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from crepe_llm.checkpoints.converting import finish_plain, pack_folder
from crepe_llm.checkpoints.folders import new_folder
from crepe_llm.checkpoints.linear_classes import quantize_derived_classes
from crepe_llm.checkpoints.reading import CONFIG, QUANTIZATION, read_config
from crepe_llm.checkpoints.space import least_bytes
from crepe_llm.checkpoints.sparse_config import write_json

__all__ = ["attach"]

# Fields of a configuration that llm-compressor or transformers write as they should be.
_OTHERWISE_WRITTEN = ("_name_or_path", "architectures", "dtype", "quantization_config", "transformers_version")

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

    `model` is a transformers model in llm-compressor's hands: its `save_pretrained` is replaced by one that has
    llm-compressor save it. `save_pretrained(folder, save_compressed=True)` then packs every
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
    if not hasattr(model.save_pretrained, "_additions"):
        vars(model).pop("save_pretrained", None)  # llm-compressor's, which is made anew for each save
        model.save_pretrained = types.MethodType(_packing(type(model).save_pretrained, modify_save_pretrained), model)
    additions = model.save_pretrained._additions
    if masks is not None and masks not in additions.masks:
        additions.masks.append(masks)
    if finish is not None and finish not in additions.finish:
        additions.finish.append(finish)


def _packing(plain: Callable[..., None], modify: Callable[[Any], None]) -> Callable[..., None]:
    """A method of one model, and of its copies, that saves as llm-compressor does and packs what was saved.

    `modify` puts llm-compressor's method, which saves one very model, in the place of a model's own, `plain`.
    """
    additions = _Additions()

    @functools.wraps(plain)
    def save_pretrained(
        model: Any,
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
        size = least_bytes(model)
        with _taken_back_afterwards(), new_folder(Path(save_directory), keep=True, size=size) as folder:
            _toolkits_method(model, modify)(str(folder), **options)
            if not (folder / CONFIG).is_file():  # a process of a distributed job that is not to write
                return
            _write_changes_of_config(folder, model)
            _list_unquantized(folder, model)
            if save_compressed:
                pack_folder(folder, additions.all_masks())
            else:
                finish_plain(folder)
            for finish in additions.finish:
                finish(folder)

    save_pretrained._additions = additions  # type: ignore[attr-defined]
    save_pretrained._overridden = True  # type: ignore[attr-defined]  # llm-compressor does not wrap it again
    return save_pretrained


def _toolkits_method(model: Any, modify: Callable[[Any], None]) -> Callable[..., None]:
    """llm-compressor's method of this model, which keeps its own."""
    ours = vars(model).pop("save_pretrained")
    try:
        modify(model)
        return vars(model).pop("save_pretrained")  # type: ignore[no-any-return]
    finally:
        model.save_pretrained = ours


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
        write_json(folder / CONFIG, config)


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
        write_json(folder / CONFIG, config)
