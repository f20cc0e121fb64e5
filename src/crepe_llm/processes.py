"""Work in several processes, such as torchrun starts: what they add up, share out and tell each other.

In one process every function here does nothing, or gives back what it was given.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from compressed_tensors.distributed import greedy_bin_packing, init_dist
from compressed_tensors.utils import update_offload_parameter

from crepe_llm.functional.statistics import InputStatistics

__all__ = [
    "add_up",
    "add_up_statistics",
    "alone",
    "assign",
    "broadcast",
    "by_first",
    "count",
    "draw_alike",
    "from_first",
    "from_process",
    "gather",
    "is_first",
    "merge",
    "rank",
    "require_group",
    "spread",
    "start",
    "wait",
    "write_parameter",
]

T = TypeVar("T")
R = TypeVar("R")

_alone = False


def count() -> int:
    """How many processes work together; 1 inside :func:`alone`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


@contextmanager
def alone() -> Iterator[None]:
    """Have this process work inside the block as if there was no other."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def rank() -> int:
    """Which of the processes this is, from 0 on."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and reports."""
    return rank() == 0


def start() -> None:
    """Let the processes that torchrun has started find each other: over NCCL on GPUs, over gloo on CPUs. Idempotent."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2 or dist.is_initialized():
        return
    if torch.accelerator.is_available():
        init_dist()
    else:
        dist.init_process_group("gloo")


def require_group() -> None:
    """Raise ValueError if torchrun has started several processes that have not found each other."""
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started > 1 and count() == 1:
        raise ValueError(
            f"torchrun has started {started} processes, and each would prune the whole model alone: call "
            "`crepe_llm.processes.start()` before oneshot, or prune with `torchrun ... -m crepe_llm prune`"
        )


def wait() -> None:
    """Go on when all processes are here."""
    if count() > 1:
        dist.barrier()


def add_up(tensor: torch.Tensor) -> None:
    """Give all processes the sum of their tensors, in place; all get the same bits."""
    if count() > 1:
        dist.all_reduce(tensor)


def add_up_statistics(statistics: InputStatistics) -> None:
    """Give all processes the statistics of the tokens of all, in place."""
    if count() == 1:
        return
    counted = torch.tensor([statistics.tokens, statistics.weight], dtype=torch.float64, device=statistics.sum.device)
    for tensor in (counted, statistics.sum, statistics.square_sum, statistics.gram):
        if tensor is not None:
            add_up(tensor)
    statistics.tokens, statistics.weight = int(counted[0]), counted[1].item()


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; they must pickle."""
    values: list[Any] = [value] * count()
    if count() > 1:
        dist.all_gather_object(values, value)
    return values


def from_process(value: T, owner: int) -> T:
    """What one process gives, which must pickle; that of the others is not looked at."""
    values = [value]
    if count() > 1:
        dist.broadcast_object_list(values, src=owner)
    return values[0]


def from_first(value: T) -> T:
    """What the first process gives, which must pickle."""
    return from_process(value, 0)


def spread(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """What a function gives for each item; the processes take turns at the items, each working as if it was alone.

    Args:
        items: the same in all processes. The first process takes the first one, the second process the next.
        work: what it gives must pickle.

    Raises:
        ValueError: if the function has raised an error in another process. A process's own error goes on as it is.
    """
    if count() == 1:
        return [work(item) for item in items]
    found: dict[int, R] = {}
    error: Exception | None = None
    try:
        for place in range(rank(), len(items), count()):
            with alone():
                found[place] = work(items[place])
    except Exception as raised:  # the others would wait for this process for ever
        error = raised
    parts = gather((found, None if error is None else str(error) or type(error).__name__))
    if error is not None:
        raise error
    for number, (_, message) in enumerate(parts):
        if message is not None:
            raise ValueError(f"process {number} of {len(parts)} has failed: {message}")
    results = {place: result for part, _ in parts for place, result in part.items()}
    return [results[place] for place in range(len(items))]


def by_first(work: Callable[[], R]) -> R:
    """What a function gives in the first process, which must pickle; its error is raised in all."""
    return spread((None,), lambda _: work())[0]


def broadcast(tensor: torch.Tensor, owner: int) -> torch.Tensor:
    """One process's tensor, of the shape, dtype and device of this one's; bits are not changed."""
    if count() == 1:
        return tensor
    # As bytes, because backends differ in the dtypes that they know.
    sent = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(sent.view(torch.uint8), src=owner)
    return sent


def merge(record: dict[str, Any], names: Iterable[str]) -> None:
    """Give all processes the entries of all, in place, in the order of these names; others come last."""
    if count() == 1:
        return
    entries = {name: value for part in gather(record) for name, value in part.items()}
    record.clear()
    record.update({name: entries.pop(name) for name in names if name in entries} | entries)


def assign(costs: Mapping[T, float]) -> dict[T, int]:
    """For each item the process that works on it, such that all have about as much to do; items must be hashable."""
    if count() == 1:
        return dict.fromkeys(costs, 0)
    places = list(costs.values())
    _, _, owners = greedy_bin_packing(list(range(len(places))), count(), lambda place: places[place])
    return {item: owners[place] for place, item in enumerate(costs)}


def draw_alike() -> None:
    """From here on torch draws the same random numbers on the CPU in all processes: those of the first."""
    if count() > 1:
        torch.set_rng_state(from_first(torch.get_rng_state()))


def write_parameter(module: torch.nn.Module, name: str, value: torch.Tensor, owner: int = 0) -> None:
    """Overwrite a parameter, wherever it is kept; all processes call it, with the same value.

    Offloaded weights may lie in memory or in a file that the processes share, so only `owner` writes there.
    """
    wait()
    writes = rank() == owner or count() == 1
    if not writes:
        with torch.no_grad():
            cast(torch.Tensor, getattr(module, name)).copy_(value)
    wait()  # what others hold may be read from the file that changes now
    if writes:
        update_offload_parameter(module, name, value)
    wait()
