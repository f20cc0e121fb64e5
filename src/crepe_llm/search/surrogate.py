"""A smooth surface through the losses of measured candidates: which are good, and where better ones may be."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize

from crepe_llm.search.space import Coefficients, SearchSpace
from crepe_llm.search.trials import Trial

__all__ = ["Surrogate"]

Floats = npt.NDArray[np.float64]

# Losses above this quantile count as it: how bad the bad ones are says nothing of where the best one is.
_QUANTILE = 0.75
# The prior of the logarithms of lengths (in unit cubes), of the surface's spread and of the noise (in spreads of the
# losses): mean and standard deviation. Without it, a few dozen trials could fit anything.
_LENGTH, _SPREAD, _NOISE = (np.log(0.7), 0.7), (0.3, 0.7), (-2.0, 0.7)
# Places that are looked at for proposals, and how near a proposal may be to a measured place or to another.
_LOOKED_AT, _NEAR = 2048, 0.12
# Finalists nearer to each other than this would answer the same question twice.
_APART = 0.2


class Surrogate:
    """A Gaussian process over the unit cube of a search space, fitted to the losses of trials.

    Its kernel is Matérn's with smoothness 5/2 and a length for each axis. Lengths, spread and noise are those of the
    highest posterior density. The noise is what makes it prefer a candidate among good ones to a lucky one.

    Args:
        space: what was searched.
        trials: on the same windows, two at least.

    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), 2.2, 4.2 and 5.4; the priors are
    ours.
    """

    def __init__(self, space: SearchSpace, trials: Sequence[Trial]) -> None:
        self._space, self._axes = space, space.varying()
        self._trials = list(trials)
        self._known = self._points([trial.coefficients for trial in trials])
        losses = np.array([trial.loss for trial in trials])
        losses = np.minimum(losses, np.quantile(losses, _QUANTILE))
        self._centre, self._scale = losses.mean(), losses.std() or 1.0
        self._losses = (losses - self._centre) / self._scale
        self._fit()

    def expected(self, candidates: Sequence[Coefficients]) -> Floats:
        """The losses to be expected of candidates, [n], in nats a token."""
        return self._predict(self._points(candidates))[0]

    def finalists(self, count: int) -> list[Coefficients]:
        """Of the trials' candidates the first one, and those of the lowest expected losses that are apart.

        Args:
            count: how many, if there are as many.
        """
        first, *others = self._trials
        expected = self.expected([trial.coefficients for trial in others]) if others else np.zeros(0)
        ranked = [others[index].coefficients for index in np.argsort(expected, kind="stable")]
        chosen: list[Coefficients] = []
        for far in (_APART, 0.0):
            for coefficients in ranked:
                if len(chosen) < count - 1 and coefficients not in chosen and self._far(coefficients, chosen) >= far:
                    chosen.append(coefficients)
        return [first.coefficients, *chosen]

    def propose(self, count: int, seed: int) -> list[Coefficients]:
        """Candidates that may be better than all so far, apart from each other and from those measured.

        Those of the lowest losses to be expected, less the standard deviation of what is expected.

        Args:
            count: how many, if there are as many.
            seed: of the places that are looked at.
        """
        drawn = torch.quasirandom.SobolEngine(self._space.axes, scramble=True, seed=seed)
        places = [self._space.coefficients(place) for place in drawn.draw(_LOOKED_AT, dtype=torch.float64).tolist()]
        points = self._points(places)
        mean, deviation = self._predict(points)
        chosen: list[Coefficients] = []
        taken = list(self._known)
        for index in np.argsort(mean - deviation, kind="stable"):
            if len(chosen) < count and np.abs(np.array(taken) - points[index]).max(axis=1).min() >= _NEAR:
                chosen.append(places[index])
                taken.append(points[index])
        return chosen

    def _far(self, coefficients: Coefficients, others: Sequence[Coefficients]) -> float:
        """How far from the nearest of others, along the axis along which it is farthest."""
        if not others:
            return 1.0
        return float(np.abs(self._points(others) - self._points([coefficients])).max(axis=1).min())

    def _points(self, candidates: Sequence[Coefficients]) -> Floats:
        return np.array([self._space.point(each) for each in candidates])[:, self._axes]

    def _fit(self) -> None:
        axes = len(self._axes)

        def cost(numbers: Floats) -> float:
            try:
                factor = cho_factor(self._covariance(numbers), lower=True)
            except np.linalg.LinAlgError:
                return 1e9
            fit = 0.5 * self._losses @ cho_solve(factor, self._losses) + np.log(np.diag(factor[0])).sum()
            priors = [*[_LENGTH] * axes, _SPREAD, _NOISE]
            return float(fit + sum(((x - m) / s) ** 2 / 2 for x, (m, s) in zip(numbers, priors, strict=True)))

        starts = [np.array([np.log(length)] * axes + [0.3, -2.0]) for length in (0.3, 0.7)]
        found = min((minimize(cost, start, method="L-BFGS-B") for start in starts), key=lambda result: result.fun)
        self._numbers: Floats = found.x
        self._factor = cho_factor(self._covariance(self._numbers), lower=True)
        self._weights = cho_solve(self._factor, self._losses)

    def _covariance(self, numbers: Floats) -> Floats:
        noise = np.exp(2 * numbers[-1]) + 1e-6
        return _kernel(self._known, self._known, numbers) + noise * np.eye(len(self._known))

    def _predict(self, points: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the surface at points, [n] each, in nats a token."""
        across = _kernel(points, self._known, self._numbers)
        explained = solve_triangular(self._factor[0], across.T, lower=True)
        variance = np.exp(2 * self._numbers[-2]) - (explained**2).sum(axis=0)
        mean = across @ self._weights * self._scale + self._centre
        return mean, np.sqrt(np.maximum(variance, 0)) * self._scale


def _kernel(first: Floats, second: Floats, numbers: Floats) -> Floats:
    """Matérn's kernel of smoothness 5/2 between points, [n, m]; `numbers` are logarithms: lengths, spread, noise."""
    apart = (first[:, None] - second[None]) / np.exp(numbers[:-2])
    distance = np.sqrt(5 * (apart**2).sum(axis=-1))
    kernel: Floats = np.exp(2 * numbers[-2]) * (1 + distance + distance**2 / 3) * np.exp(-distance)
    return kernel
