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

__all__ = ["Candidate", "Finalist", "Study", "StudyError", "package_versions"]

_FORMAT = 1


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


@dataclasses.dataclass(frozen=True)
class Finalist:
    """A candidate that the model was pruned with, and how well the model then predicts some sequences of text.

    Attributes:
        coefficients: what was tried.
        losses: of each sequence, the summed negative log-likelihood of its tokens but the first, in nats.
        tokens: of each sequence, how many tokens were predicted.
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
            raise ValueError(f"a finalist has {len(self.losses)} losses, and predicted {self.tokens} tokens")

    @property
    def perplexity(self) -> float:
        """Over all sequences."""
        return math.exp(math.fsum(self.losses) / sum(self.tokens))

    def clearly_better(self, other: "Finalist") -> bool:
        """Whether the mean loss per token is lower by more than twice the standard error of the difference.

        The difference is taken sequence by sequence, since texts differ more from each other than masks do. One
        sequence decides nothing.
        """
        sequences, tokens = len(self.losses), sum(self.tokens)
        if sequences < 2 or self.tokens != other.tokens:
            return False
        gains = [theirs - own for own, theirs in zip(self.losses, other.losses, strict=True)]
        gain = math.fsum(gains) / tokens
        squares = math.fsum((g - gain * t) ** 2 for g, t in zip(gains, self.tokens, strict=True))
        return gain > 2 * math.sqrt(squares * sequences / (sequences - 1)) / tokens


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
        finalists: those that were measured on the pruned model, if any: first the one that the others must beat.
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
    finalists: list[Finalist] = dataclasses.field(default_factory=list)
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
        """Time spent on evaluations."""
        return math.fsum(candidate.seconds for candidate in self.candidates)

    @property
    def beats_reference(self) -> bool:
        """Whether the best candidate's value is strictly better than RIA's."""
        return self.loss(self.best) < self.loss(self.reference)

    @property
    def recommended(self) -> Coefficients:
        """What to prune with: of the finalists that are clearly better than the first, the one of the lowest
        perplexity, or the first; without finalists the best candidate, or RIA's coefficients where none beats them.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        if self.finalists:
            first = self.finalists[0]
            better = [finalist for finalist in self.finalists if finalist.clearly_better(first)]
            return min(better, key=lambda finalist: finalist.perplexity, default=first).coefficients
        return self.best.coefficients if self.beats_reference else self.reference.coefficients

    def shortlist(self, count: int, others: Sequence[Coefficients] = ()) -> list[Coefficients]:
        """Which candidates to measure the perplexity of: `others`, RIA, the best, and the best of the look around.

        Later generations crowd around the proxy's optimum and would give many times the same mask. The look around is
        spread over the space, so its best differ from each other. (Without CMA-ES every candidate belongs to it.)

        Args:
            count: how many, if there are as many; `others`, RIA and the best in any case.
            others: coefficients from elsewhere, such as a recipe's own.

        Raises:
            StudyError: nothing was evaluated yet.
        """
        chosen = [*others, self.reference.coefficients, self.best.coefficients]
        spread = self.candidates[1 : 1 + LOOKED_AT] if self.optimiser == "cma" else self.candidates
        room = count - len(set(chosen))
        ranked = [c.coefficients for c in sorted(spread, key=self.loss) if c.coefficients not in chosen]
        return list(dict.fromkeys([*chosen, *ranked[: max(0, room)]]))

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
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "crepe_llm" / "pho_studies" / f"{self.model}-{mask}-{key:08x}.json"

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
            raise StudyError(f"the study {path} is damaged, it is no JSON ({error}): restore or delete it") from error
        if not isinstance(content, dict) or content.pop("format", None) != _FORMAT:
            raise StudyError(f'{path} is no study of this version: its "format" is not {_FORMAT}')
        try:
            content.pop("population", None)  # null in the studies of earlier versions
            content["mask"] = Mask(**content["mask"])
            content["space"] = SearchSpace(**content["space"])
            for name, kind in (("candidates", Candidate), ("finalists", Finalist)):
                content[name] = [
                    kind(**{**entry, "coefficients": Coefficients(**entry["coefficients"])})
                    for entry in content.get(name, [])
                ]
            study = cls(**content)
            values = [candidate.value for candidate in study.candidates]
            if not all(map(math.isfinite, values + [loss for f in study.finalists for loss in f.losses])):
                raise ValueError("a candidate's value is not finite")
            return study
        except (KeyError, TypeError, ValueError) as error:
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
        if self.finalists:
            seconds, used = math.fsum(finalist.seconds for finalist in self.finalists), self.recommended
            lines.append(f"perplexity of {len(self.finalists)} finalists, in {seconds:.1f} s:")
            for finalist in sorted(self.finalists, key=lambda finalist: finalist.perplexity):
                note = ", to be beaten" if finalist == self.finalists[0] else ""
                note += ", used" if finalist.coefficients == used else ""
                lines.append(f"  {finalist.perplexity:.2f}  {finalist.coefficients}{note}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw every candidate's value, the best so far and RIA's value over the number of candidates.

        Raises:
            ImportError: matplotlib is missing.
            StudyError: nothing was evaluated yet.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install matplotlib") from error
        reference = self.reference.value
        values = [candidate.value for candidate in self.candidates[1:]] or [reference]
        best = (np.maximum if self.higher_is_better else np.minimum).accumulate(np.array(values))
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(values, ".", color="0.6", label="candidate")
        axes.plot(best, color="C0", label="best so far")
        axes.axhline(reference, color="C3", linestyle="--", label="RIA")
        axes.set(xlabel="candidates", ylabel=self.proxy, title=f"{self.model}, {self.mask}")
        axes.legend()
        figure.savefig(path, dpi=120)


def package_versions() -> dict[str, str]:
    """The versions of what decides over how a search goes."""
    versions = {"crepe_llm": crepe_llm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["cma"] = importlib.metadata.version("cma")
    return versions
