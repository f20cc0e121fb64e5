"""The search for the spread of ATP's line: each is tried on the whole model, and judged by what it predicts."""

from collections.abc import Callable

import torch
from loguru import logger

from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.judging import as_it_predicts, pruning_of, watch_calls
from crepe_llm.modifiers.observe import Observer
from crepe_llm.modifiers.tables import aligned
from crepe_llm.search.choice import Choice, choose
from crepe_llm.search.rehearsal import Pruning, own_weights
from crepe_llm.search.whole_model import WholeModel

__all__ = ["SpreadSearch"]

# Of the largest spread that is possible, those that are tried.
_TRIED = (0.0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)


class SpreadSearch:
    """The search of a modifier, which watches the calibration from its beginning.

    Args:
        crepe: prunes, by masks alone at first and in the end as the recipe does.
        model: the dense model.
        sequences: int64 [any] each; they both prune and judge.
        observer: what sees the calibration.
    """

    def __init__(
        self, crepe: CRePEModifier, model: torch.nn.Module, sequences: list[torch.Tensor], observer: Observer
    ) -> None:
        self._crepe, self._model, self._sequences = crepe, model, sequences
        self._calls = watch_calls(observer, model)

    def find(self, sparsity: float, use: Callable[[float], None]) -> float:
        """
        The spread with which the pruned model's predictions are nearest the dense model's, or 0 where none is clearly
        better than that (ours; the paper searches by perplexity). Weights are the dense model's again afterwards.

        Args:
            sparsity: of the whole model.
            use: has the modifier prune by the sparsities that a spread gives.
        """
        spreads = [share * min(sparsity, 1 - sparsity) for share in _TRIED]
        if spreads[-1] == 0:
            return 0.0
        logger.info(f"ATP: measuring {len(spreads)} spreads on {len(self._sequences)} sequences")
        with own_weights(self._crepe.layers), as_it_predicts(self._model) as routing:

            def pruning(spread: float, masks_alone: bool) -> Pruning:
                use(spread)
                return pruning_of(self._crepe, masks_alone, routing)

            choice = choose(WholeModel(self._model, self._sequences, spreads[0], pruning, self._calls), spreads)
        self._crepe.pruning_pass.forget()
        logger.info(f"ATP: a spread of {choice.chosen:.4f}, beside none at all:\n{_table(spreads, choice)}")
        return choice.chosen


def _table(spreads: list[float], choice: Choice[float]) -> str:
    rows = []
    for spread in spreads:
        gains = [found.get(spread) for found in (choice.first, choice.last)]
        shown = ["" if pair is None else f"{pair[0]:+.4f} +- {pair[1]:.4f}" for pair in gains]
        rows.append((f"{spread:6.4f}", f"{shown[0]:<25}  {shown[1]}"))
    return aligned(("spread", "better by, nats a token  as the recipe prunes"), rows)
