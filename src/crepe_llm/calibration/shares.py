"""Calibration data shared out among processes."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow.compute
from datasets import Dataset
from torch.utils.data import DataLoader

from crepe_llm import processes
from crepe_llm.calibration.windows import loader_like

__all__ = ["give_all", "give_share", "own_share"]


class _Share(DataLoader[Any]):
    """A process's share of the data that all processes have together; all of that while `gives_all`."""

    whole: DataLoader[Any]
    gives_all = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return iter(self.whole) if self.gives_all else super().__iter__()

    def __len__(self) -> int:
        return len(self.whole) if self.gives_all else super().__len__()


def own_share(loader: Any) -> Any:
    """The loader of this process's batches, which are whole batches of the one that all processes have.

    Together the processes have each batch of one process once, the first process the first ones. Where the processes
    were given different data, each keeps its own. In one process, and where there is no data, the loader is returned.

    Raises:
        ValueError: if the data is no data set, or there are fewer batches than processes.
    """
    if processes.count() == 1 or loader is None:
        return loader
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Dataset) or loader.batch_size is None:
        raise ValueError(
            f"calibration data of the class {type(loader).__name__} cannot be shared out among "
            f"{processes.count()} processes: give oneshot a datasets.Dataset, or use one process"
        )
    drawn = processes.from_first(list(loader.sampler))
    if len(set(processes.gather(_mark(dataset)))) > 1:
        return loader
    rows = dataset.select(drawn)
    size, shares = loader.batch_size, processes.count()
    batches = -(-len(rows) // size)
    if batches < shares:
        raise ValueError(
            f"{len(rows)} calibration rows make {batches} batches of {size} for {shares} processes: calibrate with "
            "more rows, lower batch_size, or start fewer processes"
        )
    first, end = (batches * index // shares * size for index in (processes.rank(), processes.rank() + 1))
    share = loader_like(loader, rows.select(range(first, min(end, len(rows)))), _Share)
    assert isinstance(share, _Share)
    share.whole = loader_like(loader, rows)
    return share


def give_all(loader: Any) -> None:
    """Have a loader of :func:`own_share` give this process all batches, in the order in which one process has them.

    Raises:
        ValueError: if there are several processes, and the loader is no share of data that all of them have.
    """
    if isinstance(loader, _Share):
        loader.gives_all = True
    elif processes.count() > 1:
        raise ValueError(
            f"each of {processes.count()} processes needs all of the calibration data, and they were given different "
            "data, or none by oneshot: give oneshot the same datasets.Dataset in all processes, or use one process"
        )


def give_share(loader: Any) -> None:
    """Have a loader give the share of its process again. Idempotent."""
    if isinstance(loader, _Share):
        loader.gives_all = False


def _mark(dataset: Dataset) -> str:
    """What tells data sets with other rows apart; not by fingerprint alone, as that of joined windows is drawn."""
    if "input_ids" not in dataset.column_names:
        return str(dataset._fingerprint)
    ids = dataset.with_format("arrow")[:]["input_ids"]
    parts = (pyarrow.compute.list_value_length(ids), pyarrow.compute.list_flatten(ids))
    return hashlib.sha256(b"".join(part.to_numpy().tobytes() for part in parts)).hexdigest()
