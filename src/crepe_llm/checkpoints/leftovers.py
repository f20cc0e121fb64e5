"""Hidden folders of unfinished work: who writes one is marked inside it, and what a dead process left is removed."""

import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

__all__ = ["MARKER", "claimed", "marked", "partial_prefix", "remove_leftovers"]

_logger = logging.getLogger(__name__)

MARKER = ".crepe-llm-writer"
"""The file in a hidden folder that says which process writes it."""

# A file's name holds 255 bytes; the rest is for the prefix's end and what makes it unique.
_NAME_BYTES = 200


@dataclass(frozen=True)
class Writer:
    """A process: `started` tells apart two of the same number, in the system's own unit; None where it is not told."""

    host: str
    pid: int
    started: str | None
    since: str

    @classmethod
    def this(cls) -> "Writer":
        """This process, from now on."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _start_of(pid), datetime.now().isoformat(" ", "seconds"))

    @classmethod
    def read(cls, path: Path) -> "Writer | None":
        """The process that a marker names; None if there is none, or it is no marker."""
        try:
            found: Any = json.loads(path.read_text(encoding="utf-8"))
            writer = cls(**found)
        except (OSError, ValueError, TypeError):
            return None
        return writer if isinstance(writer.pid, int) and writer.pid > 0 else None

    def is_this(self) -> bool:
        """Whether it is this process."""
        return (self.host, self.pid, self.started) == (socket.gethostname(), os.getpid(), _start_of(os.getpid()))

    def runs(self) -> bool:
        """Whether it may still run; of another machine's process that is not known here."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            pass
        return self.started is None or _start_of(self.pid) in (None, self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@contextmanager
def marked(folder: Path) -> Iterator[None]:
    """Mark a folder as this process's unfinished work for as long as the block lasts.

    The mark is locked, which tells processes apart that cannot see each other, in two containers of one host name.
    """
    path = folder / MARKER
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        _locks(descriptor)
        _sign(descriptor)
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder that one process at a time may use for as long as the block lasts.

    Raises BlockingIOError, which names the process, if another one uses it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MARKER
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        if not _locks(descriptor):
            raise BlockingIOError(
                f"{folder} is in use by {Writer.read(path) or 'another process'}: wait until that has ended, or write "
                "to another place"
            )
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def partial_prefix(name: str) -> str:
    """How the names of the hidden folders begin that are to become the folder `name`."""
    return f".{os.fsencode(name)[:_NAME_BYTES].decode(errors='ignore')}.partial-"


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the hidden folders in `folder` that a dead process of this machine has left there, and name them.

    Those of the destination `name` that may still be written, or do not say by whom, are named and left alone.
    """
    if not folder.is_dir():
        return
    with suppress(PermissionError):
        for path in sorted(folder.glob(".*.partial-*")):
            if path.is_dir() and not path.is_symlink():
                _judge(path, path.name.startswith(partial_prefix(name)))


def _judge(path: Path, same_name: bool) -> None:
    writer = Writer.read(path / MARKER)
    if writer is None:
        if same_name:
            _logger.warning("%s is unfinished and does not say who writes it; remove it if nobody does", path)
    elif not writer.is_this():
        if writer.runs() or not _is_free(path / MARKER):
            if same_name:
                _logger.warning("%s is unfinished: %s writes it, or has left it there", path, writer)
            return
        size = 0
        with suppress(OSError):  # another process may be removing it, too
            size = sum(file.lstat().st_size for file in path.rglob("*"))
        shutil.rmtree(path, ignore_errors=True)
        what = "could not be removed" if path.exists() else f"was removed ({size / 1e9:.3g} GB)"
        _logger.warning("%s %s: %s has left it unfinished", path, what, writer)


def _is_free(marker: Path) -> bool:
    """Whether nobody holds the lock on a marker."""
    try:
        descriptor = os.open(marker, os.O_RDWR)
    except OSError:
        return False
    try:
        return _locks(descriptor)
    finally:
        os.close(descriptor)


def _locks(descriptor: int) -> bool:
    """Lock a file; False if somebody else has. A file system without locks cannot tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _sign(descriptor: int) -> None:
    """Write into a marker that this process is the writer, in the place of what is there."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(asdict(Writer.this())).encode())


def _start_of(pid: int) -> str | None:
    """When a process started, in ticks since the machine did; None if it is gone or the system does not say."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]  # the 22nd field; the second, in brackets, may hold blanks
