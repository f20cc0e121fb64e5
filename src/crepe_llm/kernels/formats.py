"""The formats of packed 2:4 weights: the one table that packing, products, operators and C++ are keyed by.

A format says how a kept value is stored, how scales lie, and how the CPU kernels' chunks are laid out. Its name is what
operators and measured plans carry. The C++ kernels have the same table (cpu/weight_formats.h).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = ["COLUMN_CHUNK", "FORMATS", "METADATA_BYTES", "ROW_BLOCK", "Format", "format_named", "format_of"]

ROW_BLOCK = 16
COLUMN_CHUNK = 32
# 2 bits a kept value say which column of its group it is in: one 32-bit word a row of a chunk.
METADATA_BYTES = 4 * ROW_BLOCK

_VALUES = COLUMN_CHUNK // 2


@dataclass(frozen=True)
class Format:
    """How a packed weight stores its kept values.

    - ``name``: what operators, plans and messages call it
    - ``bits``: of one kept value in a chunk
    - ``dtype``: torch's dtype of a tensor of kept values
    - ``code``: its place in the C++ kernels' table; None: the CPU has no kernel for it and holds it as ``wider``
    - ``lane``: how many kept values of a row lie side by side in a chunk, which is [kept values / lane][row][lane]
    - ``spread``: whether the 2-bit columns of a lane's values lie each in its own part of a row's metadata word, where
      one shift and one mask spread them over the lane; else they follow each other in the order of the values
    - ``scale_group``: how many columns of a row share a scale; None: the whole row
    - ``inputs``: the dtype that activations can be quantized to, or None
    - ``always_quantizes``: whether activations are always quantized
    - ``max_columns``: the largest K, or None
    - ``wider``: the name of a format that holds every value of this one exactly, for where this one has no product
    """

    name: str
    bits: int
    dtype: torch.dtype
    code: int | None
    lane: int = 1
    spread: bool = False
    scale_group: int | None = None
    inputs: torch.dtype | None = None
    always_quantizes: bool = False
    max_columns: int | None = None
    wider: str | None = None

    @cached_property
    def value_bytes(self) -> int:
        """Bytes of a chunk's kept values."""
        return ROW_BLOCK * _VALUES * self.bits // 8

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk: 16 rows of 32 columns."""
        return METADATA_BYTES + self.value_bytes

    @cached_property
    def column_shifts(self) -> tuple[int, ...]:
        """Where the column of each of a row's 16 kept values, ascending, begins in the metadata word."""
        if not self.spread:
            return tuple(range(0, 2 * _VALUES, 2))
        return tuple(2 * (value // self.lane) + 32 // self.lane * (value % self.lane) for value in range(_VALUES))

    def check_shape(self, n: int, k: int) -> None:
        """Raises ValueError where no weight of this format has the shape [n, k]."""
        if n < 1 or k < 4 or k % 4:
            raise ValueError(f"weight is {n} x {k} (N x K); at least one row and K a positive multiple of 4 are needed")
        if self.max_columns is not None and k > self.max_columns:
            raise ValueError(f"{self.name} weight has {k} columns; at most {self.max_columns} fit its sums")

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """The shape of the scales of a weight [n, k]: [n], or [n, groups of columns]."""
        return (n,) if self.scale_group is None else (n, -(-k // self.scale_group))


FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("bf16", bits=16, dtype=torch.bfloat16, code=0, lane=2),
        Format("fp16", bits=16, dtype=torch.float16, code=1),
        Format("fp32", bits=32, dtype=torch.float32, code=2),
        Format(
            "int8",
            bits=8,
            dtype=torch.int8,
            code=3,
            lane=4,
            spread=True,
            inputs=torch.int8,
            always_quantizes=True,
            max_columns=262144,  # int32 sums hold K / 2 products of at most 127 * 128
            wider="bf16",
        ),
        Format("fp8", bits=8, dtype=torch.float8_e4m3fn, code=None, inputs=torch.float8_e4m3fn, wider="bf16"),
    )
}

_BY_DTYPE = {form.dtype: form for form in FORMATS.values()}


def format_named(name: str) -> Format:
    """The format that operators call ``name``. Raises ValueError where there is none."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; one of {', '.join(FORMATS)} is needed")
    return FORMATS[name]


def format_of(dtype: torch.dtype) -> Format:
    """The format of kept values that come as a tensor of ``dtype``. Raises TypeError where there is none."""
    form = _BY_DTYPE.get(dtype)
    if form is None:
        *others, last = (str(known).removeprefix("torch.") for known in _BY_DTYPE)
        raise TypeError(f"weight has dtype {dtype}; {', '.join(others)} or {last} is needed")
    return form
