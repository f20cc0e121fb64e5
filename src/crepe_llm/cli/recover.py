"""`crepe recover`: fine-tuning of a model that CFSP has cut."""

import argparse
from pathlib import Path
from typing import Any

from crepe_llm.cli.common import DTYPES, output_folder


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "recover",
        help="fine-tune a model that CFSP has cut",
        description=(
            "Train low-rank updates (LoRA) of a structurally pruned model on a text and merge them into its weights. "
            "Blocks get ranks by the importances that CFSP found. Interrupted, the same command goes on."
        ),
        epilog=(
            "examples:\n"
            "  crepe prune smollm2 --recipe cfsp_20 --sample --samples 16 --length 512 --output smollm2-cfsp\n"
            "  crepe recover smollm2-cfsp --sample --windows 256 --output smollm2-recovered\n"
            "  crepe recover DIR --text FILE --epochs 2 --output OUT\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="a checkpoint folder that CFSPModifier has made")
    parser.add_argument("--output", metavar="OUT", type=Path, required=True, help="a folder that does not exist yet")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", type=Path, help="train on a UTF-8 text file")
    text.add_argument("--sample", action="store_true", help="train on the sample Wikipedia articles")
    parser.add_argument("--windows", type=int, help="train on so many windows, spread over the text (all)")
    parser.add_argument("--length", type=int, default=512, help="tokens per window (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="how often each window is seen (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="mean LoRA rank of the blocks (%(default)s)")
    parser.add_argument(
        "--ranks",
        choices=("important", "unimportant", "uniform"),
        default="important",
        help="which blocks get more of it (%(default)s)",
    )
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="at the start (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows per step (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (as they are stored)")
    parser.add_argument("--seed", type=int, default=0, help="of start and order (%(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from crepe_llm import samples
    from crepe_llm.training.recovery import RecoverySettings, recover

    texts = samples.wikipedia().train if options.sample else [options.text.read_text(encoding="utf-8")]
    tokens = None if options.windows is None else options.windows * options.length
    settings = RecoverySettings(
        rank=options.rank,
        allocation=options.ranks,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch=options.batch,
        dtype=options.dtype,
        seed=options.seed,
    )
    work = options.output.absolute().parent / f".{options.output.name}-recovery"
    with output_folder(options.output) as folder:
        result = recover(
            options.model,
            folder,
            work,
            lambda tokenizer: samples.token_windows(tokenizer, texts, options.length, tokens=tokens),
            settings,
        )
    print(
        f"{options.output}: loss {result.first_loss:.4f} became {result.last_loss:.4f} in {result.steps} steps, "
        f"{result.seconds:.0f} s"
    )
