"""The formats of packed 2:4 weights: the one table that packing, products, operators and C++ are keyed by.

A format says how a kept value is stored, how scales lie, and how the CPU kernels' chunks are laid out. Its name is what
operators and measured plans carry. The C++ kernels have the same table (cpu/weight_formats.h).
"""

from dataclasses import dataclass
from functools import cached_property

import torch

__all__ = [
    "COLUMN_CHUNK",
    "FORMATS",
    "METADATA_BYTES",
    "ROW_BLOCK",
    "Format",
    "format_named",
    "format_of",
    "int4_format",
]

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
    - ``dtype``: torch's dtype of a tensor of kept values; wider than ``bits`` for 4-bit codes, a code an element
    - ``code``: its place in the C++ kernels' table; None: the CPU has no kernel for it and holds it as ``wider``
    - ``lane``: how many kept values of a row lie side by side in a chunk, which is [kept values / lane][row][lane]
    - ``spread``: whether the 2-bit columns of a lane's values lie each in its own part of a row's metadata word, where
      one shift and one mask spread them over the lane (of codes, over the bytes with its lower or its upper halves);
      else they follow each other in the order of the values
    - ``scale_group``: how many columns of a row share a scale, a multiple of 32; None: the whole row
    - ``zero_point``: None: kept values are numbers; else they are unsigned codes, and what a code stands for is the
      code less its zero point: this one, or the weight's own, one for each scale
    - ``inputs``: the dtype that activations can be quantized to, or None
    - ``always_quantizes``: whether activations are always quantized
    - ``input_group``: how many columns of a token share a scale of the activations that are always quantized: the
      columns of a chunk; None: all
    - ``max_columns``: the largest K, or None
    - ``wider``: the name of a format that holds every value of this one exactly, for where this one has no product
    - ``unquantized``: the name of the format that holds the same values, exactly, where a product on a CPU must not
      quantize its inputs as this format's does
    """

    name: str
    bits: int
    dtype: torch.dtype
    code: int | None
    lane: int = 1
    spread: bool = False
    scale_group: int | None = None
    zero_point: int | None = None
    inputs: torch.dtype | None = None
    always_quantizes: bool = False
    input_group: int | None = None
    max_columns: int | None = None
    wider: str | None = None
    unquantized: str | None = None

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
        if self.bits == 4:  # of the first and the second value of groups 0 and 2, then 1 and 3, 4 and 6, 5 and 7
            return tuple(
                8 * (2 * (value % 2) + value // 4 % 2) + 2 * (2 * (value // 8) + value // 2 % 2)
                for value in range(_VALUES)
            )
        return tuple(2 * (value // self.lane) + 32 // self.lane * (value % self.lane) for value in range(_VALUES))

    def check_shape(self, n: int, k: int) -> None:
        """Raises ValueError where no weight of this format has the shape [n, k]."""
        if n < 1 or k < 4 or k % 4:
            raise ValueError(f"weight is {n} x {k} (N x K); at least one row and K a positive multiple of 4 are needed")
        if self.max_columns is not None and k > self.max_columns:
            raise ValueError(f"{self.name} weight has {k} columns; at most {self.max_columns} fit its sums")

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """The shape of the scales of a weight [n, k]: [n], or [n, groups of columns]."""
        return (n,) if self.scale_group is None else (n, self._groups(k))

    def packed_scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        """The shape of the scales beside the CPU kernels' layout: [n], or [row blocks, groups of columns, 16]."""
        return (n,) if self.scale_group is None else self.zero_shape(n, k)

    def zero_shape(self, n: int, k: int) -> tuple[int, int, int]:
        """The shape of the zero points beside the CPU kernels' layout: [row blocks, groups of columns, 16]."""
        return -(-n // ROW_BLOCK), self._groups(k), ROW_BLOCK

    def _groups(self, k: int) -> int:
        return 1 if self.scale_group is None else -(-k // self.scale_group)


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
            unquantized="int8_weight_only",
        ),
        Format(
            "fp8",
            bits=8,
            dtype=torch.float8_e4m3fn,
            code=None,
            inputs=torch.float8_e4m3fn,
            wider="bf16",
            unquantized="bf16",
        ),
        Format("int8_weight_only", bits=8, dtype=torch.int8, code=4),
        *(
            Format(name, bits=4, dtype=torch.uint8, code=code, lane=8, scale_group=group, zero_point=8)
            for name, code, group in (
                ("int4", 5, None),
                ("int4_g32", 6, 32),
                ("int4_g64", 7, 64),
                ("int4_g128", 8, 128),
            )
        ),
        # The same weights for activations that are quantized to int8 (a8), their columns in the order of int8's.
        *(
            Format(
                name,
                bits=4,
                dtype=torch.uint8,
                code=code,
                lane=8,
                spread=True,
                scale_group=group,
                zero_point=8,
                inputs=torch.int8,
                always_quantizes=True,
                input_group=COLUMN_CHUNK,
                unquantized=exact,
            )
            for name, code, group, exact in (
                ("int4_a8", 9, None, "int4"),
                ("int4_g32_a8", 10, 32, "int4_g32"),
                ("int4_g64_a8", 11, 64, "int4_g64"),
                ("int4_g128_a8", 12, 128, "int4_g128"),
            )
        ),
    )
}

_BY_DTYPE: dict[torch.dtype, Format] = {}
for _form in FORMATS.values():
    if _form.bits == 8 * _form.dtype.itemsize:
        _BY_DTYPE.setdefault(_form.dtype, _form)  # of int8 the first one, which quantizes inputs


def format_named(name: str) -> Format:
    """The format that operators call ``name``. Raises ValueError where there is none."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; one of {', '.join(FORMATS)} is needed")
    return FORMATS[name]


def int4_format(scale_group: int | None, quantizes_inputs: bool = False) -> Format:
    """The format of 4-bit codes with a scale for ``scale_group`` columns; None: for the whole row.

    ``quantizes_inputs`` says whether products quantize activations. Raises ValueError where there is none.
    """
    of_codes = [form for form in FORMATS.values() if form.bits == 4 and form.always_quantizes == quantizes_inputs]
    found = [form for form in of_codes if form.scale_group == scale_group]
    if not found:
        known = ", ".join(str(form.scale_group) for form in of_codes if form.scale_group)
        raise ValueError(f"{scale_group} columns share a scale; 4-bit weights have groups of {known}, or whole rows")
    return found[0]


def format_of(dtype: torch.dtype) -> Format:
    """The format of kept values that come as a tensor of ``dtype``. Raises TypeError where there is none."""
    form = _BY_DTYPE.get(dtype)
    if form is None:
        *others, last = (str(known).removeprefix("torch.") for known in _BY_DTYPE)
        raise TypeError(f"weight has dtype {dtype}; {', '.join(others)} or {last} is needed")
    return form
