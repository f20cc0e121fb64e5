"""What a checkpoint holds, read from the headers of its safetensors files before any weight is."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUFFIXES = (".compressed", ".bitmask", ".shape")
"""The three tensors that stand for one 2:4 ``.weight``."""


def read_index(model: str, revision: str | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor of a checkpoint, by its name there.

    Args:
        model: a folder, or the id of a model on the Hugging Face hub.
        revision: the revision of a hub model.

    Raises:
        ValueError: a file of a folder is missing, truncated or not a safetensors file; names it.
    """
    folder = Path(model)
    if folder.is_dir():
        headers: list[Mapping[str, Any]] = [_read_header(file) for file in _files(folder)]
    else:
        from vllm.transformers_utils.config import get_safetensors_params_metadata

        headers = [get_safetensors_params_metadata(model, revision=revision)]
    return {name: tuple(info["shape"]) for header in headers for name, info in header.items() if name != "__metadata__"}


def sparse_modules(index: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Returns the names of the modules whose weight is stored 2:4-compressed.

    Args:
        index: the shape of every tensor, by name (:func:`read_index`).

    Raises:
        ValueError: one of a module's three tensors is missing or does not fit the others, or the plain weight is
            there as well; names the tensor.
    """
    modules = {name.removesuffix(".compressed") for name in index if name.endswith(".compressed")}
    stems = {name.rsplit(".", 1)[0] for name in index if name.endswith(".bitmask")}
    for module in sorted(modules | stems):
        for suffix in SUFFIXES:
            if module + suffix not in index:
                raise ValueError(f"damaged checkpoint: {module + suffix} is missing; export or download it again")
        if module + ".weight" in index:
            raise ValueError(
                f"damaged checkpoint: {module}.weight stands beside {module}.compressed; a 2:4 weight is stored once"
            )
        compressed, bitmask = index[module + ".compressed"], index[module + ".bitmask"]
        if len(compressed) != 2 or bitmask != (compressed[0], (2 * compressed[1] + 7) // 8):
            raise ValueError(
                f"damaged checkpoint: {module}.bitmask has shape {list(bitmask)}, which does not fit "
                f"{module}.compressed of shape {list(compressed)} (rows, columns/2); export or download it again"
            )
    return modules


def _files(folder: Path) -> list[Path]:
    listing = folder / "model.safetensors.index.json"
    if not listing.is_file():
        return sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in sorted(set(json.loads(listing.read_text())["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"damaged checkpoint: {file} is missing, though {listing.name} lists it")
    return files


def _read_header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"damaged checkpoint: {file} ends within its header ({size} bytes); download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            end = max((info["data_offsets"][1] for name, info in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"damaged checkpoint: {file} has no readable safetensors header ({error})") from None
    if 8 + length + end != size:
        raise ValueError(
            f"damaged checkpoint: {file} has {size} bytes where its header describes {8 + length + end}; "
            "download it again"
        )
    return header
