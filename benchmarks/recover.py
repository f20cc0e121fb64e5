"""Recovery by distillation: perplexity against tokens and minutes, by start, method and seed.

    python benchmarks/recover.py                                              # both models, 2:4, all starts
    python benchmarks/recover.py --models SmolLM2-135M-Instruct --starts "CRePE + permutation + admm" --tokens 200000
    python benchmarks/recover.py --structures 50% 70% --starts CRePE --methods full lora
    python benchmarks/recover.py --self-generated 200000 --tokens 400000      # with text that the teacher writes
    python benchmarks/recover.py --report

A start is a method of methods.py: its model is pruned once a seed, kept in --folder and measured as it is (the rows of
0 tokens). It then learns from the dense model on the training articles. Each row has the perplexity on the test and the
validation articles and on news, a corpus that is not Wikipedia. Rows are appended to --results as they are made, and
not made twice; a run that was interrupted goes on from its last checkpoint.
"""

import argparse
import shutil
import statistics
from pathlib import Path

import torch
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from method_recipes import METHODS, MODELS, STRUCTURES, runs_of
from records import RESULTS, Row, append, is_done, read
from recovered_models import CORPORA, TRAINING, add_model_options, measure, pruned, recovered

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1

STARTS = ["CRePE", "CRePE + pcg", "CRePE + permutation + admm"]


def starts_of(options: argparse.Namespace) -> list[Row]:
    """The conditions of every start, and of the dense models, as methods.py has them."""
    asked = argparse.Namespace(**vars(options) | {"methods": ["dense", *options.starts], "split": "test"})
    asked.tokens = options.measured
    return [{name: value for name, value in run.items() if name != "split"} for run in runs_of(asked)]


def keys_of(options: argparse.Namespace) -> list[Row]:
    """The conditions of every row: those of its start, and those of its training."""
    keys = []
    for start in starts_of(options):
        run = {name: value for name, value in start.items() if name not in ("method", "tokens")}
        run |= {"start": start["method"], "measured": start["tokens"]}
        keys.append(run | {"method": "", "tokens": 0})
        if start["method"] == "dense":
            continue
        rate = "learning_rate" if options.relative_rate is None else "relative_rate"
        training = {name: getattr(options, name) for name in (rate, *TRAINING)}
        keys += [
            run
            | {"method": method, "tokens": tokens}
            | {k: v for k, v in training.items() if k != "rank" or method == "lora"}
            for method in options.methods
            for tokens in options.tokens
        ]
    return keys


def row_of(key: Row, options: argparse.Namespace) -> Row:
    """Prune, recover where the key names a method, and measure."""
    dense = MODELS[key["model"]]()
    if key["start"] == "dense":
        source, row = dense, dict(key)
    else:
        source, seconds = pruned(key, options.folder)
        row = key | {"pruning_s": seconds}
    if key["method"]:
        source, report = recovered(key, source, options.folder)
        row |= report
    tokenizer = AutoTokenizer.from_pretrained(dense)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, key["dtype"])).eval()
    row |= measure(model, tokenizer, key["length"], key["measured"])
    if key["method"] and not options.keep:
        shutil.rmtree(source)
        source.with_name(f"{source.name}.json").unlink()
    return row


def mean_of(rows: list[Row], corpus: str) -> str:
    """Mean over seeds and half the range between the lowest and the highest."""
    values = [row["perplexity"][corpus] for row in rows]
    if not values:
        return ""
    spread = f" ± {(max(values) - min(values)) / 2:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table(rows: list[Row], options: argparse.Namespace) -> str:
    """Markdown: a line for each model, structure, start, method and budget; means over seeds."""
    lines = ["| model | structure | start | method | rate | tokens | test | validation | news | minutes |"]
    lines.append("|---" * 10 + "|")
    cells = list(dict.fromkeys(tuple(row.get(name) for name in _CELL) for row in rows))
    for cell in cells:
        mine = [row for row in rows if tuple(row.get(name) for name in _CELL) == cell]
        seconds = [row["training_s"] for row in mine if "training_s" in row]
        model, structure, start, method, tokens, absolute, relative = cell
        rate = f"{relative:g}, relative" if relative else f"{absolute:g}" if absolute else ""
        minutes = f"{statistics.mean(seconds) / 60:.0f}" if seconds else ""
        figures = " | ".join(mean_of(mine, corpus) for corpus in CORPORA)
        lines.append(
            f"| {model} | {structure} | {start} | {method} | {rate} | {tokens or ''} | {figures} | {minutes} |"
        )
    lines.append(
        f"\nPerplexity on {options.measured} tokens of the test and validation articles and of ABC news, in windows of "
        f"{options.length}; mean ± half the range over seeds {', '.join(map(str, options.seeds))} of calibration and "
        "training. Minutes are those of the training on the processor that the rows name."
    )
    return "\n".join(lines)


_CELL = ("model", "structure", "start", "method", "tokens", "learning_rate", "relative_rate")


def plot(rows: list[Row], path: Path) -> None:
    """Test perplexity against tokens, a line for each start and method, a panel for each model and structure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((row["model"], row["structure"]) for row in rows if row["start"] != "dense"))
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (model, structure) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        mine = [row for row in rows if row["model"] == model and row["structure"] == structure]
        for start in dict.fromkeys(row["start"] for row in mine):
            for method in dict.fromkeys(row["method"] for row in mine if row["start"] == start and row["method"]):
                points: dict[int, list[float]] = {}
                for row in mine:
                    if row["start"] == start and row["method"] in ("", method):
                        points.setdefault(row["tokens"], []).append(row["perplexity"]["test"])
                ordered = sorted((tokens, statistics.mean(values)) for tokens, values in points.items())
                axes.plot(*zip(*ordered, strict=True), marker="o", label=f"{start}, {method}")
        dense = [row["perplexity"]["test"] for row in rows if row["model"] == model and row["start"] == "dense"]
        if dense:
            axes.axhline(dense[0], color="grey", linestyle="--", label="dense")
        axes.set(title=f"{model}, {structure}", xlabel="tokens trained on", ylabel="test perplexity", yscale="log")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=["2:4"])
    parser.add_argument(
        "--starts", nargs="+", choices=METHODS, default=STARTS, metavar="METHOD", help="of: %(choices)s"
    )
    parser.add_argument("--methods", nargs="+", choices=["full", "lora"], default=["full"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[50_000, 200_000], help="budgets of the training")
    parser.add_argument("--self-generated", type=int, help="tokens that the teacher writes (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="the same for all weights (%(default)s)")
    parser.add_argument("--relative-rate", type=float, help="instead: a share of each weight's root mean square")
    parser.add_argument("--batch", type=int, help="windows a step (%(default)s)")
    parser.add_argument("--warmup", type=int, help="steps (%(default)s)")
    parser.add_argument("--rank", type=int, help="of LoRA (%(default)s)")
    parser.set_defaults(**TRAINING)
    add_model_options(parser)
    parser.add_argument("--keep", action="store_true", help="keep the recovered models, too")
    parser.add_argument("--results", type=Path, default=RESULTS / "recover.jsonl")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="draw perplexity against tokens there")
    options = parser.parse_args()
    logger.remove()
    keys, rows = keys_of(options), read(options.results)
    missing = [] if options.report else [key for key in keys if not is_done(key, rows, PROTOCOL)]
    for key in tqdm(missing, unit=" runs"):
        rows.append(append(options.results, PROTOCOL, row_of(key, options)))
    found = [row for key in keys for row in rows if is_done(key, [row], PROTOCOL)]
    print(table(found, options))
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
