"""Candidates measured on the pruned model: trials, the stages they belong to, and when one is clearly better."""

import dataclasses
import math

from scipy.stats import t as student_t

from crepe_llm.search.space import Coefficients

__all__ = ["CONFIDENCE", "Plan", "Round", "Stage", "Trial"]

CONFIDENCE = 0.975
"""A gain counts from this quantile of Student's t distribution on, in standard errors: 2.4 for 8 windows, 2 for 60."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What the model pruned with one candidate loses on windows of text.

    Attributes:
        coefficients: what was tried.
        losses: of each window, the loss summed over its tokens, in nats.
        tokens: of each window, how many tokens were predicted.
        seconds: wall time of pruning and measuring.
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
        windows, tokens = len(self.losses), sum(self.tokens)
        gains = [theirs - own for own, theirs in zip(self.losses, other.losses, strict=True)]
        gain = math.fsum(gains) / tokens
        if windows < 2:
            return gain, math.inf
        squares = math.fsum((g - gain * n) ** 2 for g, n in zip(gains, self.tokens, strict=True))
        return gain, math.sqrt(squares * windows / (windows - 1)) / tokens

    def clearly_better(self, other: "Trial") -> bool:
        """Whether the gain is more than its standard error times the quantile of :data:`CONFIDENCE`."""
        gain, error = self.gain_over(other)
        return gain > 0 and gain > needed_errors(len(self.losses)) * error


def needed_errors(windows: int) -> float:
    """How many standard errors a gain on so many windows must exceed; infinite for one window."""
    return float(student_t.ppf(CONFIDENCE, windows - 1)) if windows > 1 else math.inf


@dataclasses.dataclass
class Stage:
    """Trials on the same windows.

    Attributes:
        name: how candidates are pruned and what is measured.
        trials: the incumbent's first, which the others must beat.
    """

    name: str
    trials: list[Trial] = dataclasses.field(default_factory=list)

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
    """

    budget: str
    rounds: tuple[Round, ...]
    seconds: float

    def __post_init__(self) -> None:
        rounds = tuple(Round(**each) if isinstance(each, dict) else each for each in self.rounds)
        object.__setattr__(self, "rounds", rounds)
