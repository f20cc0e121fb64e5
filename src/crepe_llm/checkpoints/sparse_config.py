"""What config.json says of the layers that are 2:4."""

import json
from math import prod
from pathlib import Path
from typing import Any

from crepe_llm.checkpoints.int4 import int4_kept
from crepe_llm.checkpoints.reading import (
    CONFIG,
    QUANTIZATION_SUFFIXES,
    Checkpoint,
    find_quantization,
    read_config,
    read_folder,
    set_quantization,
)
from crepe_llm.checkpoints.two_of_four import FORMAT, int4_2of4, is_linear_weight, plain_2of4, stays_dense
from crepe_llm.functional.masks import nonzero

__all__ = ["SPARSITY", "record_dense", "write_json", "write_sparse_config"]

SPARSITY = "sparsity_config"


def write_sparse_config(folder: Path, config: dict[str, Any], layers: list[str]) -> None:
    quantization = find_quantization(config)[1] or {
        "quant_method": "compressed-tensors",
        "version": FORMAT.version,
        "transform_config": {},
    }
    config.pop(SPARSITY, None)
    quantization |= {SPARSITY: _sparsity_config(read_folder(folder), FORMAT.name, layers)}
    write_json(folder / CONFIG, set_quantization(config, quantization))


def record_dense(folder: Path) -> None:
    """Record under a top-level key of config.json which layers of a plain or 4-bit checkpoint are 2:4.

    Inside `quantization_config` the record would make transformers and vLLM refuse the checkpoint.
    """
    checkpoint = read_folder(folder)
    layers = plain_2of4(checkpoint) + int4_2of4(checkpoint)
    if layers:
        config = read_config(folder)
        write_json(folder / CONFIG, config | {SPARSITY: _sparsity_config(checkpoint, "dense", layers)})


def _sparsity_config(checkpoint: Checkpoint, form: str, layers: list[str]) -> dict[str, Any]:
    listed = set(layers)
    linear = {
        name.removesuffix(".weight").removesuffix(".weight_packed")
        for name in checkpoint.tensors
        if name.endswith(".weight_packed") or is_linear_weight(checkpoint, name) or stays_dense(checkpoint, name)
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
        if name.endswith(QUANTIZATION_SUFFIXES):
            continue
        layer, _, part = name.rpartition(".")
        packed = checkpoint.layers.get(layer)
        if packed is not None and part in packed.format.parts:
            if part == packed.format.values:
                parameters += prod(packed.shape)
                zeros += prod(packed.shape) - int(nonzero(checkpoint.load(name)).count_nonzero())
            continue
        tensor = checkpoint.load(name)
        int4 = int4_kept(checkpoint, name)
        kept = nonzero(tensor) if int4 is None else int4
        parameters += kept.numel()
        zeros += kept.numel() - int(kept.count_nonzero())
    return zeros / max(1, parameters)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
