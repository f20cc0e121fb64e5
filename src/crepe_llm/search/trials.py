"""Candidates measured on the pruned model: trials, the stages they belong to, and when one is clearly better."""

import dataclasses
import math
from collections.abc import Sequence

from scipy.stats import t as student_t

from crepe_llm.search.space import Coefficients

__all__ = ["CONFIDENCE", "Plan", "Round", "Stage", "Trial", "gain_over", "is_clear"]

CONFIDENCE = 0.975
"""A gain counts from this quantile of Student's t distribution on, in standard errors: 2.4 for 8 windows, 2 for 60."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the model pruned with one candidate loses on windows of text.

    Attributes:
        coefficients: what was tried.
        losses: of each window, the loss summed over its tokens, in nats.
        tokens: of each window, how many tokens were predicted.
        seconds: wall time of pruning and measuring, added up where several processes shared it.
    """

    coefficients: Coefficients
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    seconds: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not len(self.losses) == len(self.tokens) > 0 or min(self.tokens) < 1:
            raise ValueError(f"a trial has {len(self.losses)} losses, and predicted {self.tokens} tokens")

    @property
    def loss(self) -> float:
        """Nats per token, over all windows."""
        return math.fsum(self.losses) / sum(self.tokens)

    def gain_over(self, other: "Trial") -> tuple[float, float]:
        """By how many nats per token this loses less than another on the same windows, and the standard error of that.

        Windows differ more from each other than masks do, so the difference is taken window by window. The standard
        error is that of a ratio estimate (Cochran, Sampling Techniques, 6.4); with one window it is infinite.

        Raises:
            ValueError: the two were measured on other windows.
        """
        if self.tokens != other.tokens:
            raise ValueError(f"trials on {len(self.tokens)} and {len(other.tokens)} windows cannot be compared")
        return gain_over(self.losses, other.losses, self.tokens)

    def clearly_better(self, other: "Trial") -> bool:
        """Whether the gain is more than its standard error times the quantile of :data:`CONFIDENCE`."""
        return is_clear(*self.gain_over(other), len(self.losses))

    def on(self, windows: Sequence[int]) -> "Trial":
        """The same on some of its windows."""
        losses = tuple(self.losses[window] for window in windows)
        return Trial(self.coefficients, losses, tuple(self.tokens[window] for window in windows), self.seconds)


def gain_over(losses: Sequence[float], others: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """By how many nats a token less is lost than by another on the same windows, and the standard error of that.

    Args:
        losses: of each window, the loss summed over its tokens, in nats.
        others: the other's.
        tokens: of each window, how many were predicted.
    """
    windows, total = len(losses), sum(tokens)
    gains = [theirs - own for own, theirs in zip(losses, others, strict=True)]
    gain = math.fsum(gains) / total
    if windows < 2:
        return gain, math.inf
    squares = math.fsum((g - gain * n) ** 2 for g, n in zip(gains, tokens, strict=True))
    return gain, math.sqrt(squares * windows / (windows - 1)) / total


def is_clear(gain: float, error: float, windows: int, tried: int = 1) -> bool:
    """Whether a gain is more than its standard error times what :func:`needed_errors` gives."""
    return gain > 0 and gain > needed_errors(windows, tried) * error


def needed_errors(windows: int, tried: int = 1) -> float:
    """How many standard errors a gain on so many windows must exceed; infinite for one window.

    Args:
        windows: how many.
        tried: of how many candidates it may be the best.
    """
    return float(student_t.ppf(1 - (1 - CONFIDENCE) / tried, windows - 1)) if windows > 1 else math.inf


@dataclasses.dataclass
class Stage:
    """Trials on the same windows.

    Attributes:
        name: how candidates are pruned and what is measured.
        trials: the incumbent's first, which the others must beat.
        chosen: for each half of the text, which trial the stage before would have chosen by that half alone; None where
            it does not tell. Windows of the halves take turns: those with even numbers are the first half's.
        tried: how many candidates the stage before has chosen from; 0 where that is not known.
    """

    name: str
    trials: list[Trial] = dataclasses.field(default_factory=list)
    chosen: tuple[int, int] | None = None
    tried: int = 0

    def __post_init__(self) -> None:
        if self.chosen is not None:
            self.chosen = (self.chosen[0], self.chosen[1])

    def half(self, number: int) -> range:
        """The windows of one half, 0 or 1."""
        return range(number, len(self.trials[0].losses), 2)

    @property
    def honest_gain(self) -> tuple[float, float]:
        """What choosing gains over the incumbent on text that it has not seen, in nats a token, and its standard error.

        What was chosen on each half of the windows is judged on the other half. The best of many candidates seems
        better than it is on the text that it was chosen on; here it does not.

        Raises:
            ValueError: nothing was chosen by halves.
        """
        if self.chosen is None:
            raise ValueError(f"what halves of the text would choose is not known in the stage `{self.name}`")
        first, losses = self.trials[0], list(self.trials[0].losses)
        for number, chosen in enumerate(self.chosen):
            for window in self.half(1 - number):
                losses[window] = self.trials[chosen].losses[window]
        return dataclasses.replace(first, losses=tuple(losses)).gain_over(first)

    @property
    def is_confirmed(self) -> bool:
        """Whether the winner is better than the incumbent on text that it was not chosen on, if the stage can tell.

        It is where choosing by one half of the windows is clearly better on the other. The two halves' gains are not
        independent: both are large where both halves happen to like the same place. At most they are one and the same,
        so the standard error counts the square root of 2 times.

        What a half alone would choose may be worse than the winner for reasons that are no luck of windows. So it also
        is where the winner's gain on all windows is clear although it is the best of many: for as many candidates as
        were tried, the level of the test is divided by their number (Bonferroni).
        """
        if self.chosen is None:
            return True
        gain, error = self.honest_gain
        windows = len(self.trials[0].losses)
        if is_clear(gain, math.sqrt(2) * error, windows):
            return True
        gain, error = self.winner.gain_over(self.trials[0])
        return self.tried > 0 and is_clear(gain, error, windows, self.tried)

    @property
    def winner(self) -> Trial:
        """Of the trials that are clearly better than the incumbent's the one of the lowest loss, else the incumbent's.

        Raises:
            ValueError: there is no trial yet.
        """
        if not self.trials:
            raise ValueError(f"the stage `{self.name}` has no trial yet")
        better = [trial for trial in self.trials[1:] if trial.clearly_better(self.trials[0])]
        return min(better, key=lambda trial: trial.loss, default=self.trials[0])

    def best(self, count: int) -> list[Coefficients]:
        """The incumbent, and the `count` - 1 others of the lowest loss."""
        others = sorted(self.trials[1:], key=lambda trial: trial.loss)
        return [trial.coefficients for trial in [*self.trials[:1], *others[: count - 1]]]

    def table(self, rows: int = 8) -> str:
        """A line for the incumbent and the best few others: loss, gain over it with its standard error, coefficients.

        Args:
            rows: how many lines of trials.
        """
        if not self.trials:
            return f"{self.name}: nothing yet"
        first, winner = self.trials[0], self.winner
        windows, tokens = len(first.tokens), sum(first.tokens)
        lines = [
            f"{self.name}: {len(self.trials)} candidates on {tokens} tokens in {windows} windows, "
            f"{math.fsum(trial.seconds for trial in self.trials):.1f} s; a gain counts from "
            f"{needed_errors(windows):.2f} standard errors on",
            "      loss       gain  st. error",
        ]
        if self.chosen is not None:
            gain, error = self.honest_gain
            lines.insert(
                1, f"chosen on each half of the text and judged on the other: {gain:+.4g}, st. error {error:.3g}"
            )
        shown = {*self.best(rows), winner.coefficients}
        for trial in sorted(self.trials, key=lambda trial: trial.loss):
            if trial.coefficients not in shown:
                continue
            gain, error = trial.gain_over(first)
            compared = f" {gain:+10.4g} {error:10.3g}" if trial is not first else f"{'incumbent':>22}"
            mark = "  <- best that is clearly better" if trial is winner and trial is not first else ""
            lines.append(f"{trial.loss:10.4g}{compared}  {trial.coefficients}{mark}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Round:
    """One stage of a plan: how many candidates, each on how many windows."""

    candidates: int
    windows: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a search is going to do, fixed before it begins, so that a resumed one does the same.

    Attributes:
        budget: what was asked for, such as "tokens=50000"; "" for the default.
        rounds: the stages, the last one with pruning as the recipe prunes; none where the budget is spent without them.
        seconds: what the rounds were expected to take.
        limit: the most seconds that the trials of the first stage may take together, by the times on record; None where
            time is no budget.
    """

    budget: str
    rounds: tuple[Round, ...]
    seconds: float
    limit: float | None = None

    def __post_init__(self) -> None:
        rounds = tuple(Round(**each) if isinstance(each, dict) else each for each in self.rounds)
        object.__setattr__(self, "rounds", rounds)
