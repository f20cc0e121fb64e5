"""Folders that are complete or absent: written under a hidden name, flushed to disk, renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crepe_llm.checkpoints.reading import CONFIG, INDEX

__all__ = ["new_folder"]


@contextmanager
def new_folder(destination: Path, keep: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside `destination` that becomes it when the block ends, and vanishes if it raises.

    A destination that exists may hold other files (a tokenizer, say), none of them of a name that is written. If it
    holds a model, FileExistsError is raised: at once, or, with `keep`, after the work was kept under another name.
    """
    destination = Path(os.path.abspath(destination))
    if destination.exists() and not destination.is_dir():
        raise NotADirectoryError(f"{destination} is a file; name a folder to save to")
    final = destination
    if _holds_model(destination):
        if not keep:
            raise FileExistsError(f"{destination} already holds a model; name another folder, or remove it first")
        count = 1
        while final.exists():
            final, count = destination.with_name(f"{destination.name}-{count}"), count + 1
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
    try:
        yield partial
        if any(partial.iterdir()):
            _publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if final != destination:
        raise FileExistsError(f"{destination} already holds a model and was left alone; the new one is in {final}")


def _holds_model(folder: Path) -> bool:
    return folder.is_dir() and any(
        path.name == CONFIG or path.suffix in (".safetensors", ".bin") or path.name == INDEX
        for path in folder.iterdir()
    )


def _publish(partial: Path, final: Path) -> None:
    partial.chmod(0o777 & ~_umask())
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    if not final.exists() or not any(final.iterdir()):
        os.rename(partial, final)
    else:
        entries = sorted(partial.iterdir(), key=lambda path: path.name == CONFIG)  # what makes it a model comes last
        taken = [path.name for path in entries if (final / path.name).exists()]
        if taken:
            raise FileExistsError(f"{final} already has {', '.join(taken)}; name another folder, or remove them first")
        for path in entries:
            os.rename(path, final / path.name)
        _flush(final)
    _flush(final.parent)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
