"""README's perplexities and their picture, from the benchmarks' records.

python scripts/readme_figures.py    prints the perplexities of README's table and draws docs/perplexity.png
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "perplexity.png"
_BEST = "CRePE + permutation + admm"
# What README calls the rows, and the records' name of the method.
_METHODS = {"dense": "dense", "Wanda": "Wanda", "SparseGPT": "SparseGPT", "our best recipe": _BEST}


def perplexities() -> dict[str, tuple[float, float]]:
    """Of each row of README's table the mean over the seeds and half the range, on the test articles."""
    values = {row: _pruned(method) for row, method in _METHODS.items()}
    values["after crepe recover"] = [
        record["perplexity"]["test"]
        for record in _records("recover")
        if (record["start"], record["method"], record["tokens"]) == (_BEST, "full", 400_000)
    ]
    return {row: (sum(each) / len(each), (max(each) - min(each)) / 2) for row, each in values.items()}


def in_words(mean: float, half_range: float) -> str:
    return f"{mean:.2f} ± {half_range:.2f}" if half_range else f"{mean:.2f}"


def draw(rows: dict[str, tuple[float, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots()
    means = [mean for mean, _ in rows.values()]
    colours = ["0.6" if row == "dense" else "C0" if "SparseGPT" in row or "Wanda" in row else "C2" for row in rows]
    bars = axes.barh(list(rows), means, xerr=[half for _, half in rows.values()], color=colours, capsize=2)
    axes.bar_label(bars, [in_words(*each) for each in rows.values()], padding=6)
    axes.invert_yaxis()
    axes.set(xlabel="perplexity of SmolLM2-135M at 2:4, lower is better", xlim=(0, 1.25 * max(means)))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _pruned(method: str) -> list[float]:
    return [
        record["perplexity"]
        for record in _records("methods")
        if record["method"] == method and record["structure"] in ("2:4", "") and record["split"] == "test"
    ]


def _records(benchmark: str) -> list[dict[str, Any]]:
    lines = (ROOT / "benchmarks" / "results" / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["model"] == "SmolLM2-135M-Instruct"]


if __name__ == "__main__":
    for row, value in perplexities().items():
        print(f"{row:<20} {in_words(*value)}")
    draw(perplexities(), PICTURE)
