"""`crepe report`: a page of figures of a pruned model, beside its dense model."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crepe_llm.cli.common import HelpFormatter, check_new_file, require
from crepe_llm.cli.evaluate import add_test_text, texts_of
from crepe_llm.cli.models import Model, add_loading, known_bytes, open_model
from crepe_llm.cli.models import window_length as window_of
from crepe_llm.cli.quiet import quiet
from crepe_llm.cli.results import add_json, check_json, write_json
from crepe_llm.model_files import PAGE

if TYPE_CHECKING:
    from crepe_llm.evaluation.report import Measured

# What `--report` of other commands measures on: enough to tell models apart, in a minute or two.
_TOKENS, _WINDOW = 8192, 512


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="draw a page of figures for a pruned model",
        description=(
            "Write one HTML page that needs no other file: realised sparsity by layer, weights by block, perplexity "
            "with its conditions, sizes, loss curves of a recovery, and completions. With --dense, the dense model's "
            "figures stand beside, and each layer's output error. The plots are also written as PNG into the folder, "
            "and linked from its model card, where that can be written."
        ),
        epilog="example:\n  crepe report smollm2-2of4 --dense smollm2 --sample --tokens 8192 --window 512\n",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", metavar="DIR", type=Path, help="the pruned model's folder")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model that was pruned")
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"the page (DIR/{PAGE})")
    add_test_text(parser)
    add_loading(parser)
    add_json(parser)
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Test:
    """What is measured on.

    Attributes:
        corpus: what the text is.
        texts: the text.
        window: tokens per window; None for 2048 or the model's context.
        tokens: about how many; None for all.
    """

    corpus: str
    texts: list[str]
    window: int | None
    tokens: int | None


def check_report(command: str) -> None:
    """Raise ImportError, naming the extra, if the packages that a report needs are not there."""
    require(command, "matplotlib", "transformers", extra="recover")


def add_report(parser: Any) -> None:
    """The option of other commands that also want a report of what they made."""
    parser.add_argument(
        "--report", action="store_true", default=False, help=f"afterwards write OUTPUT/{PAGE}, as `crepe report` does"
    )


def own_test(options: argparse.Namespace, used: tuple[str, list[str]], what: str, length: int) -> Test:
    """What a model is measured on that was made with a text: sample articles of the test part, or that text itself.

    Args:
        options: of the command that made it.
        used: the text with its name.
        what: the text was for.
        length: tokens per window there.
    """
    window = min(length, _WINDOW)
    if options.sample:
        from crepe_llm import samples

        sample = samples.wikipedia()
        return Test(f"{sample.name}, test", sample.test, window, _TOKENS)
    return Test(f"{used[0]} (the {what} text itself)", used[1], window, _TOKENS)


def run(options: argparse.Namespace) -> None:
    check_report("report")
    options.output = page = options.output or options.model / PAGE
    check_json(options)
    if not options.model.is_dir():
        raise NotADirectoryError(f"{options.model} is not a folder: name the folder of a pruned model")
    check_new_file(page, "--output")
    with quiet("report", False, own=("report", "perplexity on")):
        test = Test(*texts_of(options), options.window, options.tokens)
        figures = make_report(options, options.model, options.dense, test, page)
    from crepe_llm.evaluation.page import takes_files

    place = f"its plots are in {options.model}" if takes_files(options.model) else f"{options.model} takes no plots"
    print(f"{page}: the report; {place}")
    print(f"perplexity: {', '.join(f'{name} {value:.4f}' for name, value in figures['perplexity'].items())}")
    write_json(options, {"model": options.model, "dense": options.dense, "report": page, **figures})


def make_report(options: argparse.Namespace, folder: Path, dense: str | None, test: Test, page: Path) -> dict[str, Any]:
    """Measure a folder's model and the dense one, and write the page; the figures that both commands print.

    Args:
        options: of `open_model`.
        folder: the pruned model's.
        dense: the dense model, where it is to stand beside.
        test: what is measured on.
        page: the file to write.
    """
    from crepe_llm.evaluation.page import write_report
    from crepe_llm.evaluation.report import Report, gram_errors, read_curve
    from crepe_llm.models.parent import check_config, check_tokenizers

    curve = read_curve(folder)
    sources = [
        open_model(argparse.Namespace(**{**vars(options), "model": name}))
        for name in (str(folder), *([] if dense is None else [dense]))
    ]
    if dense is not None:
        ours, theirs = sources
        check_config(ours.config, theirs.config, folder, f"--dense {dense}")
        check_tokenizers(ours.tokenizer, theirs.tokenizer, folder, f"--dense {dense}")
    pruned, *others = (_measured(source, test) for source in sources)
    beside = others[0] if others else None
    write_report(folder, Report(pruned, beside, curve), page)
    values = [model.perplexity.perplexity for model in (pruned, beside) if model is not None]
    errors = {} if beside is None else gram_errors(beside.grams, pruned.grams)
    return {"perplexity": dict(zip(("pruned", "dense"), values, strict=False)), "output_errors": errors}


def _measured(source: Model, test: Test) -> "Measured":
    from crepe_llm import samples
    from crepe_llm.evaluation.report import measure

    length = window_of(test.window, source)
    windows = samples.token_windows(source.tokenizer, test.texts, length, tokens=test.tokens)
    folder = Path(source.name)
    shown = folder.resolve().name if folder.is_dir() else source.name
    model = source.load(on_device=True)
    return measure(shown, model, source.tokenizer, windows, test.corpus, known_bytes(source.name))
