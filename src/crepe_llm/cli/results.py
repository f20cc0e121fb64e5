"""`--json`: the figures that a command prints, in a file as well."""

import argparse
import contextlib
import itertools
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from crepe_llm.cli.common import check_new_file

# The arguments that name what a command writes, as the user gives them.
_WRITTEN = {"json": "--json", "output": "--output", "study": "--study", "plot": "--plot", "destination": "OUT"}


def add_json(parser: Any) -> None:
    """The option `--json`; `check_json` goes before the work, `write_json` after it."""
    parser.add_argument(
        "--json", metavar="FILE", type=Path, default=None, help="also write the figures to this file, as JSON"
    )


def check_json(options: argparse.Namespace) -> None:
    """Raise OSError if the file cannot be written, or if a file that the command writes is also read, or written twice.

    That is asked of all that it writes, with or without `--json`.
    """
    check_new_file(options.json, "--json")
    given = vars(options)
    written = {_WRITTEN[name]: Path(given[name]) for name in _WRITTEN if given.get(name) is not None}
    for (name, path), (other, place) in itertools.combinations(written.items(), 2):
        if os.path.realpath(path) == os.path.realpath(place):
            raise FileExistsError(f"{name} {path} is what {other} names, too: name another file")
    others = [value for name, value in given.items() if name not in _WRITTEN]
    each = itertools.chain.from_iterable(value if isinstance(value, list) else [value] for value in others)
    read = [value for value in each if isinstance(value, str | Path)]
    for name, path in written.items():
        if path.exists() and any(os.path.isfile(value) and os.path.samefile(value, path) for value in read):
            raise FileExistsError(f"{name} {path} is a file that this command reads: name another file")


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
