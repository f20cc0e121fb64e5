"""Figures of a model, as PNG for its card and its report. They need matplotlib, and no display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crepe_llm.evaluation.report import Report, blocks_of, gram_errors
from crepe_llm.model_files import BLOCKS, ERRORS, LOSSES, ZEROS

__all__ = ["plot_losses", "plot_report"]

_KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def plot_losses(path: Path, losses: Sequence[float], held_out: Sequence[tuple[int, float]]) -> None:
    """Plot training loss by step, and the held-out losses (step, loss), in nats per token."""
    figure, axes = _figure()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_report(folder: Path, report: Report) -> dict[str, str]:
    """Write a report's figures into a folder; by file name what each shows."""
    shown = {ZEROS: "zeros of each linear layer's weights", BLOCKS: "weights by decoder block"}
    zeros = {layer.name: layer.zeros for layer in report.pruned.zeros}
    _by_layer(folder / ZEROS, zeros, "share of zeros")
    _by_block(folder / BLOCKS, report)
    if report.dense is not None:
        errors = gram_errors(report.dense.grams, report.pruned.grams)
        if errors:
            shown[ERRORS] = "error of each linear layer's outputs beside the dense model's"
            _by_layer(folder / ERRORS, errors, "relative error")
    if report.curve is not None:
        shown[LOSSES] = "training loss and held-out loss by step"
        plot_losses(folder / LOSSES, report.curve.losses, report.curve.held_out)
    return shown


def _by_layer(path: Path, values: dict[str, float], label: str) -> None:
    """One line for each kind of layer, over the layers of that kind in the model's order."""
    kinds: dict[str, list[float]] = {}
    for name, value in values.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(value)
    figure, axes = _figure()
    for kind in sorted(kinds, key=lambda kind: (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind)):
        axes.plot(range(len(kinds[kind])), kinds[kind], marker=".", linewidth=0.9, label=kind)
    axes.set(xlabel="layer of its kind, in the model's order", ylabel=label)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)


def _by_block(path: Path, report: Report) -> None:
    """Bars of the weights that each block keeps, and of the zeros among those that it holds."""
    figure, axes = _figure()
    blocks = blocks_of(report.pruned.zeros)
    places = range(len(blocks))
    if report.dense is not None:
        dense = [held / 1e6 for held, _ in blocks_of(report.dense.zeros).values()]
        axes.step(range(len(dense)), dense, where="mid", color="black", linewidth=0.9, label="dense model")
    kept = [kept / 1e6 for _, kept in blocks.values()]
    axes.bar(places, kept, label="not zero")
    axes.bar(places, [(held - kept) / 1e6 for held, kept in blocks.values()], bottom=kept, alpha=0.4, label="zero")
    axes.set(xlabel="decoder block", ylabel="million weights")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _figure() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes
