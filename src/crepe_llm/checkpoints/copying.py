"""From folder to folder: two that are not the same, and what lies beside the weights."""

import logging
import os
import re
import shutil
from pathlib import Path

from crepe_llm.checkpoints.folders import refuse_model, resolved
from crepe_llm.model_files import ABOUT_WEIGHTS

__all__ = ["copy_rest", "two_folders"]

_logger = logging.getLogger(__name__)

# Files of weights, and indexes of several, by the names that libraries write them under. Other files with endings like
# theirs may be what a model needs to be loaded (Qwen2.5-Omni's spk_dict.pt).
_WEIGHTS = re.compile(
    r".*\.(safetensors|gguf|h5|msgpack)(\.index\.json)?"
    r"|(pytorch_model|adapter_model|model|consolidated)\b.*\.(bin|pt|pth)(\.index\.json)?"
)
_OF_THE_MODEL = re.compile(r"\.|pytorch_model|model.*\.safetensors")


def two_folders(source: str | Path, destination: str | Path) -> tuple[Path, Path]:
    """The folder to read and the one to write, which must be another, links followed.

    Raises:
        FileExistsError: they are one, or the second holds a model or a file that would be copied there.
        NotADirectoryError: the second is a file, or a link that leads nowhere.
    """
    source, place = Path(source), resolved(Path(destination))
    if os.path.realpath(source) == str(place):
        raise FileExistsError(f"{destination} is the folder {source} that is to be read; name another one to write to")
    refuse_model(place)
    twice = [path.name for path in _beside_weights(source) if os.path.lexists(place / path.name)]
    if twice:
        raise FileExistsError(
            f"{destination} already has {', '.join(twice)}, which {source} has, too: name another folder, or remove "
            f"{'them' if len(twice) > 1 else 'it'}"
        )
    return source, Path(destination)


def copy_rest(source: Path, folder: Path, other_weights: bool = False) -> None:
    """Copy what is neither weights nor their index nor hidden: config, tokenizer, recipe, code, card and report.

    Links to files in the folder are followed, also to where the hub's cache keeps the files of its folders. What a
    link to elsewhere names is not copied. For `other_weights`, as training makes them, what tells of the weights is
    left out (:data:`crepe_llm.model_files.ABOUT_WEIGHTS`), and so are folders with weights of their own, with a line.
    Files of other weights than the model's, such as an adapter's, get a line, too.
    """
    source = Path(os.path.realpath(source))
    roots = [source, source.parents[1] / "blobs"] if source.parent.name == "snapshots" else [source]
    for path in sorted(source.iterdir()):
        if _is_weight(path.name) and not _OF_THE_MODEL.match(path.name):
            _logger.warning("%s holds other weights than the model's and was not copied", path)
    for path in _beside_weights(source):
        if other_weights and path.name in ABOUT_WEIGHTS:
            continue
        if other_weights and path.is_dir() and any(_is_weight(inside.name) for inside in path.rglob("*")):
            _logger.warning("%s holds weights of its own and was not copied", path)
        else:
            _copy(path, folder / path.name, roots, folder)


def _beside_weights(source: Path) -> list[Path]:
    """What in a folder is neither weights nor their index nor hidden; nothing where there is no folder."""
    if not source.is_dir():
        return []
    return [path for path in sorted(source.iterdir()) if not path.name.startswith(".") and not _is_weight(path.name)]


def _is_weight(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def _copy(path: Path, target: Path, roots: list[Path], written: Path) -> None:
    """Copy a file or folder; links out of `roots`, links to folders and what is no file are left out, with a line."""
    real = Path(os.path.realpath(path))
    if path.is_symlink() and (path.is_dir() or not any(real.is_relative_to(root) for root in roots)):
        _logger.warning("%s is a link to %s and was not copied", path, real)
    elif path.is_dir():
        if real == Path(os.path.realpath(written)):  # the destination lies inside the source
            return
        target.mkdir()
        for inside in sorted(path.iterdir()):
            _copy(inside, target / inside.name, roots, written)
    elif path.is_file():
        shutil.copyfile(path, target)
    else:
        _logger.warning("%s is not a file and was not copied", path)
