"""Conv1D layers (GPT-2) that are 2:4: saved dense, as they are stored [d_in, d_out], with a record in config.json."""

import json
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import align_module_device

from crepe_llm.checkpoints import is_2of4
from crepe_llm.models.linear import is_transposed
from crepe_llm.pruning.layer import weight_matrix

__all__ = ["record_conv1d"]


@torch.no_grad()
def record_conv1d(model: Any, folder: Path) -> None:
    """Name a saved model's Conv1D layers that are 2:4 along their input channels, as dense 2:4 layers are recorded."""
    layers = []
    for name, module in model.named_modules():
        if is_transposed(module):
            with align_module_device(module):
                if is_2of4(weight_matrix(module)):
                    layers.append(name)
    if not layers:
        return
    parameters = list(model.parameters())
    nonzero = sum(int(parameter.count_nonzero()) for parameter in parameters)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["sparsity_config"] = {
        "format": "dense",
        "global_sparsity": 1 - nonzero / sum(parameter.numel() for parameter in parameters),
        "ignore": [],
        "registry_requires_subclass": False,
        "sparsity_structure": "2:4",
        "targets": sorted({*content.get("sparsity_config", {}).get("targets", []), *layers}),
    }
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
