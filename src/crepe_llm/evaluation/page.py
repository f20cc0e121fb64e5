"""A report as one HTML page that needs no other file, and as a section of a model card."""

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

import jinja2

from crepe_llm.evaluation.model_card import REPORT_HEADING, removed_weights, total_zeros
from crepe_llm.evaluation.plots import plot_report
from crepe_llm.evaluation.report import PROMPTS, Measured, Report, gram_errors
from crepe_llm.model_files import ABOUT_WEIGHTS, CARD

__all__ = ["takes_files", "write_report"]

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .conditions { color: #555; font-size: .9rem; }
details { margin: 1rem 0; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<table id="summary">
<tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for label, cells in rows %}
<tr><th>{{ label }}</th>{% for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<p class="conditions">{{ conditions }}</p>
{% for figure in figures %}
<figure><img alt="{{ figure.alt }}" src="data:image/png;base64,{{ figure.data }}">
<figcaption>{{ figure.alt }}</figcaption></figure>
{% endfor %}
{% if training %}<p class="conditions">{{ training }}</p>{% endif %}
<h2>Completions</h2>
<p class="conditions">Greedy, at most 32 tokens.</p>
<table id="completions">
<tr><th>prompt</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for prompt, said in completions %}
<tr><td>{{ prompt }}</td>{% for text in said %}<td>{{ text }}</td>{% endfor %}</tr>
{% endfor %}
</table>
<details><summary>All layers</summary>
<table id="layers">
<tr><th>layer</th><th>d_out x d_in</th><th>zero</th>{% if errors %}<th>output error</th>{% endif %}</tr>
{% for layer in layers %}
<tr><td>{{ layer.name }}</td><td>{{ layer.shape[0] }} x {{ layer.shape[1] }}</td>
<td class="number">{{ "%.2f" | format(100 * layer.zeros) }} %</td>
{% if errors %}<td class="number">{% if layer.name in errors %}{{ "%.4f" | format(errors[layer.name]) }}{% endif %}</td>
{% endif %}</tr>
{% endfor %}
</table>
</details>
</body>
</html>
"""


def write_report(folder: Path, report: Report, page: Path) -> None:
    """Write a report's page, its figures into a model's folder, and links to them into the folder's model card.

    Where the folder takes no files (:func:`takes_files`), the page alone is written, with the figures in it.

    Raises:
        OSError: a file cannot be written.
    """
    beside = takes_files(folder)
    with tempfile.TemporaryDirectory() as scratch:
        place = folder if beside else Path(scratch)
        shown = plot_report(place, report)
        figures = [
            {"alt": alt, "data": base64.b64encode((place / name).read_bytes()).decode()} for name, alt in shown.items()
        ]
    text = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_PAGE)
    page.write_text(text.render(figures=figures, **_content(report)), encoding="utf-8")
    card = folder / CARD
    if beside and card.is_file():
        before = card.read_text(encoding="utf-8").partition(f"\n{REPORT_HEADING}\n")[0].rstrip()
        card.write_text(f"{before}\n\n{REPORT_HEADING}\n\n{_section(report, shown)}", encoding="utf-8")


def takes_files(folder: Path) -> bool:
    """Whether a report's figures, and links to them, can be written into a model's folder."""
    older = [path for name in ABOUT_WEIGHTS if (path := folder / name).exists()]
    return all(os.access(path, os.W_OK) for path in [folder, *older])


def _models(report: Report) -> list[Measured]:
    return [*([] if report.dense is None else [report.dense]), report.pruned]


def _content(report: Report) -> dict[str, Any]:
    models = _models(report)
    errors = {} if report.dense is None else gram_errors(report.dense.grams, report.pruned.grams)
    curve = report.curve
    return {
        "title": f"{report.pruned.name}, measured",
        "names": [model.name for model in models],
        "rows": _rows(report),
        "conditions": _conditions(report),
        "training": f"Trained on {curve.tokens:,} tokens in {curve.seconds / 60:.1f} minutes." if curve else "",
        "completions": list(zip(PROMPTS, zip(*(model.completions for model in models), strict=True), strict=True)),
        "layers": report.pruned.zeros,
        "errors": errors,
    }


def _rows(report: Report) -> list[tuple[str, list[str]]]:
    models = _models(report)
    rows = [
        ("perplexity", [f"{model.perplexity.perplexity:.2f}" for model in models]),
        ("zeros in linear layers", [f"{total_zeros(model.zeros):.2%}" for model in models]),
        ("size of the weights' files", ["" if m.bytes is None else f"{m.bytes / 1e6:.1f} MB" for m in models]),
    ]
    if report.dense is not None:
        removed = removed_weights(report.dense.zeros, report.pruned.zeros)
        if removed:
            rows.append(("weights that smaller matrices lack", ["", f"{removed:.2%}"]))
    return rows


def _conditions(report: Report) -> str:
    result = report.pruned.perplexity
    said = (
        f"Perplexity on {result.corpus}: {result.tokens} tokens predicted in {result.windows} windows of "
        f"{result.window}, weights in {result.dtype}."
    )
    if report.dense is None:
        return said
    return (
        f"{said} The error of a layer's outputs is that of their inner products between tokens, relative to the dense "
        "model's, each layer in its own model: errors of earlier layers are part of it."
    )


def _section(report: Report, shown: dict[str, str]) -> str:
    names = [model.name for model in _models(report)]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {label} | {' | '.join(cells)} |" for label, cells in _rows(report)]
    lines += ["", _conditions(report), ""]
    lines += [f"![{alt}]({name})" for name, alt in shown.items()]
    return "\n".join([*lines, ""])
