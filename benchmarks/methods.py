"""Perplexity and time of pruning methods and of what stacks with them, over calibration seeds.

    python benchmarks/methods.py                                            # everything; many hours on two cores
    python benchmarks/methods.py --structures 2:4 --models Gemma-3-270M     # a part of it
    python benchmarks/methods.py --split valid --seeds 0 --methods CRePE    # what choices may be made on
    python benchmarks/methods.py --report --plot docs/methods.png           # the table of what has been measured

Every run is one `oneshot` of a fresh model with a recipe. Runs are appended to --results as they finish, and not
repeated. "PHO in stages" is the search as it is; "CRePE + PHO" and what is "not verified" are the search as it was, of
which there are rows. `git worktree add FOLDER a2f28ac` makes a place to measure more of these.
"""

import argparse
from pathlib import Path

from loguru import logger
from tqdm import tqdm

from method_recipes import EARLIER, METHODS, MODELS, STRUCTURES, runs_of
from method_runs import run
from method_tables import draw, table
from records import RESULTS, append, is_done, newest, read, read_old

# Raised by every change of a default or of how something is measured. 1: rows without provenance. 2: a mask is what was
# chosen, not what is not zero, so that weights that are zero in the dense model may be kept and refitted.
PROTOCOL = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    # Those that tell about PHO only (docs/pho.md) are measured where they are named.
    named = [method for method in METHODS if not any(words in method for words in ("PHO", "per row"))]
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=named, metavar="METHOD", help="of: %(choices)s"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--split", choices=["test", "valid"], default="test", help="articles to measure on")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of every window (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the model")
    parser.add_argument("--tokens", type=int, default=8192, help="measured on (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "methods.jsonl")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--plot", type=Path, help="draw the table there")
    options = parser.parse_args()
    logger.remove()

    runs, records = runs_of(options), read(options.results)
    if not options.report:
        missing = [key for key in runs if not is_done(key, records, PROTOCOL)]
        gone = sorted({key["method"] for key in missing} & EARLIER)
        if gone:
            print(f"not measured, as only a2f28ac makes them: {', '.join(gone)}")
        missing = [key for key in missing if key["method"] not in EARLIER]
        for key in (bar := tqdm(missing, unit=" runs")):
            bar.set_description(f"{key['model']}, {key['structure']}, {key['method']}, seed {key['seed']}")
            records.append(append(options.results, PROTOCOL, run(key)))
    wanted = newest(runs, records, read_old(options.results), PROTOCOL)
    if not wanted:
        raise SystemExit(f"{options.results} holds no run that these options ask for")
    print(table(wanted, options))
    if options.plot is not None:
        draw(wanted, options)


if __name__ == "__main__":
    main()
