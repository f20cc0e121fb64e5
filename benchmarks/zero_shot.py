"""Zero-shot accuracy of 2:4 models by method, and after recovery, beside the dense model's.

    python benchmarks/zero_shot.py                                # both models, all questions: hours
    python benchmarks/zero_shot.py --methods dense "CRePE + pcg" --questions 500
    python benchmarks/zero_shot.py --seeds 1 --methods dense Wanda --recovered 200000 --folder benchmark-models

Models are pruned as in methods.py, saved, and scored by lm-evaluation-harness. With --recovered the best stack after
training on so many tokens is scored, too: recover.py's folder, made where it is missing. Runs are appended
to --results as they finish, and not repeated.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from loguru import logger
from tqdm import tqdm

from crepe_llm import samples
from crepe_llm.evaluation.zero_shot import zero_shot
from method_recipes import METHODS, MODELS, runs_of
from method_runs import prune
from quantization import BEST, starts_of
from records import LEGEND, RESULTS, Row, append, dagger, is_done, newest, read, read_old
from recovered_models import pruned, recovered

# Raised by every change of a default or of how something is measured. 1: rows without provenance; 2: the first 500
# questions of three tasks.
PROTOCOL = 3

DEFAULT = ["dense", "Wanda", "SparseGPT", "CRePE", BEST]


def keys_of(options: argparse.Namespace) -> list[Row]:
    """The conditions of every run: those of methods.py, and those of recover.py for recovered models."""
    common: dict[str, Any] = {"structures": ["2:4"], "windows": 16, "length": 512, "dtype": "bfloat16"}
    asked = argparse.Namespace(**vars(options) | common | {"split": "none", "tokens": 0})
    trained = argparse.Namespace(**vars(options) | common | {"starts": [BEST], "methods": ["full"]})
    trained.tokens, trained.measured = options.recovered, 0
    keys = runs_of(asked) + [key for key in starts_of(trained) if key["method"]]
    return [key | {"asked": options.questions} for key in keys]


def score(key: Row, questions: dict[str, Any], folder: Path) -> Row:
    """Make the model of a run where it is missing, and score it."""
    if key.get("start"):
        made, _ = recovered(key, pruned(key, folder)[0], folder)
        return zero_shot(made, questions, dtype=key["dtype"])
    model, tokenizer, _, _ = prune(key)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(f"{scratch}/model")
        tokenizer.save_pretrained(f"{scratch}/model")
        return zero_shot(f"{scratch}/model", questions, dtype=key["dtype"])


def line_of(record: Row) -> str:
    """A line of the table: accuracies in percent, with their standard errors."""
    scores = record["scores"].values()
    cells = [f"{100 * score['acc']:.1f} ± {100 * score['acc_stderr']:.1f}" for score in scores]
    mean = 100 * sum(score["acc"] for score in scores) / len(scores)
    method = f"{record['start']}, {record['tokens']} tokens" if record.get("start") else record["method"]
    return f"| {record['model']} | {method} | {' | '.join(cells)} | {mean:.1f}{dagger([record])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=DEFAULT, metavar="METHOD", help="of: %(choices)s"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration windows (0)")
    parser.add_argument("--recovered", nargs="+", type=int, default=[], help="tokens of recoveries to score, too")
    parser.add_argument("--questions", type=int, help="of each task, the first ones (all)")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "zero_shot.jsonl")
    options = parser.parse_args()
    logger.remove()
    questions = {task: rows[: options.questions] for task, rows in samples.questions().items()}

    records, keys = read(options.results), keys_of(options)
    for key in tqdm([k for k in keys if not is_done(k, records, PROTOCOL)], unit=" runs"):
        records.append(append(options.results, PROTOCOL, key | {"scores": score(key, questions, options.folder)}))
    print(f"| model | method | {' | '.join(questions)} | mean |\n|{'---|' * (len(questions) + 3)}")
    found = newest(keys, records, read_old(options.results), PROTOCOL)
    print("\n".join(line_of(record) for record in found))
    print(
        "\nAccuracy in percent ± standard error, zero-shot, lm-evaluation-harness: "
        + ", ".join(f"{task} ({len(rows)})" for task, rows in questions.items())
        + f". 2:4, calibrated on 16 windows of 512 tokens, seed {', '.join(map(str, options.seeds))}."
        + (f" {LEGEND}" if any("provenance" not in record for record in found) else "")
    )


if __name__ == "__main__":
    main()
