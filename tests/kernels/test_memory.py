"""Huge pages are asked for inside a weight's memory and nowhere else."""

import mmap
from pathlib import Path

import pytest
import torch

from crepe_llm import kernels
from crepe_llm.kernels.memory import on_huge_pages

MIB = 1 << 20


def advised(begin: int, end: int) -> list[tuple[int, int]]:
    """The parts of [begin, end) that lie in mappings with the flag `hg`, of which this process's smaps tells."""
    parts, mapping = [], (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if first == "VmFlags:":
            overlap = max(begin, mapping[0]), min(end, mapping[1])
            if "hg" in line.split() and overlap[0] < overlap[1]:
                parts.append(overlap)
        elif not first.endswith(":"):
            low, high = first.split("-")
            mapping = int(low, 16), int(high, 16)
    return parts


@pytest.mark.parametrize("size", [5 * MIB + 123, 64 * MIB])
def test_whole_huge_pages_inside_the_tensor(size):
    # Memory of its own, 4 MiB wider on both sides: an allocator's may have been asked for huge pages already.
    memory = torch.frombuffer(
        mmap.mmap(-1, size + 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8
    )
    tensor = memory[4 * MIB : 4 * MIB + size]
    around = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    assert advised(*around) == []
    assert on_huge_pages(tensor) is tensor
    begin, end = tensor.data_ptr(), tensor.data_ptr() + size
    inner = -(-begin // (2 * MIB)) * 2 * MIB, end // (2 * MIB) * 2 * MIB
    assert advised(*around) == [inner]
    tensor.fill_(7)
    assert int(tensor.sum(dtype=torch.int64)) == 7 * size


def test_a_packed_weight_is_on_huge_pages():
    weight = torch.zeros(4096, 2048, dtype=torch.bfloat16)
    weight[:, ::4] = 1
    data = kernels.pack(weight).data
    parts = advised(data.data_ptr(), data.data_ptr() + data.nbytes)
    assert sum(high - low for low, high in parts) > data.nbytes - 4 * MIB


def test_what_has_none_stays_as_it_is():
    small = torch.arange(10)
    assert on_huge_pages(small) is small and small.tolist() == list(range(10))
    strided = torch.zeros(3000, 3000)[:, ::2]
    assert on_huge_pages(strided) is strided
    meta = torch.empty(1 << 24, device="meta")
    assert on_huge_pages(meta) is meta
