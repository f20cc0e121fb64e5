"""The folder of a training: which run it belongs to, its last checkpoint and its best state.

A training that was interrupted goes on from there; another one is refused.
"""

import hashlib
import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from crepe_llm.checkpoints.leftovers import claimed

__all__ = [
    "best_evaluation",
    "best_state",
    "fingerprint",
    "hash_windows",
    "keep_best",
    "last_checkpoint",
    "resumable",
    "working_in",
]

_SETTINGS = "settings.json"
_BEST = "best.safetensors"


@contextmanager
def working_in(work: Path, destination: Path) -> Iterator[None]:
    """Make a training's folder, which one run at a time uses.

    Where the block fails before there is anything to go on from, the folder is removed, so that other settings may
    follow.

    Raises:
        ValueError: `work` holds other files, or `destination` holds any; hidden ones do not count.
        BlockingIOError: another process uses `work`.
    """
    if work.exists() and not (work / _SETTINGS).is_file() and (not work.is_dir() or _has_files(work)):
        raise ValueError(f"{work} is no folder of an interrupted recovery, and would be removed: give a new one")
    if _has_files(destination):
        raise ValueError(f"{destination} is not empty: give a new folder for the recovered model")
    with claimed(work):
        try:
            yield
        except BaseException as error:
            if work.is_dir() and not _has_files(work, but=(_SETTINGS,)):
                shutil.rmtree(work)
            elif isinstance(error, KeyboardInterrupt):
                error.add_note("the same command goes on from the last checkpoint")
            raise


def _has_files(folder: Path, but: tuple[str, ...] = ()) -> bool:
    """Whether anything is in a folder that is not hidden, but what is named."""
    return folder.is_dir() and any(not path.name.startswith(".") and path.name not in but for path in folder.iterdir())


def resumable(work: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder holds an interrupted training of the same identity; makes the folder if it does not.

    Raises:
        ValueError: it holds another training, or a file of its state is damaged.
    """
    path = work / _SETTINGS
    if path.is_file():
        if _read_json(path) != json.loads(json.dumps(identity)):
            raise ValueError(
                f"{work} holds an interrupted recovery with other settings, text or model: repeat that command to "
                "finish it, or remove the folder"
            )
        last = last_checkpoint(work)
        for folder in (work, *([] if last is None else [Path(last)])):
            _check_state(folder)
        return True
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(identity, indent=1) + "\n")
    return False


def _check_state(folder: Path) -> None:
    """Raise ValueError if a file of a training's state was cut off or damaged; naming it."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):  # what a kill has left of a file that was being written
            continue
        if path.suffix == ".json":
            _read_json(path)
        elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            raise ValueError(_damaged(path, "it is not a whole PyTorch file"))
        elif path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt") as tensors:
                    tensors.keys()
            except Exception as error:
                raise ValueError(_damaged(path, str(error))) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(_damaged(path, str(error))) from error


def _damaged(path: Path, why: str) -> str:
    state = path if path.name == _SETTINGS else path.parent
    return f"{path} of an interrupted recovery is damaged ({why}): remove {state}, and repeat the command"


def fingerprint(source: Path) -> list[Any]:
    """What tells a folder's weights from others: path, names, sizes and times."""
    files = [path for suffix in ("safetensors", "bin") for path in sorted(source.glob(f"*.{suffix}"))]
    return [str(source.resolve()), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def hash_windows(ids: torch.Tensor) -> str:
    """What tells token ids, int64 [windows, length], from others, the same ones in windows of another length too."""
    return hashlib.sha256(f"{list(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()[:16]


def last_checkpoint(work: Path) -> str | None:
    """The last checkpoint in a folder that was written to its end; the trainer's state is written last."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in work.glob("checkpoint-*/trainer_state.json")]
    complete = [step for step in sorted(steps) if _is_json(work / f"checkpoint-{step}" / "trainer_state.json")]
    return str(work / f"checkpoint-{complete[-1]}") if complete else None


def _is_json(path: Path) -> bool:
    try:
        _read_json(path)
    except ValueError:
        return False
    return True


def keep_best(work: Path, step: int, state: dict[str, torch.Tensor], loss: float | None = None) -> None:
    """Write the best state so far, its step and its held-out loss; a reader sees the old file or the whole new one."""
    partial = work / f".{_BEST}"
    tensors = {name: tensor.contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, partial, metadata={"step": str(step)} | ({} if loss is None else {"loss": repr(loss)}))
    partial.replace(work / _BEST)


def best_evaluation(work: Path) -> tuple[int, float] | None:
    """Step and held-out loss of a training's best state so far; None without one, or without its loss."""
    path = work / _BEST
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    return (int(about["step"]), float(about["loss"])) if "loss" in about else None


def best_state(work: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The step of a training's best state so far, and the parameters that trained by name; 0 and none without one."""
    path = work / _BEST
    if not path.is_file():
        return 0, {}
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return int(file.metadata()["step"]), tensors
