"""The `crepe` command.

A subcommand is a function that adds its parser and sets `run`, listed in `_SUBCOMMANDS`. What it needs beyond the
standard library is imported inside `run`, so that `crepe --help` is instant and asks for no extra.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from crepe_llm import __version__
from crepe_llm.cli import (
    compare,
    completion,
    convert,
    demo,
    doctor,
    evaluate,
    prune,
    recipes,
    recover,
    report,
    search,
    serve,
)
from crepe_llm.cli.common import HelpFormatter

_SUBCOMMANDS: tuple[Callable[[Any], None], ...] = (
    prune.add,
    search.add,
    recover.add,
    evaluate.add,
    report.add,
    compare.add,
    serve.add,
    convert.add_compress,
    convert.add_decompress,
    recipes.add,
    doctor.add,
    demo.add,
    completion.add,
)
_NOBODY_READS = 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, as `crepe --help` lists them; an error is said in one line.

    `CREPE_TRACEBACK=1` in the environment shows where an error comes from.
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it ends, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _NOBODY_READS


def _run(arguments: Sequence[str] | None) -> int:
    options = parser().parse_args(arguments)
    options.command_line = shlex.join(["crepe", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.run(options)
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("CREPE_TRACEBACK"):
            raise
        print(f"crepe: error: {_one_line(error)}", file=sys.stderr)
        _print_notes(error)
        return 2
    except KeyboardInterrupt as interrupt:
        print("crepe: interrupted", file=sys.stderr)
        _print_notes(interrupt)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = argparse.ArgumentParser(
        prog="crepe",
        description="Prune language models with CRePE recipes, measure what is left of them, and serve it.",
        epilog=(
            "examples, in the order of use (none of them needs a model hub):\n"
            "  crepe doctor\n"
            "  crepe recipes\n"
            "  crepe evaluate smollm2 --sample --tokens 16384\n"
            "  crepe search smollm2 --sample --samples 16 --length 512 --study smollm2-2of4.json\n"
            "  crepe prune smollm2 --recipe crepe_2of4 --sample --samples 16 --length 512 --output smollm2-2of4\n"
            "  crepe evaluate smollm2-2of4 --sample --tokens 16384\n"
            "  crepe report smollm2-2of4 --dense smollm2 --sample --tokens 16384\n"
            "  crepe serve smollm2-2of4\n"
            "\n"
            "exit status:\n"
            "  0    it is done\n"
            "  2    an error, said in one line: options, files, models or recipes that do not fit, or a failure\n"
            "       (CREPE_TRACEBACK=1 in the environment shows where it comes from)\n"
            "  130  interrupted (Ctrl-C)\n"
            "  141  what reads the output has ended before it (as `head` does)\n"
            "`crepe serve` ends with the status of vLLM's server.\n"
        ),
        formatter_class=HelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"crepe-llm {__version__}")
    subparsers = made.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in _SUBCOMMANDS:
        add(subparsers)
    return made


def _print_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()):
        print(f"crepe: {note}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    """What an error says; with its type where that is no error of an argument, a file or a missing package."""
    text = " ".join(str(error).split())
    if text and (isinstance(error, ValueError | OSError | ImportError) or type(error).__name__ == "SampleError"):
        return text
    return f"{type(error).__name__}: {text} (CREPE_TRACEBACK=1 shows where)"


if __name__ == "__main__":
    sys.exit(main())
