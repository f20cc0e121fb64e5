"""`crepe compare`: perplexity, size and speed of several models in one table."""

import argparse
import importlib.util
import logging
from typing import Any

from crepe_llm.cli.common import HelpFormatter, require
from crepe_llm.cli.evaluate import add_test_text, texts_of
from crepe_llm.cli.models import MODEL_HELP, Model, add_loading, known_bytes, open_model, window_length
from crepe_llm.cli.quiet import quiet
from crepe_llm.cli.results import add_json, check_json, write_json

_logger = logging.getLogger(__name__)

_SPEED = ("tokens_per_s", "first_token_s")
_COLUMNS = (
    ("perplexity", "perplexity", "{:.2f}", 1),
    ("sparsity", "zeros", "{:.2%}", 1),
    ("bytes", "size, MB", "{:.1f}", 1e-6),
    ("tokens_per_s", "tokens/s", "{:.1f}", 1),
    ("first_token_s", "first token, s", "{:.3f}", 1),
)


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="put models side by side",
        description=(
            "Print one table: each model's perplexity, zeros in its linear layers, size of its weights' files, and, "
            "where vLLM is installed, its speed for one request with a prompt of 32 tokens."
        ),
        epilog=(
            "examples:\n"
            "  crepe compare smollm2 smollm2-2of4 smollm2-recovered --sample --tokens 8192 --window 512\n"
            "  crepe compare A B --text FILE --no-speed --json table.json\n"
        ),
        formatter_class=HelpFormatter,
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help=MODEL_HELP)
    parser.add_argument(
        "--speed",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure the speed in vLLM (if it is installed)",
    )
    add_test_text(parser)
    add_loading(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    require("compare", "transformers")
    if options.speed:
        require("compare --speed", "vllm", extra="serve")
    check_json(options)
    served = importlib.util.find_spec("vllm") is not None if options.speed is None else options.speed
    with quiet("compare", False, own=("compare", "perplexity on")):
        corpus, texts = texts_of(options)
        sources = [open_model(argparse.Namespace(**{**vars(options), "model": name})) for name in options.models]
        # Perplexities of windows of different lengths cannot be compared.
        length = min(window_length(options.window, source) for source in sources)
        rows = [_measured(options, source, (corpus, texts), length, served) for source in sources]
    width = max(len(row["model"]) for row in rows)
    columns = [column for column in _COLUMNS if any(row[column[0]] is not None for row in rows)]
    print(" " * width + "".join(f"  {title:>14}" for _, title, _, _ in columns))
    for row in rows:
        cells = ["" if row[name] is None else form.format(row[name] * unit) for name, _, form, unit in columns]
        print(f"{row['model']:<{width}}" + "".join(f"  {cell:>14}" for cell in cells))
    for conditions in dict.fromkeys(row["conditions"] for row in rows):
        names = [row["model"] for row in rows if row["conditions"] == conditions]
        of = "" if len(names) == len(rows) else f" of {', '.join(names)}"
        print(f"perplexity{of} on {corpus}, {conditions}")
    if not served:
        print("no speed: vLLM is not installed, or --no-speed was given")
    write_json(options, {"corpus": corpus, "models": rows})


def _measured(
    options: argparse.Namespace, source: Model, text: tuple[str, list[str]], length: int, served: bool
) -> dict[str, Any]:
    from crepe_llm import samples
    from crepe_llm.evaluation.model_card import linear_zeros, total_zeros
    from crepe_llm.evaluation.perplexity import perplexity

    windows = samples.token_windows(source.tokenizer, text[1], length, tokens=options.tokens)
    model = source.load(on_device=True)
    result = perplexity(model, windows, corpus=text[0])
    counted = f"{result.tokens} tokens predicted in {result.windows} windows of {result.window}"
    row = {
        "model": source.options.model,
        "perplexity": result.perplexity,
        "conditions": f"{counted}, {result.dtype}",
        "sparsity": total_zeros(linear_zeros(model)),
        "bytes": known_bytes(source.name),
    }
    del model
    return row | (_speed(source, options.speed) if served else dict.fromkeys(_SPEED))


def _speed(source: Model, asked: bool | None) -> dict[str, float | None]:
    """The figures of a model in vLLM; none, with a line, where it is not served and nobody has asked for them."""
    from crepe_llm.evaluation.throughput import Case, Engine, run

    try:
        case = run(Engine(source.name, source.name, "bfloat16"), [Case(32, 1)])["cases"][0]
    except RuntimeError as error:
        if asked:
            raise
        last = str(error).strip().splitlines()[-1]
        _logger.warning("no speed of %s: vLLM has not served it (%s)", source.options.model, last)
        return dict.fromkeys(_SPEED)
    return {name: case[name] for name in _SPEED}
