"""What a checkpoint format is: how a packed weight lies in a file, as a set of named tensors."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

__all__ = ["CheckpointFormat", "FormatError", "StoredTensor"]


class FormatError(ValueError):
    """A tensor or a checkpoint is not in the format that it claims, or cannot be brought into it."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what its file's header says of it: `dtype` in safetensors' spelling, and `shape`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        digits = re.search(r"\d+", self.dtype)  # safetensors' names say the bits, but BOOL, which takes a byte
        return math.prod(self.shape) * int(digits[0] if digits else 8) // 8


class CheckpointFormat(ABC):
    """One way to store the weight `P.weight` of a sparse layer: as tensors `P.<part>`.

    `name` is the format's name in config.json, `version` the release of compressed-tensors that wrote it last. Of its
    `parts`, `values` holds the kept values and `pattern` says where they are kept; no other format and no plain layer
    has tensors of these two names.
    """

    name: ClassVar[str]
    version: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    values: ClassVar[str]
    pattern: ClassVar[str]

    @abstractmethod
    def fits(self, weight: torch.Tensor) -> bool:
        """Say whether `weight`, of any shape and dtype, can be packed without a change."""

    @abstractmethod
    def pack(self, weight: torch.Tensor, keep: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Pack a weight, [d_out, d_in] or [experts, d_out, d_in], into the tensors of the parts, by their names.

        `keep` is its mask, bool of the same shape; None: inferred from the zeros. Raises FormatError if the weight does
        not fit or the mask is not the weight's.
        """

    @abstractmethod
    def unpack(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rebuild the dense weight from the tensors of the parts; FormatError if they are malformed."""

    @abstractmethod
    def read_layer(
        self, layer: str, stored: Mapping[str, StoredTensor], load: Callable[[str], torch.Tensor]
    ) -> tuple[torch.dtype, tuple[int, ...]]:
        """Check the headers of all parts of `layer` against each other; the dense weight's dtype and shape.

        `load` reads the tensor of a part; only tensors of a few bytes are read. Raises FormatError, naming file and
        tensor.
        """

    @abstractmethod
    def validate(self, pattern: torch.Tensor, shape: tuple[int, ...]) -> None:
        """Check the content of the part `pattern` of a weight of `shape`; FormatError names the first bad place."""
