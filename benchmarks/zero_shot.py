"""Zero-shot accuracy of 2:4 models by method, beside the dense model's.

    python benchmarks/zero_shot.py                                # both models, 500 questions a task
    python benchmarks/zero_shot.py --methods dense "CRePE + pcg" --questions 100

Models are pruned as in methods.py (one seed), saved, and scored by lm-evaluation-harness. Runs are appended to
--results as they finish, and not repeated.
"""

import argparse
import tempfile
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from crepe_llm import samples
from crepe_llm.evaluation.zero_shot import zero_shot
from method_recipes import METHODS, MODELS, runs_of
from method_runs import prune
from records import LEGEND, RESULTS, append, dagger, is_done, newest, read, read_old

# Raised by every change of a default or of how something is measured. 1: rows without provenance.
PROTOCOL = 2

DEFAULT = ["dense", "Wanda", "SparseGPT", "CRePE + PHO in stages", "CRePE + permutation + admm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=DEFAULT, metavar="METHOD", help="of: %(choices)s"
    )
    parser.add_argument("--questions", type=int, default=500, help="of each task, the first ones (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "zero_shot.jsonl")
    options = parser.parse_args()
    logger.remove()
    vars(options).update(
        structures=["2:4"], seeds=[0], split="none", windows=16, length=512, tokens=0, dtype="bfloat16"
    )
    questions = {task: rows[: options.questions] for task, rows in samples.questions().items()}

    records = read(options.results)
    keys = [key | {"asked": options.questions} for key in runs_of(options)]
    for key in tqdm([k for k in keys if not is_done(k, records, PROTOCOL)], unit=" runs"):
        model, tokenizer, _, _ = prune(key)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/model")
            tokenizer.save_pretrained(f"{folder}/model")
            scores = zero_shot(f"{folder}/model", questions, dtype=key["dtype"])
        records.append(append(options.results, PROTOCOL, key | {"scores": scores}))
    print(f"| model | method | {' | '.join(questions)} | mean |\n|{'---|' * (len(questions) + 3)}")
    found = newest(keys, records, read_old(options.results), PROTOCOL)
    for record in found:
        scores = record["scores"].values()
        cells = [f"{100 * score['acc']:.1f} ± {100 * score['acc_stderr']:.1f}" for score in scores]
        mean = 100 * sum(score["acc"] for score in scores) / len(questions)
        print(f"| {record['model']} | {record['method']} | {' | '.join(cells)} | {mean:.1f}{dagger([record])} |")
    print(
        f"\nAccuracy in percent ± standard error, zero-shot, lm-evaluation-harness: the first {options.questions} "
        "questions of BoolQ (dev), PIQA (validation) and OpenBookQA (test). 2:4, calibrated on 16 windows of 512 "
        "tokens, seed 0." + f" {LEGEND}" * bool(dagger(found))
    )


if __name__ == "__main__":
    main()
