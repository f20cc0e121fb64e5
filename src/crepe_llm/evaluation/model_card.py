"""The README.md that goes with a pruned model: what was done to it, by what, with which data."""

import dataclasses
import importlib.metadata
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from crepe_llm.functional.masks import nonzero
from crepe_llm.model_files import CARD, RECOVERY, RECOVERY_PLOT
from crepe_llm.models.linear import is_linear, is_transposed

REPORT_HEADING = "## Report"  # of the section that a report adds to a card, its end


@dataclasses.dataclass(frozen=True)
class LayerZeros:
    """A linear layer, its weight's [d_out, d_in], and the fraction of the weight that is exactly zero."""

    name: str
    shape: tuple[int, int]
    zeros: float


def linear_zeros(model: Any) -> list[LayerZeros]:
    """Count the zeros in every linear layer of a model, its output head left out.

    Includes GPT-2's Conv1D, whose weight is stored transposed. The experts of a block count as one layer, because
    pruning may take them apart or put them together.
    """
    layers = []
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layers.append(_experts_zeros(name, module, model.config.get_text_config().hidden_size))
        if ".experts." in name or module is head or not is_linear(module):
            continue
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, columns = weight.T.shape if is_transposed(module) else weight.shape
        layers.append(LayerZeros(name, (rows, columns), _zeros(int(nonzero(weight).sum()), weight.numel())))
    return layers


def _experts_zeros(name: str, experts: torch.nn.Module, columns: int) -> LayerZeros:
    weights = [weight for kind, weight in experts.named_parameters() if weight.dim() > 1 and not kind.endswith("bias")]
    numel = sum(weight.numel() for weight in weights)
    kept = sum(int(nonzero(weight).sum()) for weight in weights)
    return LayerZeros(name, (numel // columns, columns), _zeros(kept, numel))


def _zeros(kept: int, numel: int) -> float:
    """The fraction of zeros; 0 in a weight without any entries."""
    return 1 - kept / numel if numel else 0.0


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
        recipe_text: what was in it before the run; it may have been changed or removed since.
        dense: the layers before pruning (a dense weight may hold zeros of its own).
        pruned: the same layers after pruning.
        calibration: the calibration data in words: corpus, windows, length, seed.
        dtype: the dtype of the weights.
        command: the command that made the model.
    """

    base_model: str
    recipe: Path
    recipe_text: str
    dense: Sequence[LayerZeros]
    pruned: Sequence[LayerZeros]
    calibration: str
    dtype: str
    command: str


def model_card(made: Pruning) -> str:
    """Return the model card of a pruned model, in Markdown with the hub's front matter; it quotes the whole recipe."""
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
        made.recipe_text.rstrip(),
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


@dataclasses.dataclass(frozen=True)
class Recovery:
    """What was done to a pruned model by `crepe recover --teacher`.

    Attributes:
        source: the pruned model's folder.
        teacher: the id or name of the dense model.
        text: what was trained on, in words; empty where the teacher wrote all of it.
        settings: of the training, a dataclass.
        losses: of each step.
        held_out: step and held-out loss of each evaluation.
        best_step: whose state was written.
        tokens: that were trained on.
        seconds: that it took.
        command: the command that made the model.
    """

    source: Path
    teacher: str
    text: str
    settings: Any
    losses: Sequence[float]
    held_out: Sequence[tuple[int, float]]
    best_step: int
    tokens: int
    seconds: float
    command: str


def write_recovery_card(folder: Path, made: Recovery) -> None:
    """Write the model card of a recovered model, its losses as JSON, and their curve where matplotlib is installed.

    The pruned model's own card, if it has one, is the end of it.
    """
    figures = {name: getattr(made, name) for name in ("losses", "held_out", "best_step", "tokens", "seconds")}
    (folder / RECOVERY).write_text(json.dumps(figures), encoding="utf-8")
    plot = _plot_losses(folder / RECOVERY_PLOT, made)
    settings = {name: value for name, value in dataclasses.asdict(made.settings).items() if value is not None}
    written = settings.get("self_generated", 0)
    texts = [made.text] * bool(made.text) + [f"{written:,} tokens that the teacher wrote"] * bool(written)
    lines = [
        "---",
        f"base_model: {made.teacher}",
        "library_name: transformers",
        "tags: [pruning, sparsity, distillation, crepe]",
        "---",
        "",
        f"# {made.teacher}, pruned and recovered",
        "",
        f"The weights that `{made.source.name}` keeps, its norms and its biases were trained on the predictions of "
        f"{made.teacher}; its masks are as they were. Made by",
        "",
        f"    {made.command}",
        "",
        f"Teacher: {made.teacher}. Text: {' and '.join(texts)}. {made.tokens:,} tokens, repetitions included, in "
        f"{len(made.losses)} steps and {made.seconds / 60:.1f} minutes. The state is that of step {made.best_step}.",
        "",
        *([f"![training loss and held-out loss by step]({RECOVERY_PLOT})", ""] if plot else []),
        "| step | held-out loss |",
        "|---|---|",
        *(f"| {step} | {loss:.4f} |" for step, loss in made.held_out),
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        "## Versions of the recovery",
        "",
        "| package | version |",
        "|---|---|",
        *(f"| {name} | {version} |" for name, version in _versions().items()),
        "",
    ]
    before = made.source / CARD
    if before.is_file():
        card = before.read_text(encoding="utf-8", errors="replace").partition(f"\n{REPORT_HEADING}\n")[0]
        lines += [_without_front_matter(card).strip(), ""]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _plot_losses(path: Path, made: Recovery) -> bool:
    """Plot training and held-out loss by step; whether that could be done."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from crepe_llm.evaluation.plots import plot_losses

    plot_losses(path, made.losses, made.held_out)
    return True


def _without_front_matter(card: str) -> str:
    parts = card.split("---\n", 2)
    return parts[2] if len(parts) == 3 and not parts[0].strip() else card


def _versions() -> dict[str, Any]:
    packages = ("crepe-llm", "llmcompressor", "compressed-tensors", "transformers", "torch")
    return {name: version for name in packages if (version := _version(name))}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
