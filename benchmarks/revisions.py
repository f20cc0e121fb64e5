"""Run a script on the sources of another revision of this repository."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def sources(revision: str | None) -> Iterator[Path]:
    """The `src` folder of a git revision, in a temporary folder meanwhile; without a revision, the working tree's.

    Compiled kernels are not built: pruning does without them.

    Raises:
        ValueError: git knows no such revision.
    """
    if revision is None:
        yield ROOT / "src"
        return
    # Recipes belong to it: src/crepe_llm/recipes is a link to them.
    command = ["git", "-C", str(ROOT), "archive", revision, "src", "recipes"]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        raise ValueError(f"{revision}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        yield Path(folder) / "src"


def start(script: Path, arguments: list[str], source: Path, folder: Path, threads: int = 1) -> subprocess.Popen[str]:
    """Start a script with the package of `source`, in `folder`, which also takes what it caches; gives its output."""
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "LLM_COMPRESSOR_LOG_DISABLED": "true",
    }
    command = [sys.executable, "-W", "ignore", str(script.resolve()), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    """What a started script prints, once it has ended.

    Raises:
        RuntimeError: it failed; the message ends in what it wrote to its standard error.
    """
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args} ended with {process.returncode}:\n{errors[-3000:]}")
    return output


def check_package(source: Path) -> None:
    """Raise RuntimeError unless this process imports the package of `source`."""
    import crepe_llm

    found = Path(crepe_llm.__file__).resolve()
    if source.resolve() not in found.parents:
        raise RuntimeError(f"crepe_llm is imported from {found}, not from {source}")
