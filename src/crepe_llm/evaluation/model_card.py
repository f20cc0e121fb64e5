"""The README.md that goes with a pruned model: what was done to it, by what, with which data."""

import dataclasses
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class LayerZeros:
    """A linear layer, its weight's [d_out, d_in], and the fraction of the weight that is exactly zero."""

    name: str
    shape: tuple[int, int]
    zeros: float


def linear_zeros(model: Any) -> list[LayerZeros]:
    """Count the zeros in every linear layer of a model, its output head left out.

    Includes GPT-2's Conv1D, whose weight is stored transposed.
    """
    layers = []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if module is head or not (transposed or isinstance(module, torch.nn.Linear)):
            continue
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.T.shape if transposed else weight.shape
        layers.append(LayerZeros(name, (rows, columns), 1 - weight.count_nonzero().item() / weight.numel()))
    return layers


def total_zeros(layers: Sequence[LayerZeros]) -> float:
    """The fraction of zeros among the weights of all layers together."""
    numel = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return sum(layer.zeros * layer.shape[0] * layer.shape[1] for layer in layers) / max(numel, 1)


def removed_weights(dense: Sequence[LayerZeros], pruned: Sequence[LayerZeros]) -> float:
    """The fraction of the weights of all layers together that smaller matrices no longer hold."""
    before, after = (sum(layer.shape[0] * layer.shape[1] for layer in layers) for layers in (dense, pruned))
    return 1 - after / max(before, 1)


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What was done to a model.

    Attributes:
        base_model: the id or name of the dense model.
        recipe: the recipe's file.
        dense: the layers before pruning (a dense weight may hold zeros of its own).
        pruned: the same layers after pruning.
        calibration: the calibration data in words: corpus, windows, length, seed.
        dtype: the dtype of the weights.
        command: the command that made the model.
    """

    base_model: str
    recipe: Path
    dense: Sequence[LayerZeros]
    pruned: Sequence[LayerZeros]
    calibration: str
    dtype: str
    command: str


def model_card(made: Pruning) -> str:
    """Return the model card of a pruned model, in Markdown with the hub's front matter; it quotes the recipe in full.

    Raises:
        OSError: the recipe cannot be read.
    """
    dense, pruned = made.dense, made.pruned
    changed = [after for before, after in zip(dense, pruned, strict=True) if after != before]
    removed = removed_weights(dense, pruned)
    smaller = f"Smaller matrices hold {removed:.2%} fewer weights than the dense model's. " if removed else ""
    lines = [
        "---",
        f"base_model: {made.base_model}",
        "library_name: transformers",
        "tags: [pruning, sparsity, crepe, llm-compressor]",
        "---",
        "",
        f"# {made.base_model}, pruned",
        "",
        f"{len(changed)} of {len(pruned)} linear layers were pruned; of the weights of all linear layers "
        f"{total_zeros(pruned):.2%} are zero ({total_zeros(dense):.2%} in the dense model). {smaller}Made by",
        "",
        f"    {made.command}",
        "",
        f"Calibration data: {made.calibration}. Weights: {made.dtype}.",
        "",
        f"## Recipe (`{made.recipe.name}`)",
        "",
        "```yaml",
        made.recipe.read_text().rstrip(),
        "```",
        "",
        "## Versions",
        "",
        "| package | version |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in _versions().items()),
        "",
        "## Realised sparsity",
        "",
        "| layer | d_out x d_in | zero | zero in the dense model |",
        "|---|---|---|---|",
        *(
            f"| {after.name} | {after.shape[0]} x {after.shape[1]} | {after.zeros:.2%} | {before.zeros:.2%} |"
            for before, after in zip(dense, pruned, strict=True)
        ),
        "",
    ]
    return "\n".join(lines)


def _versions() -> dict[str, Any]:
    packages = ("crepe-llm", "llmcompressor", "compressed-tensors", "transformers", "torch")
    return {name: importlib.metadata.version(name) for name in packages}
