"""Records of benchmarks: one JSON object a line, each with what it takes to make it again.

A row holds the conditions of a run, its figures, the protocol's version and its provenance: commit, whether the tree
was clean, package versions, processor, date and command. Rows are never edited. A change of a default or of how
something is measured raises the benchmark's PROTOCOL; rows of an earlier protocol stay what they are.

Rows from before 2026-11-25 are in `results/before_provenance`. They have no provenance.
"""

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BEFORE_PROVENANCE = RESULTS / "before_provenance"
# What tables put beside figures of rows without provenance, and what they say about it below.
DAGGER = "†"
LEGEND = f"{DAGGER} from before records had a commit, a host and a date."
PACKAGES = ("crepe-llm", "torch", "transformers", "llmcompressor", "compressed-tensors", "vllm")

Row = dict[str, Any]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# Read once, at the start: the code that runs stays what it was when somebody commits meanwhile.
_COMMIT = _git("rev-parse", "HEAD")
# Rows that earlier runs appended change no code.
_CHANGES = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")


@functools.cache
def provenance() -> Row:
    """Where and with what this process runs."""
    return {
        "commit": _COMMIT,
        "clean": None if _CHANGES is None else _CHANGES == "",
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", *map(_without_folders, sys.argv)]),
    }


def processor() -> str:
    """The GPU's name where there is one, else the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def append(path: Path, protocol: int, row: Row) -> Row:
    """Add one row to a file; returns it with protocol and provenance."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    row = {"protocol": protocol, **row, "provenance": provenance() | {"date": date}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def read(path: Path) -> list[Row]:
    """The rows of a file, none where it does not exist."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def read_old(path: Path) -> list[Row]:
    """The rows without provenance that a benchmark with this file of results wrote earlier."""
    return read(BEFORE_PROVENANCE / path.name)


def is_done(key: Row, rows: list[Row], protocol: int) -> bool:
    """Whether a run under these conditions, the recipe's text among them, is recorded under this protocol."""
    wanted = {"protocol": protocol, **key}
    return any(wanted.items() <= row.items() for row in rows)


def newest(keys: list[Row], rows: list[Row], old: list[Row], protocol: int) -> list[Row]:
    """For each run its row under this protocol, else the last of those from before there was provenance."""
    found = []
    for key in keys:
        conditions = {name: value for name, value in key.items() if name != "recipe"}
        same = [row for row in rows if is_done(key, [row], protocol)]
        same = same or [row for row in old if conditions.items() <= row.items()]
        found += same[-1:]
    return found


def with_old(rows: list[Row], old: list[Row], protocol: int, cell: Sequence[str]) -> list[Row]:
    """The rows of this protocol, and before them the old ones whose cell has none.

    Args:
        rows: with provenance.
        old: without.
        protocol: whose rows count.
        cell: the fields that say which cell of a table a row belongs to.
    """
    new = [row for row in rows if row["protocol"] == protocol]
    seen = [[row.get(name) for name in cell] for row in new]
    return [row for row in old if [row.get(name) for name in cell] not in seen] + new


def dagger(rows: Iterable[Row]) -> str:
    """The mark of a cell with a row that has no provenance, else nothing."""
    return DAGGER if any("provenance" not in row for row in rows) else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _without_folders(argument: str) -> str:
    """A path inside the repository relative to it, another absolute one by its last part, and all else as it is."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
