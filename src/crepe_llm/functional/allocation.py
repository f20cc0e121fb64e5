"""How much of each decoder block to prune, so that the whole model is pruned to a target.

Every method maps one number per block (or none, where a rule looks at the depth alone) to one sparsity per block, as
published; :func:`water_fill` then meets the parameter-weighted target exactly within bounds, which none of the methods
does by itself where blocks differ in size or a sparsity is cut off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = [
    "KNOBS",
    "Allocation",
    "alpha_pruning",
    "atp",
    "dlp",
    "fraction_of",
    "mixed_n_of_m",
    "outlier_ratio",
    "owl",
    "plot_allocation",
    "tail_exponent",
    "typical_score",
    "water_fill",
]

Method = Literal["owl", "alphapruning", "dlp", "atp", "uniform"]
KNOBS: dict[str, tuple[str, ...]] = {
    "owl": ("threshold", "spread"),
    "alphapruning": ("spread", "tail"),
    "dlp": ("spread", "statistic"),
    "atp": ("slope", "spread"),
    "uniform": (),
}
"""The arguments of each method that :class:`Allocation` takes."""


@dataclass(frozen=True)
class Allocation:
    """A method with its knobs (None where its function's default counts), and bounds of the blocks' sparsities.

    Raises:
        ValueError: if a knob is not the method's, or `slope` and `spread` are both given.
    """

    method: Method
    threshold: float | None = None
    spread: float | None = None
    statistic: Literal["median", "mean"] | None = None
    tail: Literal["peak", "middle"] | None = None
    slope: float | None = None
    low: float = 0.0
    high: float = 0.99

    def __post_init__(self) -> None:
        for name in sorted({knob for knobs in KNOBS.values() for knob in knobs}):
            value = getattr(self, name)
            if value is not None and name not in KNOBS[self.method]:
                users = " and ".join(method for method, knobs in KNOBS.items() if name in knobs)
                raise ValueError(f"{name}={value} is for {users}, and method: {self.method} has no use for it: drop it")
        if self.slope is not None and self.spread is not None:
            raise ValueError(f"slope={self.slope} and spread={self.spread} say the same in two ways: give one of them")

    @property
    def needs_data(self) -> bool:
        """Whether the method looks at scores, which take calibration data."""
        return self.method in ("owl", "dlp")

    @property
    def needs_weights(self) -> bool:
        """Whether the method looks at the dense weights."""
        return self.method == "alphapruning"

    def of_scores(self, scores: torch.Tensor) -> float:
        """What `owl` and `dlp` rank a block by, given all its Wanda scores (any shape)."""
        if self.method == "owl":
            return outlier_ratio(scores, **self._given("threshold"))
        return typical_score(scores, **self._given("statistic"))

    def of_weights(self, weights: Sequence[torch.Tensor]) -> float:
        """What `alphapruning` ranks a block by, given its layers' weights [d_out, d_in]."""
        return sum(tail_exponent(weight, **self._given("tail")) for weight in weights) / len(weights)

    def sparsities(self, measures: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
        """A sparsity for each block by its measure (none for `atp` and `uniform`), before bounds and target."""
        match self.method:
            case "owl":
                return owl(measures, target, **self._given("spread"))
            case "dlp":
                return dlp(measures, target, **self._given("spread"))
            case "alphapruning":
                return alpha_pruning(measures, sizes, target, **self._given("spread"))
            case "atp":
                return atp(len(sizes), target, **self._given("slope"), **self._given("spread"))
        return [target] * len(sizes)

    def choose(
        self, measures: Sequence[float], sizes: Sequence[int], target: float, group: int | None
    ) -> list[float | str]:
        """What each block gets, so that all weights together meet the target.

        Args:
            measures: of each block, see :meth:`of_scores` and :meth:`of_weights`; empty for the other methods.
            sizes: the number of weights of each block.
            target: fraction of all weights to prune.
            group: M of N:M masks, or None for unstructured ones.

        Returns:
            fractions, or "N:M".
        """
        low, high = self.low, self.high
        if group is not None:
            low, high = max(low, 1 / group), min(high, 1 - 1 / group)
        chosen = water_fill(self.sparsities(measures, sizes, target), sizes, target, low=low, high=high)
        return list(chosen) if group is None else [f"{n}:{group}" for n in mixed_n_of_m(chosen, sizes, group)]

    def _given(self, name: str) -> dict[str, Any]:
        value = getattr(self, name)
        return {} if value is None else {name: value}


def fraction_of(chosen: float | str) -> float:
    """What is pruned, of a fraction or "N:M"."""
    if not isinstance(chosen, str):
        return chosen
    n, m = chosen.split(":")
    return int(n) / int(m)


def outlier_ratio(scores: torch.Tensor, threshold: float = 5.0) -> float:
    """Percentage of a block's scores above `threshold` times their mean: OWL's layerwise outlier distribution.

    Args:
        scores: Wanda's scores of all linear layers of the block, non-negative, any shape.
        threshold: M of the paper.

    Source: OWL, arXiv 2310.05175, equation 2.
    """
    return 100 * (scores > threshold * scores.mean(dtype=torch.float64)).count_nonzero().item() / scores.numel()


def typical_score(scores: torch.Tensor, statistic: Literal["median", "mean"] = "median") -> float:
    """The median or the mean of a block's scores: what :func:`dlp` ranks blocks by.

    Args:
        scores: Wanda's scores of all linear layers of the block, any shape.
        statistic: `median`, the paper's text (exact; the lower of the two in the middle of an even count), or `mean`,
            its released code.

    Source: DLP, arXiv 2505.23807.
    """
    return scores.median().item() if statistic == "median" else scores.mean(dtype=torch.float64).item()


def owl(outlier_ratios: Sequence[float], sparsity: float, spread: float = 0.08) -> list[float]:
    """Keep more of blocks with more outliers: densities linear in the ratios, over a range of twice `spread`.

    Args:
        outlier_ratios: of each block, see :func:`outlier_ratio`.
        sparsity: the mean of the result.
        spread: lambda of the paper.

    Returns:
        One sparsity per block, not yet bounded. Equal ratios give equal sparsities, where the paper's formula is 0 / 0.

    Source: OWL, arXiv 2310.05175, and its released code.
    """
    return _linear([-ratio for ratio in outlier_ratios], sparsity, spread)


def dlp(typical_scores: Sequence[float], sparsity: float, spread: float = 0.15) -> list[float]:
    """Prune blocks with higher typical scores more.

    Args:
        typical_scores: of each block, see :func:`typical_score`.
        sparsity: the mean of the result.
        spread: alpha of the paper; the result covers a range of twice that.

    Returns:
        One sparsity per block, not yet bounded.

    Source: DLP, arXiv 2505.23807, and its released code. The paper's relative importance, one minus a block's share of
    the sum, is linear in the score, so that it drops out when it is mapped to the range.
    """
    return _linear(typical_scores, sparsity, spread)


def alpha_pruning(
    exponents: Sequence[float], parameters: Sequence[float], sparsity: float, spread: float = 0.3
) -> list[float]:
    """Prune blocks with lighter-tailed spectra, which training has shaped less, more.

    Args:
        exponents: of each block, the mean of the :func:`tail_exponent` of its linear layers.
        parameters: how many weights each block has.
        sparsity: the parameter-weighted mean of the result.
        spread: epsilon of the paper; the result covers (1 - spread) to (1 + spread) up to a common factor.

    Returns:
        One sparsity per block, not yet bounded.

    Source: AlphaPruning, arXiv 2410.10912, and its released code.
    """
    ratios = _linear(exponents, 0.0, spread)
    middle = (max(ratios) + min(ratios)) / 2
    ratios = [1 + ratio - middle for ratio in ratios]
    weighted = sum(count * ratio for count, ratio in zip(parameters, ratios, strict=True))
    return [ratio * sparsity * sum(parameters) / weighted for ratio in ratios]


def atp(blocks: int, sparsity: float, slope: float | None = None, *, spread: float | None = None) -> list[float]:
    """Prune each block by the same amount more than the one before it.

    Args:
        blocks: how many there are.
        sparsity: the mean of the result.
        slope: beta of the paper, what each block is pruned more than its predecessor.
        spread: the same as half of the range of the result, which says as much in models of any depth. Where both are
            left out, half of the largest that keeps all sparsities between 0 and 1, which is our choice: the paper
            searches for it.

    Returns:
        One sparsity per block.

    Raises:
        ValueError: if both are given, or the one given is negative or too large.

    Source: ATP, ICML 2025 (OpenReview otNB7BzsiR), without `spread`.
    """
    if slope is not None and spread is not None:
        raise ValueError(f"slope={slope} and spread={spread} say the same in two ways: give one of them")
    largest = min(sparsity, 1 - sparsity)
    half = (blocks - 1) / 2
    if slope is not None:
        spread = slope * half
    elif spread is None:
        spread = largest / 2
    if not 0 <= spread <= largest * (1 + 1e-9):
        raise ValueError(
            f"a slope of {slope} takes {blocks} blocks of mean sparsity {sparsity} out of [0, 1]: "
            f"use at most {largest / half:.4g}"
            if slope is not None
            else f"spread={spread} takes blocks of mean sparsity {sparsity} out of [0, 1]: use at most {largest:.4g}"
        )
    return [sparsity + spread * (block / half - 1) if half else sparsity for block in range(blocks)]


def tail_exponent(weight: torch.Tensor, tail: Literal["peak", "middle"] = "peak") -> float:
    """Exponent of the power law in the upper tail of the spectrum of W^T W, by Hill's estimator.

    Args:
        weight: [d_out, d_in], any floating dtype; singular values are taken in fp32.
        tail: where the tail begins. `middle`: at the median eigenvalue. `peak`, the released code's default: near the
            peak of the histogram of log-eigenvalues (100 bins, from 0.95 to 1.5 times the left edge of the highest), at
            the eigenvalue from which the power law fits best by the Kolmogorov-Smirnov distance.

    Returns:
        alpha, above 1; infinity where the tail has no spread, as that of a zero matrix.

    Source: AlphaPruning, arXiv 2410.10912. Its code compares the lower of the two bounds with an eigenvalue's
    logarithm, which mostly disables it; here it is a bound.
    """
    eigenvalues = torch.linalg.svdvals(weight.float()).double().square().sort().values
    eigenvalues = eigenvalues[eigenvalues > 0]
    count = len(eigenvalues)
    if count < 2:
        return math.inf
    logs = eigenvalues.log()
    if tail == "middle":
        starts = torch.tensor([count // 2])
    else:
        low, high = logs[0].item(), logs[-1].item()
        histogram = torch.histc(logs, bins=100, min=low, max=high)
        edge = math.exp(low + (high - low) * int(histogram.argmax()) / 100)
        near = (eigenvalues >= 0.95 * edge) & (eigenvalues <= 1.5 * edge)
        # The last eigenvalue alone is no tail.
        starts = near[:-1].nonzero().flatten().cpu()
    best = (math.inf, math.inf)
    for start in starts.tolist():
        size = count - start
        excess = (logs[start:] - logs[start]).sum().item()
        exponent = 1 + size / excess if excess > 0 else math.inf
        if not math.isfinite(exponent):
            continue
        survival = (eigenvalues[start:] / eigenvalues[start]).pow(1 - exponent)
        ranks = torch.arange(size, dtype=torch.float64, device=survival.device) / size
        best = min(best, ((1 - survival - ranks).abs().max().item(), exponent))
    return best[1]


def water_fill(
    sparsities: Sequence[float], parameters: Sequence[float], target: float, *, low: float = 0.0, high: float = 0.99
) -> list[float]:
    """Shift all sparsities by one amount, cut off at the bounds, so that their weighted mean is the target.

    Args:
        sparsities: of each block.
        parameters: how many weights each block has, positive.
        target: what is to be pruned of all weights.
        low: smallest sparsity of a block.
        high: largest sparsity of a block.

    Returns:
        One sparsity per block, from `low` to `high`; what a bound does not cut off keeps its distance to the others.

    Raises:
        ValueError: if a sparsity is not finite, or the target is not within the bounds.

    Source: ours.
    """
    if not all(map(math.isfinite, sparsities)):
        raise ValueError(f"sparsities must be finite, got {list(sparsities)}")
    if not 0 <= low <= target <= high < 1:
        raise ValueError(f"low={low}, target={target} and high={high} must ascend between 0 and 1")
    total = sum(parameters)

    def filled(shift: float) -> list[float]:
        return [min(high, max(low, sparsity + shift)) for sparsity in sparsities]

    def mean(values: list[float]) -> float:
        return sum(value * count for value, count in zip(values, parameters, strict=True)) / total

    # All at the lower bound, and all at the upper one.
    below, above = low - max(sparsities), high - min(sparsities)
    for _ in range(200):
        middle = (below + above) / 2
        if mean(filled(middle)) < target:
            below = middle
        else:
            above = middle
    return filled(above)


def mixed_n_of_m(sparsities: Sequence[float], parameters: Sequence[int], group: int) -> list[int]:
    """Round each block's sparsity up or down to N of M, so that their weighted mean stays as near as it can.

    Args:
        sparsities: of each block, from 1 / M to 1 - 1 / M.
        parameters: how many weights each block has, positive.
        group: M.

    Returns:
        N of each block, N pruned of every M. Of all roundings whose weighted mean is nearest to that of the sparsities,
        the one that moves the blocks least, by the weighted sum of squares. Exact; the time grows with the number of
        different sums of block sizes, which is small where most blocks are alike.

    Raises:
        ValueError: if a sparsity is out of range.

    Source: ours.
    """
    unit = math.gcd(*parameters)
    # For every sum that the blocks so far can have: what it costs at least, and with which N.
    sums: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for sparsity, count in zip(sparsities, parameters, strict=True):
        exact = sparsity * group
        options = {round(exact)} if abs(exact - round(exact)) < 1e-6 else {math.floor(exact), math.ceil(exact)}
        if not 1 <= min(options) <= max(options) < group:
            raise ValueError(f"a sparsity of {sparsity} is not from 1 of {group} to {group - 1} of {group}")
        reached: dict[int, tuple[float, tuple[int, ...]]] = {}
        for total, (cost, chosen) in sums.items():
            for n in options:
                candidate = (cost + count * (n - exact) ** 2, (*chosen, n))
                place = total + n * count // unit
                reached[place] = min(candidate, reached.get(place, candidate))
        sums = reached
    wanted = sum(sparsity * count for sparsity, count in zip(sparsities, parameters, strict=True)) * group / unit
    best = min(sums, key=lambda total: (round(abs(total - wanted), 6), sums[total][0]))
    return list(sums[best][1])


def plot_allocation(sparsities: Sequence[float], target: float, path: str | Path, title: str = "") -> None:
    """Draw the sparsity of each block, in the model's order, and the target.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(sparsities)), sparsities, color="C0")
    axes.axhline(target, color="C3", linestyle="--", label="target")
    axes.set(xlabel="block", ylabel="sparsity", ylim=(0, 1), title=title)
    axes.legend()
    figure.savefig(path, dpi=120)


def _linear(values: Sequence[float], mean: float, spread: float) -> list[float]:
    """Map values to a range of twice `spread` about a mean, the smallest value to the smallest."""
    low, high = min(values), max(values)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"a block has no finite measure: {list(values)}")
    scaled = [2 * spread * (value - low) / (high - low) if high > low else 0.0 for value in values]
    centre = sum(scaled) / len(scaled)
    return [mean + value - centre for value in scaled]
