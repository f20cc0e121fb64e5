"""Optimisers of CRePE's coefficients: generators that yield generations of candidates and are sent their losses."""

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch

from crepe_llm.search.space import Coefficients, SearchSpace

__all__ = ["LOOKED_AT", "OPTIMISERS", "Optimiser", "cma_es", "random_search"]

Optimiser = Generator[list[Coefficients], list[float], None]

LOOKED_AT = 64
"""How many candidates CMA-ES looks around with: a power of two, which Sobol sequences want."""

# Candidates of a generation, before CMA-ES chooses their number itself.
_GENERATION = 8


def random_search(space: SearchSpace, seed: int) -> Optimiser:
    """Yield candidates drawn evenly from the space, 8 at a time, without end."""
    generator = np.random.default_rng(seed)
    while True:
        yield [space.coefficients(generator.random(space.axes).tolist()) for _ in range(_GENERATION)]


def cma_es(space: SearchSpace, seed: int) -> Optimiser:
    """Yield a look around, then generations of the covariance matrix adaptation evolution strategy, without end.

    The look around is 64 points of a scrambled Sobol sequence, spread evenly over the space. The first run starts at
    the best of them; a run that has converged is followed by one that starts at a random place. The kernel size and the
    comparison group are integer variables: cma keeps their spread from falling below one step.

    Args:
        space: where to search.
        seed: of everything random. numpy's global generator is left as it was.

    Raises:
        ImportError: the package ``cma`` is missing.

    Source: Hansen, arXiv 1604.00772, through the package ``cma``.
    """
    try:
        import cma
    except ImportError as error:
        raise ImportError('CMA-ES needs the package cma: pip install ".[compress]" in the checkout') from error
    numpy_state = _NumpyState(seed)
    axes = _Axes(space)
    spread = torch.quasirandom.SobolEngine(space.axes, scramble=True, seed=seed)
    looked_at = spread.draw(LOOKED_AT, dtype=torch.float64).tolist()
    losses: list[float] = []
    for first in range(0, LOOKED_AT, _GENERATION):
        losses += yield [space.coefficients(point) for point in looked_at[first : first + _GENERATION]]
    start: list[float] = looked_at[losses.index(min(losses))]
    while True:
        with numpy_state:
            strategy = cma.CMAEvolutionStrategy(axes.inner(start), 0.25, axes.options())
        while True:
            with numpy_state:
                stopped = strategy.stop()
                points = [] if stopped else strategy.ask()
            if stopped:
                break
            losses = yield [space.coefficients(axes.full(point)) for point in points]
            with numpy_state:
                strategy.tell(points, losses)
        with numpy_state:
            start = np.random.random(space.axes).tolist()


OPTIMISERS: dict[str, Callable[[SearchSpace, int], Optimiser]] = {"cma": cma_es, "random": random_search}
"""By the name that a study has them under: functions of the space and the seed."""


class _Axes:
    """The axes of a space that vary, as cma sees them.

    Continuous axes run over [0, 1]; those of sizes and groups over their indices, a step of 1 from one to the next.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._axes = space.varying()
        self._all = space.axes
        choices = space.choices()
        self._extents = [float(choices.get(axis, 2) - 1) for axis in self._axes]
        self._integers = [place for place, axis in enumerate(self._axes) if axis in choices]

    def full(self, inner: Sequence[float]) -> list[float]:
        """The point [axes] of the unit cube at a point of cma's."""
        point = [0.5] * self._all
        for axis, extent, value in zip(self._axes, self._extents, inner, strict=True):
            point[axis] = value / extent
        return point

    def inner(self, point: Sequence[float]) -> list[float]:
        """The reverse of :meth:`full`."""
        return [point[axis] * extent for axis, extent in zip(self._axes, self._extents, strict=True)]

    def options(self) -> dict[str, Any]:
        """cma's options for these axes."""
        return {
            "seed": math.nan,  # cma leaves numpy's generator alone, and uses the state that _NumpyState puts there
            "verbose": -9,
            "bounds": [[0.0] * len(self._axes), self._extents],
            "CMA_stds": self._extents,
            "integer_variables": self._integers,
        }


class _NumpyState:
    """While entered, numpy's global generator is this object's own; cma draws from the global one."""

    def __init__(self, seed: int) -> None:
        self._own = np.random.RandomState(seed).get_state()

    def __enter__(self) -> None:
        self._others = np.random.get_state()
        np.random.set_state(self._own)

    def __exit__(self, *exception: object) -> None:
        self._own = np.random.get_state()
        np.random.set_state(self._others)
