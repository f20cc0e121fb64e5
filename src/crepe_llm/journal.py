"""What a long run has finished, kept in a folder, so that a run that was killed goes on from there.

A run is given a journal by :func:`keeping`; modifiers read and write the active one. Each entry is complete or absent.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from crepe_llm import processes

__all__ = ["Journal", "active", "keeping"]

_HEAD = "run.json"


class Journal:
    """The finished parts of one run.

    Args:
        folder: where they are kept; it is made if it is not there.
        run: what decides the result of the run, as JSON holds it.

    Raises:
        ValueError: if the folder holds the parts of another run, or something else.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        if processes.is_first():
            if folder.is_file():
                raise ValueError(
                    f"{folder}, where finished blocks belong, is a file: remove it, or give another --output"
                )
            folder.mkdir(exist_ok=True)
            head = folder / _HEAD
            wanted = {name: _in_short(value) for name, value in run.items()}
            if head.exists():
                _compare(folder, _head_of(head), wanted)
            elif any(not path.name.startswith(".") for path in folder.iterdir()):
                raise ValueError(f"{folder} holds no run's finished blocks: remove it, or give another --output")
            else:
                _write_whole(head, json.dumps(wanted, indent=2).encode())
        processes.wait()

    def __len__(self) -> int:
        return len(self._files(""))

    @property
    def bytes(self) -> int:
        """How much is kept."""
        return sum(path.stat().st_size for path in self._files(""))

    def read(self, key: str) -> dict[str, Any] | None:
        """An entry as it was written, tensors on the CPU; None if there is none."""
        path = self._path(key)
        return _entry(path) if path.exists() else None

    def read_all(self, begin: str) -> list[dict[str, Any]]:
        """The entries whose keys begin so; tensors are read from the disk when they are used."""
        return [_entry(path) for path in self._files(begin)]

    def write(self, key: str, entry: dict[str, Any]) -> None:
        """Have the first process keep an entry: tensors, numbers, texts, and lists, tuples and dictionaries of them."""
        if processes.is_first():
            partial = self.folder / f"{key}.partial"
            with partial.open("wb") as file:
                torch.save(entry, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._path(key))

    def remove(self) -> None:
        """Forget the run: what it has made is elsewhere."""
        shutil.rmtree(self.folder)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.pt"

    def _files(self, begin: str) -> list[Path]:
        return sorted(self.folder.glob(f"{begin}*.pt"))


_ACTIVE: ContextVar[Journal | None] = ContextVar("journal", default=None)


def active() -> Journal | None:
    """The journal of the run that is under way, if it keeps one."""
    return _ACTIVE.get()


@contextmanager
def keeping(journal: Journal | None) -> Iterator[None]:
    """Have what is run inside the block read and write a journal; None keeps none."""
    token = _ACTIVE.set(journal)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _head_of(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(found, dict):
        raise _damaged(path, ValueError("it holds no JSON object"))
    return found


def _entry(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of a file that is cut off torch says so in several ways
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ValueError(f"{path} is damaged ({reason}): remove the folder {path.parent}, and start anew")


def _in_short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()


def _compare(folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    for name in wanted.keys() | found.keys():
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} holds the finished blocks of a run with {name}={found.get(name)}, and this one has "
                f"{wanted.get(name)}: repeat that run's command, or remove the folder to start anew"
            )


def _write_whole(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
