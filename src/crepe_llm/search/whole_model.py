"""Candidates measured on the whole model, which is pruned for a while as the recipe will prune it."""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic

import torch
from compressed_tensors.utils import get_execution_device
from loguru import logger

from crepe_llm import processes
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.search.divergence import Divergence, cut_windows
from crepe_llm.search.rehearsal import Calls, Pruning, calls_of, input_statistics, pruned, rehearsed, remembering
from crepe_llm.search.stages import WINDOW, Candidate, Measure

__all__ = ["CALIBRATING_TOKENS", "WholeModel"]

CALIBRATING_TOKENS = 32768
"""Candidates are calibrated on so many tokens at most."""
_JUDGED_TOKENS = 16384


class WholeModel(Generic[Candidate]):
    """How far a model is from its dense self when it is pruned with a candidate, in two ways.

    The last stage prunes block by block as the recipe does, on the same calls of the blocks, and judges on that text:
    where the text is no longer than the limits here, what is judged are the very weights that the recipe will make.
    Other text would make other ones, which differ in loss by more than good candidates do (docs/pho.md).

    The first stage makes masks alone, by the statistics that layers have when one candidate prunes the model block by
    block, the same for all candidates. So a candidate costs a pruning and one forward pass for each window. The one
    candidate has an advantage over all others there, and those that prune alike; it should be a good guess.

    Every second sequence is of the text's second half, and windows of the halves take turns, so that what is chosen by
    one half can be judged on the other.

    Of several processes each judges candidates alone, on a model of its own. They share out only the dense model's
    predictions and, in :meth:`prepare`, the statistics.

    Args:
        model: a transformers causal language model, dense.
        sequences: the text, int64 [any] each, two at least.
        guess: the candidate whose statistics the first stage takes.
        pruning: of a candidate, and of whether masks alone are made, how layers are pruned.
        calls: what the model calls its blocks with where the recipe calibrates; None to run it on the text here.

    Attributes:
        tokens: of each window, how many tokens are predicted.
        seconds: what a forward pass of a window has taken, and comparing its predictions.
    """

    def __init__(
        self,
        model: Any,
        sequences: Sequence[torch.Tensor],
        guess: Candidate,
        pruning: Callable[[Candidate, bool], Pruning],
        calls: Calls | None = None,
    ) -> None:
        self._model, self._guess, self._pruning = model, guess, pruning
        halves = [_up_to(_in_turn(half), _JUDGED_TOKENS // 2) for half in (sequences[::2], sequences[1::2])]
        before = time.perf_counter()
        self._divergence = Divergence(model, [window for pair in zip(*halves, strict=False) for window in pair])
        own = -(-len(self._divergence.tokens) // processes.count())
        self.seconds = (time.perf_counter() - before) / own
        self._calibrating = _up_to(sequences, CALIBRATING_TOKENS)
        self._statistics: dict[torch.nn.Module, InputStatistics] = {}
        self.tokens = self._divergence.tokens
        self._calls = calls
        if calls is None:
            try:
                self._calls = calls_of(model, self._calibrating)
            except ValueError as error:
                logger.warning(f"Candidates are pruned by the dense model's statistics, as {error}")

    def measures(self) -> tuple[Measure[Candidate], Measure[Candidate]]:
        """Those of the first stage and of the last."""
        last = self._by_statistics if self._calls is None else self._as_the_recipe
        return (
            Measure("first stage: masks alone", self.tokens, self._losses, self.prepare),
            Measure("last stage: what the recipe makes", self.tokens, lambda c, w: self._losses(c, w, last)),
        )

    def prepare(self) -> None:
        """Gather the statistics that the first stage needs, if they are not there; all processes call it together."""
        if all(processes.gather(bool(self._statistics))):
            return
        layers = {wanted.name: module for module, wanted in self._pruning(self._guess, True).wanted.items()}
        self._statistics = {
            layers[name]: _moved(statistics, get_execution_device(layers[name]))
            for name, statistics in processes.by_first(self._by_name).items()
        }

    def _by_name(self) -> dict[str, InputStatistics]:
        """What masks are made by, for each layer by its name, on the CPU."""
        if not self._statistics:
            self._gather()
        wanted = self._pruning(self._guess, True).wanted
        return {wanted[module].name: _moved(found, "cpu") for module, found in self._statistics.items()}

    def _losses(
        self,
        candidate: Candidate,
        windows: range,
        meanwhile: Callable[[Candidate], AbstractContextManager[None]] | None = None,
    ) -> list[float]:
        """The divergence of the pruned model on each window."""
        with (meanwhile or self._by_statistics)(candidate):
            return [self._divergence(window) for window in windows]

    @contextmanager
    def _as_the_recipe(self, candidate: Candidate) -> Iterator[None]:
        pruning = self._pruning(candidate, False)
        found: dict[torch.nn.Module, InputStatistics] = {}
        if candidate == self._guess and not self._statistics:
            pruning = remembering(pruning, found)
        assert self._calls is not None
        with rehearsed(self._calls, pruning):
            self._statistics = found or self._statistics
            yield

    @contextmanager
    def _by_statistics(self, candidate: Candidate) -> Iterator[None]:
        if not self._statistics:
            self._gather()
        with pruned(self._statistics, self._pruning(candidate, True)):
            yield

    def _gather(self) -> None:
        """The statistics that the first stage makes masks by; the dense model's where there are no blocks."""
        if self._calls is not None:
            with self._as_the_recipe(self._guess):
                return
        wanted = self._pruning(self._guess, True).wanted
        device = self._model.get_input_embeddings().weight.device
        with torch.no_grad(), input_statistics(wanted) as found:
            for sequence in self._calibrating:
                self._model.base_model(input_ids=sequence[None].to(device), use_cache=False)
        self._statistics = found


def _moved(statistics: InputStatistics, device: Any) -> InputStatistics:
    """Statistics without a Gram matrix on another device."""
    moved = copy.copy(statistics)
    moved.sum, moved.square_sum = statistics.sum.to(device), statistics.square_sum.to(device)
    return moved


def _up_to(sequences: Sequence[torch.Tensor], tokens: int) -> list[torch.Tensor]:
    """The first of some sequences that hold so many tokens together, the last of them cut; at least one."""
    chosen: list[torch.Tensor] = []
    for sequence in sequences:
        room = tokens - sum(map(len, chosen))
        if chosen and room < 2:
            break
        chosen.append(sequence if len(sequence) <= room else sequence[:room])
    return chosen


def _in_turn(sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The first window of each sequence, then the second of each, and so on: little text of many sequences."""
    windows = itertools.zip_longest(*(cut_windows([sequence], WINDOW) for sequence in sequences))
    return [window for turn in windows for window in turn if window is not None]
