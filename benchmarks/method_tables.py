"""The table and the plot of what methods.py has measured."""

import argparse
import statistics

from records import DAGGER, LEGEND, Row, dagger

# Of the plot's perplexities.
LARGEST_DRAWN = 2000


def cell(records: list[Row], model: str, method: str, structure: str) -> list[Row]:
    """The rows of one cell of the table, one per seed; the dense model belongs to every structure."""
    return [
        record
        for record in records
        if (record["model"], record["method"]) == (model, method) and record["structure"] in ("", structure)
    ]


def cell_text(rows: list[Row], seeds: int) -> str:
    """Mean over seeds ± half the range, and how many seeds there are where some are missing."""
    if not rows:
        return ""
    values = [row["perplexity"] for row in rows]
    mean = statistics.mean(values)
    digits = 2 if mean < 1000 else 0
    text = f"{mean:.{digits}f}{dagger(rows)}"
    if len(values) > 1:
        text += f" ± {(max(values) - min(values)) / 2:.{digits}f}"
    return text + f" ({len(values)})" * (1 < len(values) < seeds)


def is_variant(method: str) -> bool:
    """Whether a method is another one with settings that are not the default, as its name then says."""
    return "," in method or "steep" in method


def _method_row(records: list[Row], model: str, method: str, options: argparse.Namespace) -> str:
    """A method's line of the table; empty where nothing of it was measured."""
    found = [cell(records, model, method, structure) for structure in options.structures]
    texts = [cell_text(rows, len(options.seeds)) for rows in found]
    if not any(texts):
        return ""
    seconds = [r["seconds"] for r in records if (r["model"], r["method"]) == (model, method)]
    return f"| {method} | {' | '.join(texts)} | {statistics.median(seconds):.0f} |"


def table(records: list[Row], options: argparse.Namespace) -> str:
    """Markdown: for each model a row for each method and a column for each structure, then the same of the variants."""
    lines = []
    for title, variants in (("", False), (", other settings", True)):
        methods = [method for method in options.methods if is_variant(method) == variants]
        for model in options.models:
            rows = [row for method in methods if (row := _method_row(records, model, method, options))]
            if rows:
                lines += [f"\n{model}{title}:\n", f"| | {' | '.join(options.structures)} | seconds |"]
                lines += ["|---" * (len(options.structures) + 2) + "|", *rows]
    predicted = sorted({record["predicted"] for record in records})
    lines.append(
        f"\nPerplexity on Wikipedia {options.split} articles: {'/'.join(map(str, predicted))} tokens predicted in "
        f"windows of {options.length}, {options.dtype}. Calibrated on {options.windows} windows of {options.length} "
        f"tokens of other articles, seeds {', '.join(map(str, options.seeds))}: mean ± half the range. Seconds: median "
        "over structures and seeds, pruning and calibration." + f" {LEGEND}" * bool(dagger(records))
    )
    return "\n".join(lines)


def draw(records: list[Row], options: argparse.Namespace) -> None:
    """A dot for each run: perplexity by method, a colour for each structure, a panel for each model.

    An arrow at the edge stands for a perplexity above LARGEST_DRAWN, where no text is of any use. Runs without
    provenance are hollow.
    """
    from matplotlib.figure import Figure

    methods = [m for m in options.methods if any(r["method"] == m for r in records) and m != "dense"]
    figure = Figure(figsize=(6 * len(options.models), 1 + 0.3 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(options.models), squeeze=False, sharey=True)[0]
    colours = {structure: f"C{index}" for index, structure in enumerate(options.structures)}
    for axes, model in zip(panels, options.models, strict=True):
        for structure, colour in colours.items():
            axes.plot([], [], "o", color=colour, label=structure)
            for index, method in enumerate(methods):
                for row in cell(records, model, method, structure):
                    near, filled = row["perplexity"] <= LARGEST_DRAWN, not dagger([row])
                    style = {"color": colour, "alpha": 0.7, "fillstyle": "full" if filled else "none"}
                    axes.plot(min(row["perplexity"], LARGEST_DRAWN), index, "o" if near else ">", **style)
        axes.set(title=model, xscale="log", xlabel="perplexity", yticks=range(len(methods)), yticklabels=methods)
        axes.grid(axis="y", alpha=0.3)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(options.structures))
    if dagger(records):
        figure.suptitle(f"hollow: {LEGEND.removeprefix(DAGGER).strip()}", fontsize="small")
    figure.savefig(options.plot, dpi=100)
    print(f"\nplot: {options.plot}")
