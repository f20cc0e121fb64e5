"""`--json`: the figures that a command prints, in a file as well."""

import argparse
import contextlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from crepe_llm.cli.common import check_new_file


def add_json(parser: Any) -> None:
    """The option `--json`; `check_json` goes before the work, `write_json` after it."""
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=None, help="also write the figures to this file, as JSON"
    )


def check_json(options: argparse.Namespace) -> None:
    """Raise OSError if the file cannot be written, or is one that the command reads, or its output."""
    check_new_file(options.json, "--json")
    if options.json is None:
        return
    output = getattr(options, "output", None)
    if output is not None and options.json.resolve() == Path(output).resolve():
        raise FileExistsError(f"--json {options.json} is the folder of --output: name another file")
    if not options.json.exists():
        return
    for name, value in vars(options).items():
        read = name != "json" and isinstance(value, str | Path) and os.path.isfile(value)
        if read and os.path.samefile(value, options.json):
            raise FileExistsError(f"--json {options.json} is a file that this command reads: name another file")


def write_json(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Write the figures if the user has asked for it: a reader sees the old file or the whole new one.

    JSON has no infinity; such a number is written as null.
    A path that is no ordinary file (`/dev/stdout`, a pipe) is written to as it is.
    """
    if options.json is None:
        return
    content = json.dumps(_finite(figures), indent=2, default=str) + "\n"
    path = Path(os.path.realpath(options.json))
    if options.json.exists() and not path.is_file():
        options.json.write_text(content, encoding="utf-8")
        return
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
        os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
