"""The record of a search: what was tried, saved as JSON, read, described and plotted."""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import crepe_llm
from crepe_llm.search.optimisers import LOOKED_AT
from crepe_llm.search.space import Coefficients, Mask, SearchSpace
from crepe_llm.search.trials import Plan, Stage, Trial
from crepe_llm.user_cache import user_cache

__all__ = ["Candidate", "Study", "StudyError", "package_versions"]

_FORMAT = 2
# Studies of the first format hold finalists, measured by their negative log-likelihood, where these hold stages.
_FIRST_FORMAT = 1


class StudyError(ValueError):
    """A study cannot be read, continued or used for what was asked."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One evaluated set of coefficients.

    Attributes:
        coefficients: what was tried.
        value: its proxy, in the proxy's own direction.
        seconds: wall time of the evaluation.
        generation: which generation of the optimiser, from 0; -1 for RIA, which every study evaluates first.
    """

    coefficients: Coefficients
    value: float
    seconds: float
    generation: int


@dataclasses.dataclass
class Study:
    """The record of one search: what was searched where and how, and every candidate.

    Attributes:
        model: the model's name or folder.
        mask: the masks that candidates are judged by.
        proxy: what the values are: a proxy's name, or "perplexity".
        higher_is_better: the direction of the values.
        optimiser: a name from OPTIMISERS.
        space: the search space.
        seed: of the optimiser.
        sample: what candidates were evaluated on (layers, rows, tokens, a fingerprint): numbers and names.
        candidates: RIA first, then generation by generation.
        plan: how the stages share the budget; None before it is made, or where another study's candidates are judged.
        stages: what was measured on the pruned model, if anything, in order; the last one decides.
        versions: of the packages that made it.
        finished: whether the budget was spent or the optimiser ended.
    """

    model: str
    mask: Mask
    proxy: str
    higher_is_better: bool
    optimiser: str = "cma"
    space: SearchSpace = dataclasses.field(default_factory=SearchSpace)
    seed: int = 0
    sample: dict[str, Any] = dataclasses.field(default_factory=dict)
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    plan: Plan | None = None
    stages: list[Stage] = dataclasses.field(default_factory=list)
    versions: dict[str, str] = dataclasses.field(default_factory=lambda: package_versions())
    finished: bool = False

    @property
    def reference(self) -> Candidate:
        """RIA's coefficients, evaluated like every candidate.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        if not self.candidates:
            raise StudyError("the study has no candidates yet")
        return self.candidates[0]

    @property
    def best(self) -> Candidate:
        """The best candidate, RIA among them; of equal ones the first.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        return min(self.candidates, key=self.loss) if self.candidates else self.reference

    @property
    def seconds(self) -> float:
        """Time spent on evaluations by the proxy."""
        return math.fsum(candidate.seconds for candidate in self.candidates)

    @property
    def total_seconds(self) -> float:
        """Time spent on evaluations and on the stages; a survivor's time is counted once."""
        spent: dict[tuple[bool, Coefficients], float] = {}
        for stage in self.stages:
            for trial in stage.trials:
                key = (stage is self.stages[-1], trial.coefficients)
                spent[key] = max(trial.seconds, spent.get(key, 0.0))
        return self.seconds + math.fsum(spent.values())

    @property
    def beats_reference(self) -> bool:
        """Whether the best candidate's value is strictly better than RIA's."""
        return self.loss(self.best) < self.loss(self.reference)

    @property
    def recommended(self) -> Coefficients:
        """What to prune with: the winner of the last stage, if choosing is confirmed on text that was not chosen on;
        without stages the best candidate by proxy, or RIA's coefficients where none beats them.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        if self.stages:
            last = self.stages[-1]
            return (last.winner if last.is_confirmed else last.trials[0]).coefficients
        return self.best.coefficients if self.beats_reference else self.reference.coefficients

    @property
    def challengers(self) -> list[Coefficients]:
        """What another model may try of this study, best first: the winner and the best of the rest of its last stage,
        or without stages what the proxy likes best.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        if not self.stages:
            return [self.best.coefficients]
        ranked = sorted(self.stages[-1].trials, key=lambda trial: trial.loss)
        return list(dict.fromkeys([self.recommended, *(trial.coefficients for trial in ranked[:2])]))[:2]

    def shortlist(self, count: int, others: Sequence[Coefficients] = ()) -> list[Coefficients]:
        """Which candidates to measure on the whole model: `others`, the best, some of the look around's better half.

        The proxy tells good regions from bad ones, but not the best place, so those of the better half are taken that
        are farthest from each other. (Later generations crowd around the proxy's optimum. Without CMA-ES every
        candidate belongs to the look around.)

        Args:
            count: how many, if there are as many; `others` and the best in any case.
            others: coefficients from elsewhere, such as a recipe's own.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        best = self.space.competing(self.best.coefficients, self.mask.comparison_group)
        chosen = list(dict.fromkeys([*others, best]))
        looked = self.candidates[1 : 1 + LOOKED_AT] if self.optimiser == "cma" else self.candidates
        half = sorted(looked, key=self.loss)[: max(count, len(looked) // 2)]
        left = [c for c in dict.fromkeys(candidate.coefficients for candidate in half) if c not in chosen]
        while left and len(chosen) < count:
            farthest = max(left, key=lambda c: min(math.dist(self.space.point(c), self.space.point(o)) for o in chosen))
            left.remove(farthest)
            chosen.append(farthest)
        return chosen

    def loss(self, candidate: Candidate) -> float:
        """The candidate's value with the sign under which lower is better."""
        return -candidate.value if self.higher_is_better else candidate.value

    def require_mask(self, mask: Mask) -> None:
        """Refuse to lend coefficients to masks of another kind than the study's.

        Raises:
            StudyError: the masks differ.
        """
        if self.mask != mask:
            raise StudyError(
                f"the study searched for {self.mask} masks, and its coefficients are to prune {mask}: "
                "the best coefficients differ between the two; search again, or take a study of this structure"
            )

    def default_path(self) -> Path:
        """The file in the user's cache folder where a search with these settings is recorded if none is named."""
        settings = [self.proxy, self.optimiser, dataclasses.asdict(self.space), self.seed, self.sample]
        key = zlib.crc32(json.dumps(settings).encode())
        mask = str(self.mask).replace(":", "of").replace("% ", "-").replace(" ", "-")
        return user_cache() / "pho_studies" / f"{self.model}-{mask}-{key:08x}.json"

    def save(self, path: str | Path) -> None:
        """Write the study as JSON, atomically: a reader or a crash sees the old file or the new one, never a part."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read a study.

        Raises:
            StudyError: there is no such file, or it is damaged or no study.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise StudyError(f"the study {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise StudyError(f"the study {path} is damaged, it is not JSON ({error}): restore or delete it") from error
        form = content.pop("format", None) if isinstance(content, dict) else None
        if form not in (_FIRST_FORMAT, _FORMAT):
            raise StudyError(f'{path} is not a study of this version: its "format" is neither 1 nor {_FORMAT}')
        try:
            if form == _FIRST_FORMAT:
                content = _converted(content)
            return cls(**_parsed(content))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StudyError(f"the study {path} is damaged ({error}): restore or delete it") from error

    def __str__(self) -> str:
        best = sorted(self.candidates, key=self.loss)[:5]
        lines = [
            f"{self.model}, {self.mask}: {len(self.candidates)} candidates in {self.seconds:.1f} s "
            f"by {self.optimiser}, seed {self.seed}; "
            f"{self.proxy}, {'higher' if self.higher_is_better else 'lower'} is better"
            + ("" if self.finished else "; unfinished")
        ]
        lines += [f"  {candidate.value:.6g}  {candidate.coefficients}" for candidate in best]
        if self.candidates:
            lines.append(f"  {self.reference.value:.6g}  RIA")
        if self.plan is not None:
            rounds = ", ".join(f"{each.candidates} x {each.windows} windows" for each in self.plan.rounds)
            lines.append(
                f"plan: {rounds or 'no stages, the budget is spent'}; expected to take {self.plan.seconds:.0f} s"
            )
        lines += [stage.table() for stage in self.stages]
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw the search: left every candidate by proxy with the best so far, and a panel for each stage.

        A stage's panel has the gain of each candidate over the incumbent, best first, with its standard error.

        Raises:
            ImportError: matplotlib is missing.
            StudyError: nothing was evaluated yet.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install matplotlib") from error
        panels = 1 + len(self.stages)
        figure = Figure(figsize=(1 + 4 * panels, 4), layout="constrained")
        first, *others = figure.subplots(1, panels, squeeze=False)[0]
        if self.candidates:
            self._plot_proxy(first)
        for axes, stage in zip(others, self.stages, strict=True):
            _plot_stage(axes, stage)
        figure.suptitle(f"{self.model}, {self.mask}")
        figure.savefig(path, dpi=120)

    def _plot_proxy(self, axes: Any) -> None:
        reference = self.reference.value
        values = [candidate.value for candidate in self.candidates[1:]] or [reference]
        best = (np.maximum if self.higher_is_better else np.minimum).accumulate(np.array(values))
        axes.plot(values, ".", color="0.6", label="candidate")
        axes.plot(best, color="C0", label="best so far")
        axes.axhline(reference, color="C3", linestyle="--", label="RIA")
        axes.set(xlabel="candidates", ylabel=self.proxy, title="by proxy")
        axes.legend()


def _plot_stage(axes: Any, stage: Stage) -> None:
    first, winner = stage.trials[0], stage.winner
    ranked = sorted(stage.trials, key=lambda trial: trial.loss)
    for place, trial in enumerate(ranked):
        gain, error = trial.gain_over(first)
        colour = "C2" if trial is winner and trial is not first else "C3" if trial is first else "0.4"
        axes.errorbar(place, gain, yerr=error if math.isfinite(error) else 0.0, fmt="o", color=colour, capsize=2)
    axes.axhline(0.0, color="C3", linestyle="--", label="incumbent")
    tokens = sum(first.tokens)
    title = stage.name.replace(", ", ",\n")
    axes.set(xlabel="candidates, best first", ylabel="gain, nats a token", title=f"{title}\n{tokens} tokens")
    axes.legend()


def _parsed(content: dict[str, Any]) -> dict[str, Any]:
    """A study's fields from its JSON.

    Raises:
        ValueError: a value is not finite, or an object refuses its fields.
    """
    content["mask"] = Mask(**content["mask"])
    content["space"] = SearchSpace(**content["space"])
    content["candidates"] = [_with_coefficients(Candidate, entry) for entry in content.get("candidates", [])]
    if content.get("plan") is not None:
        content["plan"] = Plan(**content["plan"])
    content["stages"] = [
        Stage(
            stage["name"],
            [_with_coefficients(Trial, entry) for entry in stage["trials"]],
            stage.get("chosen"),
            stage.get("tried", 0),
        )
        for stage in content.get("stages", [])
    ]
    values = [candidate.value for candidate in content["candidates"]]
    values += [loss for stage in content["stages"] for trial in stage.trials for loss in trial.losses]
    if not all(map(math.isfinite, values)):
        raise ValueError("a candidate's value is not finite")
    return content


def _with_coefficients(kind: Any, entry: dict[str, Any]) -> Any:
    return kind(**{**entry, "coefficients": Coefficients(**entry["coefficients"])})


def _converted(content: dict[str, Any]) -> dict[str, Any]:
    """The first format's fields as this one's: its finalists are a stage."""
    content = {name: value for name, value in content.items() if name != "population"}
    finalists = content.pop("finalists", [])
    stage = {"name": "negative log-likelihood, of an earlier version", "trials": finalists}
    return content | {"stages": [stage] if finalists else []}


def package_versions() -> dict[str, str]:
    """The versions of what decides over how a search goes."""
    versions = {"crepe_llm": crepe_llm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["cma"] = importlib.metadata.version("cma")
    return versions
