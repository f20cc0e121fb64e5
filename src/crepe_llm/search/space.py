"""What is searched for, and where: coefficients of the score, masks, and the box of coefficients."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, get_args

import torch

from crepe_llm.functional.masks import ComparisonGroup, keep_mask
from crepe_llm.functional.scores import check_coefficients

__all__ = ["RIA", "WANDA", "Coefficients", "Mask", "SearchSpace"]


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """The free numbers of the CRePE score; see :func:`crepe_llm.functional.scores.crepe_scores`.

    ``comparison_group`` says which weights compete by it, where the search is for that, too; None: the mask says so.

    Raises:
        ValueError: for numbers that make no score.
    """

    row: float
    column: float
    neighbourhood: float
    kernel_size: int
    activation_exponent: float
    comparison_group: ComparisonGroup | None = None

    def __post_init__(self) -> None:
        check_coefficients(**self.of_score)
        if self.comparison_group is not None and self.comparison_group not in get_args(ComparisonGroup):
            known = ", ".join(get_args(ComparisonGroup))
            raise ValueError(f"comparison_group={self.comparison_group!r} must be one of {known}")

    def __str__(self) -> str:
        group = "" if self.comparison_group is None else f", per {self.comparison_group}"
        return (
            f"row {self.row:.3g}, column {self.column:.3g}, neighbourhood {self.neighbourhood:.3g}, "
            f"kernel {self.kernel_size}, exponent {self.activation_exponent:.3g}{group}"
        )

    @property
    def of_score(self) -> dict[str, Any]:
        """The numbers of the score by their names."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "comparison_group"}

    @property
    def fields(self) -> dict[str, Any]:
        """The same, and the comparison group where there is one: fields of the CRePEModifier."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


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
        return f"{self.sparsity:.0%} per {self.comparison_group}"

    def keep(self, scores: torch.Tensor, coefficients: Coefficients) -> torch.Tensor:
        """What such a mask keeps by the scores of a candidate, which may say which of them compete: bool as scores."""
        group = coefficients.comparison_group or self.comparison_group
        return keep_mask(scores, self.sparsity, self.mask_structure, group)


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Where coefficients are looked for: a box, logarithmic in the coefficients, linear in the exponent.

    Only the ratios of the three coefficients matter, so the row's is fixed. Equal bounds fix a dimension.

    Args:
        column: lowest and highest coefficient of the column term, positive.
        neighbourhood: lowest and highest coefficient of the neighbourhood term, positive.
        activation_exponent: lowest and highest exponent, at least 0.
        kernel_sizes: the window sizes to choose from, odd, ascending.
        comparison_groups: of unstructured masks, which groups of competing weights to choose from, two; none: the
            mask's own stays.
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
    comparison_groups: tuple[ComparisonGroup, ...] = ()

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
        known = get_args(ComparisonGroup)
        if self.comparison_groups and sorted(self.comparison_groups) != sorted(known):
            raise ValueError(f"comparison_groups={self.comparison_groups} must be {' and '.join(known)}, or none")
        if self.dimensions == 0:
            raise ValueError("every bound of the search space fixes its value, so there is nothing to search for")

    @property
    def dimensions(self) -> int:
        """How many numbers vary."""
        return len(self.varying())

    @property
    def axes(self) -> int:
        """How many axes the unit cube of the space has: 4, or 5 where the comparison group is searched for."""
        return 5 if self.comparison_groups else 4

    def competing(self, coefficients: Coefficients, group: ComparisonGroup) -> Coefficients:
        """Coefficients with a comparison group: their own or else the one given; none where the space has no choice."""
        chosen = (coefficients.comparison_group or group) if self.comparison_groups else None
        return dataclasses.replace(coefficients, comparison_group=chosen)

    def coefficients(self, point: Sequence[float]) -> Coefficients:
        """The coefficients at a point [axes] of the unit cube; values outside of it are clipped.

        The axes are column, neighbourhood, exponent, kernel size and, where there is a choice, comparison group.
        """
        log_column, log_neighbourhood, exponent = (
            low + (high - low) * min(1.0, max(0.0, float(x)))
            for x, (low, high) in zip(point[:3], self._continuous(), strict=True)
        )
        return Coefficients(
            row=self.row,
            column=math.exp(log_column),
            neighbourhood=math.exp(log_neighbourhood),
            kernel_size=self.kernel_sizes[_index(point[3], self.kernel_sizes)],
            activation_exponent=exponent,
            comparison_group=self.comparison_groups[_index(point[4], self.comparison_groups)]
            if self.comparison_groups
            else None,
        )

    def point(self, coefficients: Coefficients) -> list[float]:
        """The point [axes] of the unit cube whose coefficients are nearest to those given, up to a common factor."""
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
        point.append(nearest / (len(sizes) - 1) if len(sizes) > 1 else 0.5)
        groups = self.comparison_groups
        if groups:
            group = coefficients.comparison_group
            point.append(0.5 if group is None else float(groups.index(group)))
        return point

    def varying(self) -> list[int]:
        """The axes of the unit cube that matter."""
        axes = [axis for axis, (low, high) in enumerate(self._continuous()) if high > low]
        return axes + [3] * (len(self.kernel_sizes) > 1) + [4] * bool(self.comparison_groups)

    def choices(self) -> dict[int, int]:
        """How many values each axis has that is no continuous one."""
        return {3: len(self.kernel_sizes), 4: len(self.comparison_groups)}

    def _continuous(self) -> list[tuple[float, float]]:
        logs = [(math.log(low), math.log(high)) for low, high in (self.column, self.neighbourhood)]
        return [*logs, self.activation_exponent]


def _index(place: float, values: Sequence[Any]) -> int:
    """Which of some values lies nearest to a place between 0, the first, and 1, the last."""
    last = len(values) - 1
    return min(last, max(0, round(float(place) * last)))
