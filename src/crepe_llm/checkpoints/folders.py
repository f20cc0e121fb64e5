"""Folders that are complete or absent: written under a hidden name, flushed to disk, renamed."""

import errno
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

from crepe_llm.checkpoints.leftovers import MARKER, marked, partial_prefix, remove_leftovers
from crepe_llm.checkpoints.reading import CONFIG, INDEX

__all__ = ["NoRoomError", "building_place", "check_space", "is_empty", "new_folder", "refuse_model", "resolved"]

_logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT)
# How libraries that are not written in Python word an operating system's "the disk is full".
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", *(f"os error {number}" for number in _FULL))
# What file systems answer that cannot flush a folder (FUSE, SMB).
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


class NoRoomError(OSError):
    """More is to be written than is free; known before."""


@contextmanager
def new_folder(destination: Path, keep: bool = False, size: int = 0, replace: bool = False) -> Iterator[Path]:
    """Give a hidden folder that becomes `destination` when the block ends, and vanishes if it raises.

    A destination that exists may hold other files (a tokenizer, say), none of them of a name that is written. If it
    holds a model, FileExistsError is raised: at once, or, with `keep`, after the work was kept under another name.
    With `replace`, all that it holds is removed instead, as soon as the new folder is there in its place.
    Links are followed. The hidden folder lies beside the destination, or inside where nothing can be moved from there
    (a mount point, a parent that is not writable); then the files are moved one by one, config.json last.

    SIGTERM and SIGHUP, where nobody handles them, end the block as an exception does. What an earlier run on this
    machine could not remove (after SIGKILL) is removed. When the block is done nothing is deleted any more: a folder
    that cannot take its name is kept beside, and the error says where.

    `size` is the least number of bytes that will be written; OSError is raised at once where they are not free, and
    when the disk runs full later.
    """
    destination = resolved(destination)
    _make_parents(destination.parent)
    name = destination.name
    for folder in (destination.parent, destination):
        remove_leftovers(folder, name)
    place = building_place(destination)
    final = destination
    if keep and _holds_model(destination):
        final = _free_name(place, name)
    elif not replace:
        refuse_model(destination)
    check_space(place, size)
    with _signals_raise():
        partial = _hidden_folder(place, name)
        try:
            with marked(partial):
                yield partial
                _flush_all(partial)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if _is_full(error) and not isinstance(error, NoRoomError):
                raise OSError(errno.ENOSPC, f"the disk of {place} is full, {destination} was not written") from error
            raise
        _publish_or_keep(partial, final, replace)
    if final != destination and final.exists():
        raise FileExistsError(f"{destination} already holds a model and was left alone; the new one is in {final}")


def _hidden_folder(place: Path, name: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=partial_prefix(name), dir=place))
    except OSError as error:
        reason = f"nothing can be written to {place} ({error.strerror}); name a folder elsewhere"
        raise OSError(error.errno or errno.EIO, reason) from error


def resolved(destination: Path) -> Path:
    """The folder that a destination names, all links followed, whether it exists or not.

    Raises NotADirectoryError if it is a file or a link that leads nowhere.
    """
    path = Path(os.path.realpath(destination))
    if path.is_symlink():
        raise NotADirectoryError(f"{destination} is a link that leads to itself; name a folder to save to")
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{destination} is a file; name a folder to save to")
    return path


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but what a new file system has, and what unfinished work keeps there."""
    ours = f".{resolved(folder).name}"
    return not any(path.name != "lost+found" and not path.name.startswith(ours) for path in folder.iterdir())


def check_space(folder: Path, size: int) -> None:
    """Raise NoRoomError if the disk of `folder`, or of its first parent that exists, lacks `size` free bytes."""
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    if disk.total and size > disk.free:
        raise NoRoomError(
            errno.ENOSPC,
            f"{size / 1e9:.3g} GB are to be written, but {folder} has {disk.free / 1e9:.3g} GB free; make room, "
            "or name a folder on another disk",
        )


def _make_parents(folder: Path) -> None:
    for path in [folder, *folder.parents]:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file; name a folder to save to")
    folder.mkdir(parents=True, exist_ok=True)


def refuse_model(destination: Path) -> None:
    """Raise FileExistsError if a resolved destination is a folder with a model in it, or with a part of one."""
    if _holds_model(destination):
        raise FileExistsError(f"{destination} already holds a model: name another folder, or remove it first")


def _holds_model(folder: Path) -> bool:
    return folder.is_dir() and any(
        path.name in (CONFIG, "generation_config.json") or path.suffix in (".safetensors", ".bin") or path.name == INDEX
        for path in folder.iterdir()
    )


def building_place(destination: Path) -> Path:
    """The folder for unfinished work on a resolved destination: the one that holds it, if work can be moved from there
    into the destination, else the destination itself."""
    if not destination.is_dir():
        return destination.parent
    try:
        probe = Path(tempfile.mkdtemp(prefix=partial_prefix(destination.name), dir=destination.parent))
    except OSError:
        return destination
    try:
        os.rename(probe, destination / probe.name)
        probe = destination / probe.name
    except OSError:
        return destination
    finally:
        probe.rmdir()
    return destination.parent


def _free_name(place: Path, name: str) -> Path:
    count = 1
    while os.path.lexists(place / f"{name}-{count}"):
        count += 1
    return place / f"{name}-{count}"


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, where the process leaves them to the system."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            raise SystemExit(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a child that inherited this handler, not the work
        os.kill(os.getpid(), number)

    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _publish_or_keep(partial: Path, final: Path, replace: bool) -> None:
    """Move a complete folder to its name. If that fails it stays, under a name that the error gives."""
    if not any(partial.iterdir()):
        partial.rmdir()
        return
    try:
        with _emptied(final, partial) if replace and final.exists() else nullcontext():
            _publish(partial, final)
    except BaseException as error:
        kept = partial
        with suppress(OSError):
            free = _free_name(partial.parent, final.name)
            os.rename(partial, free)
            kept = free
        if not isinstance(error, OSError):
            _logger.warning("%s is not there; the finished folder is %s", final, kept)
            raise
        reason = f"{final} cannot be written ({error.strerror or error}); the finished folder is {kept}"
        raise OSError(error.errno or errno.EIO, reason) from error


@contextmanager
def _emptied(folder: Path, partial: Path) -> Iterator[None]:
    """Have a folder hold nothing but unfinished work inside the block; the rest is then removed, or put back where the
    block raises before that work has taken its place."""
    aside = Path(tempfile.mkdtemp(prefix=partial_prefix(folder.name), dir=partial.parent))
    moved: list[str] = []
    try:
        for path in sorted(folder.iterdir()):
            if path not in (partial, aside) and path.name != "lost+found":
                os.rename(path, aside / path.name)
                moved.append(path.name)
        yield
    except BaseException:
        if partial.exists():
            for name in moved:
                os.rename(aside / name, folder / name)
            aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _publish(partial: Path, final: Path) -> None:
    _open_up(partial)
    if not final.exists():
        os.rename(partial, final)
    elif partial.parent == final or any(final.iterdir()) or _is_entered(final):
        _move_entries(partial, final)
    else:
        try:
            os.rename(partial, final)
        except OSError:  # an empty folder that cannot be replaced, such as a mount point
            _move_entries(partial, final)
    _flush(final)
    _flush(final.parent)


def _is_entered(folder: Path) -> bool:
    """Whether this process works in a folder; it, and the shell that started it, would be nowhere without it."""
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:  # it is nowhere already
        return False


def _move_entries(partial: Path, final: Path) -> None:
    entries = sorted(partial.iterdir(), key=lambda path: path.name == CONFIG)  # what makes it a model comes last
    taken = [path.name for path in entries if os.path.lexists(final / path.name)]
    if taken:
        raise FileExistsError(errno.EEXIST, f"it already has {', '.join(taken)}")
    moved: list[Path] = []
    try:
        for path in entries:
            os.rename(path, final / path.name)
            moved.append(path)
    except BaseException:
        for path in moved:
            with suppress(OSError):
                os.rename(final / path.name, path)
        raise
    partial.rmdir()


def _is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that the disk is full; libraries do in words of their own."""
    seen: BaseException | None = error if isinstance(error, Exception) else None
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(text in str(seen) for text in _FULL_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _open_up(folder: Path) -> None:
    """Give a folder and its files the permissions of new ones; tempfile and safetensors give their owner's alone."""
    mask = os.umask(0o022)
    os.umask(mask)
    with suppress(OSError):  # on file systems that have no permissions
        folder.chmod(0o777 & ~mask)
        for path in folder.rglob("*"):
            path.chmod(path.stat().st_mode | 0o666 & ~mask)


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if path.name != MARKER:
            _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)
