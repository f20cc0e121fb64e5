"""Conv1D layers (GPT-2) that are 2:4: saved dense, as they are stored [d_in, d_out], with a record in config.json."""

import json
from pathlib import Path
from typing import Any

from crepe_llm.checkpoints import is_2of4, read_folder
from crepe_llm.functional.masks import nonzero
from crepe_llm.models.linear import is_transposed

__all__ = ["record_conv1d"]


def record_conv1d(model: Any, folder: Path) -> None:
    """Name a saved model's Conv1D layers that are 2:4 along their input channels, as dense 2:4 layers are recorded.

    The weights are those of the files: a model whose weights wait on the disk has none while it is saved.
    """
    names = [name for name, module in model.named_modules() if is_transposed(module)]
    if not names:
        return
    checkpoint = read_folder(folder)
    stored = [name for name in names if f"{name}.weight" in checkpoint.tensors]
    layers = [name for name in stored if is_2of4(checkpoint.load(f"{name}.weight").T)]
    if not layers:
        return
    total = kept = 0
    for name in checkpoint.tensors:
        weight = checkpoint.load(name)
        total, kept = total + weight.numel(), kept + int(nonzero(weight).sum())
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["sparsity_config"] = {
        "format": "dense",
        "global_sparsity": 1 - kept / total,
        "ignore": [],
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4",
        "targets": sorted({*content.get("sparsity_config", {}).get("targets", []), *layers}),
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
