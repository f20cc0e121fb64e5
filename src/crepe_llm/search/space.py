"""What is searched for, and where: coefficients of the score, masks, and the box of coefficients."""

import dataclasses
import math
from collections.abc import Sequence

import torch

from crepe_llm.functional.masks import ComparisonGroup, keep_mask
from crepe_llm.functional.scores import check_coefficients

__all__ = ["RIA", "WANDA", "Coefficients", "Mask", "SearchSpace"]


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The free numbers of the CRePE score; see :func:`crepe_llm.functional.scores.crepe_scores`.

    Raises:
        ValueError: for numbers that make no score.
    """

    row: float
    column: float
    neighbourhood: float
    kernel_size: int
    activation_exponent: float

    def __post_init__(self) -> None:
        check_coefficients(**dataclasses.asdict(self))

    def __str__(self) -> str:
        return (
            f"row {self.row:.3g}, column {self.column:.3g}, neighbourhood {self.neighbourhood:.3g}, "
            f"kernel {self.kernel_size}, exponent {self.activation_exponent:.3g}"
        )


RIA = Coefficients(row=1.0, column=1.0, neighbourhood=0.0, kernel_size=3, activation_exponent=0.5)
"""RIA's score in CRePE's terms, the yardstick of every search by proxy."""

WANDA = Coefficients(row=1.0, column=0.0, neighbourhood=0.0, kernel_size=3, activation_exponent=1.0)
"""Wanda's score in CRePE's terms, where weights compete within a row or an N:M group."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """What kind of mask is searched for, in the terms of :func:`crepe_llm.functional.masks.keep_mask`."""

    mask_structure: str
    sparsity: float
    comparison_group: ComparisonGroup = "row"

    def __post_init__(self) -> None:
        keep_mask(torch.empty(0, 0), self.sparsity, self.mask_structure, self.comparison_group)

    def __str__(self) -> str:
        if self.mask_structure != "0:0":
            return self.mask_structure
        return f"{self.sparsity:.0%} per {self.comparison_group}".replace("_", " ")


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Where coefficients are looked for: a box, logarithmic in the coefficients, linear in the exponent.

    Only the ratios of the three coefficients matter, so the row's is fixed. Equal bounds fix a dimension.

    Args:
        column: lowest and highest coefficient of the column term, positive.
        neighbourhood: lowest and highest coefficient of the neighbourhood term, positive.
        activation_exponent: lowest and highest exponent, at least 0.
        kernel_sizes: the window sizes to choose from, odd, ascending.
        row: the fixed coefficient of the row term, positive.

    Raises:
        ValueError: bounds that contradict each other or are out of range, a kernel size that is even, none at all, or
            nothing left to vary.
    """

    column: tuple[float, float] = (0.02, 20.0)
    neighbourhood: tuple[float, float] = (0.02, 20.0)
    activation_exponent: tuple[float, float] = (0.2, 1.4)
    kernel_sizes: tuple[int, ...] = (3, 5, 7, 9, 13, 19, 31)
    row: float = 1.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("column", "neighbourhood", "activation_exponent"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not all(math.isfinite(bound) for bound in bounds):
                raise ValueError(f"{name}={bounds} must be two finite numbers, the lowest and the highest value")
            if bounds[0] > bounds[1]:
                raise ValueError(f"{name}={bounds} is empty: the lowest value comes first")
            if bounds[0] < 0 or (bounds[0] == 0 and name != "activation_exponent"):
                raise ValueError(f"{name}={bounds} must be positive, since coefficients are searched on a log scale")
        if not (math.isfinite(self.row) and self.row > 0):
            raise ValueError(f"row={self.row} must be a positive number")
        sizes = self.kernel_sizes
        if not sizes or any(size < 1 or size % 2 == 0 for size in sizes) or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"kernel_sizes={sizes} must be one or more odd, positive numbers in ascending order")
        if self.dimensions == 0:
            raise ValueError("every bound of the search space fixes its value, so there is nothing to search for")

    @property
    def dimensions(self) -> int:
        """How many numbers vary."""
        return sum(high > low for low, high in self._continuous()) + (len(self.kernel_sizes) > 1)

    def coefficients(self, point: Sequence[float]) -> Coefficients:
        """The coefficients at a point [4] of the unit cube; values outside of it are clipped.

        The axes are column, neighbourhood, exponent and kernel size.
        """
        log_column, log_neighbourhood, exponent = (
            low + (high - low) * min(1.0, max(0.0, float(x)))
            for x, (low, high) in zip(point[:3], self._continuous(), strict=True)
        )
        index = min(len(self.kernel_sizes) - 1, max(0, round(float(point[3]) * (len(self.kernel_sizes) - 1))))
        return Coefficients(
            row=self.row,
            column=math.exp(log_column),
            neighbourhood=math.exp(log_neighbourhood),
            kernel_size=self.kernel_sizes[index],
            activation_exponent=exponent,
        )

    def point(self, coefficients: Coefficients) -> list[float]:
        """The point [4] of the unit cube whose coefficients are nearest to those given, up to a common factor."""
        scale = self.row / coefficients.row if coefficients.row > 0 else math.inf
        values = [
            math.log(max(coefficients.column * scale, 1e-30)) if scale < math.inf else math.inf,
            math.log(max(coefficients.neighbourhood * scale, 1e-30)) if scale < math.inf else math.inf,
            coefficients.activation_exponent,
        ]
        point = [
            0.5 if high == low else min(1.0, max(0.0, (value - low) / (high - low)))
            for value, (low, high) in zip(values, self._continuous(), strict=True)
        ]
        sizes = self.kernel_sizes
        nearest = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / coefficients.kernel_size)))
        return [*point, nearest / (len(sizes) - 1) if len(sizes) > 1 else 0.5]

    def varying(self) -> list[int]:
        """The axes of the unit cube that matter."""
        axes = [axis for axis, (low, high) in enumerate(self._continuous()) if high > low]
        return axes + [3] * (len(self.kernel_sizes) > 1)

    def _continuous(self) -> list[tuple[float, float]]:
        logs = [(math.log(low), math.log(high)) for low, high in (self.column, self.neighbourhood)]
        return [*logs, self.activation_exponent]
