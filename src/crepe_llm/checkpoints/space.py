"""Whether a checkpoint can be written to a place, known before the work that it is to hold."""

import tempfile
from pathlib import Path

from crepe_llm.checkpoints.folders import check_space, refuse_model, resolved

__all__ = ["check_destination"]

# Packing replaces one shard at a time, so a packed one is on the disk beside all the dense ones. Of a shard, unless
# the run says otherwise:
_SHARD_BYTES = 20 * 10**9
_PACKED = 0.6


def check_destination(
    destination: str | Path, dense_bytes: int, beside: int = 0, shard_bytes: int = _SHARD_BYTES
) -> None:
    """Raise OSError if no model of `dense_bytes` can be written to a folder: no folder, no permission, no space, or one
    that holds a model.

    The run writes so many bytes `beside` it, too, before it writes the model, in files of at most `shard_bytes`.
    """
    if not str(destination):
        raise NotADirectoryError("the output folder is an empty text: name a folder to save to")
    destination = resolved(Path(destination))
    refuse_model(destination)
    parent = next(folder for folder in (destination, *destination.parents) if folder.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is a file: name a folder to save to")
    try:
        tempfile.TemporaryDirectory(prefix=".crepe-", dir=parent).cleanup()
    except OSError as error:
        raise OSError(f"{destination} cannot be written ({error.strerror}): name another folder") from error
    check_space(parent, beside + dense_bytes + round(_PACKED * min(dense_bytes, shard_bytes)))
