"""Models with random 2:4 weights, written as checkpoints: for measuring and testing a server, never for quality."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file

from crepe_llm.checkpoints.experts import matrices_of
from crepe_llm.checkpoints.formats import SPARSE_24_BITMASK

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PAIRS = torch.zeros(6, 4, dtype=torch.bool)
for _row, _pair in enumerate(itertools.combinations(range(4), 2)):
    _PAIRS[_row, list(_pair)] = True
_UNPRUNED = re.compile(r"embed|lm_head|norm|\.gate\.weight$|\.router\.")
_QUANTIZED = {"int8": (127.0, "int-quantized", "int"), "fp8": (448.0, "float-quantized", "float")}


def write_random_model(
    config: "PretrainedConfig",
    folder: str | Path,
    *,
    sparse: bool,
    dtype: torch.dtype = torch.bfloat16,
    quantization: Literal["int8", "fp8"] | None = None,
    dense_layers: Sequence[str] = (),
) -> Path:
    """Writes a model with normal weights of standard deviation ``config.initializer_range``, its linear layers 2:4.

    Two calls that differ in ``sparse`` alone write the same weights, once compressed and once plain.

    Args:
        config: the transformers config, with ``architectures`` set.
        folder: where to write ``config.json`` and ``model.safetensors``; made if need be.
        sparse: store the linear weights as ``sparse-24-bitmask``; else as plain weights with the same zeros.
        dtype: of weights that are not quantized.
        quantization: W8A8 on the 2:4 weights: symmetric, a scale per row; inputs are scaled per token at run time.
        dense_layers: regular expressions; linear weights whose name matches one are neither pruned nor quantized.

    Returns:
        ``folder``, as a path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    keep_dense = re.compile("|".join(dense_layers)) if dense_layers else None
    tensors: dict[str, torch.Tensor] = {}
    unquantized = ["lm_head"] if config.tie_word_embeddings else []
    for name, shape in shapes_of(config).items():
        weight = torch.empty(*shape).normal_(0.0, config.initializer_range, generator=generator).to(dtype)
        if "norm" in name:
            weight += 1.0 if config.model_type != "gemma3_text" else 0.0
        layer = name.removesuffix(".weight")
        linear = weight.ndim == 2 or (weight.ndim == 3 and matrices_of(layer))
        if not linear or _UNPRUNED.search(name) or (keep_dense is not None and keep_dense.search(name)):
            tensors[name] = weight
            if weight.ndim == 2 and "embed" not in name:
                unquantized.append(layer)
            continue
        choice = torch.randint(0, 6, (*shape[:-1], shape[-1] // 4), generator=generator, dtype=torch.int32)
        keep = _PAIRS[choice].view(*shape)
        weight.mul_(keep)
        if quantization is not None:
            weight, tensors[f"{layer}.weight_scale"] = _quantize(weight, quantization)
        if sparse:
            parts = SPARSE_24_BITMASK.pack(weight, keep)
            tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    description = config.to_dict()
    description["dtype"] = str(dtype).removeprefix("torch.")
    if sparse or quantization is not None:
        description["quantization_config"] = _quantization_config(sparse, quantization, unquantized)
    (folder / "config.json").write_text(json.dumps(description, indent=1))
    return folder


def shapes_of(config: "PretrainedConfig") -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors that transformers' model of ``config`` is saved as.

    Those are a published checkpoint's: of a mixture of experts one matrix for each expert (Mixtral, Qwen2-MoE), or all
    experts of a layer in one (GraniteMoE).
    """
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    stored = revert_weight_conversion(model, state)
    # In the model's own order, as random weights depend on it; what a checkpoint names otherwise comes last.
    return {name: tuple(stored[name].shape) for name in dict.fromkeys([*(n for n in state if n in stored), *stored])}


def _quantize(weight: torch.Tensor, quantization: str) -> tuple[torch.Tensor, torch.Tensor]:
    largest = _QUANTIZED[quantization][0]
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / largest
    scaled = weight.float() / scale
    return (scaled.round().to(torch.int8) if quantization == "int8" else scaled.to(torch.float8_e4m3fn)), scale


def _quantization_config(sparse: bool, quantization: str | None, unquantized: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = {"quant_method": "compressed-tensors", "version": "0.14.0", "transform_config": {}}
    if sparse:
        made["sparsity_config"] = {
            "format": SPARSE_24_BITMASK.name,
            "ignore": unquantized,
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        }
    if quantization is not None:
        _, form, kind = _QUANTIZED[quantization]
        common = {"num_bits": 8, "type": kind, "symmetric": True}
        made |= {
            "format": form,
            "quantization_status": "compressed",
            "ignore": unquantized,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {**common, "strategy": "channel", "dynamic": False},
                    "input_activations": {**common, "strategy": "token", "dynamic": True},
                }
            },
        }
    return made
