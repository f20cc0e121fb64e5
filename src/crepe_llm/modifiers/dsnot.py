"""DSnoT re-pruning as a modifier."""

import math
from typing import Any, Literal

import torch
from llmcompressor.core import State
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from loguru import logger
from pydantic import PrivateAttr, model_validator

from crepe_llm.functional.masks import parse_mask_structure
from crepe_llm.functional.repruning import dsnot
from crepe_llm.functional.scores import wanda_scores
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.modifiers.after_pruning import AfterPruningModifier
from crepe_llm.modifiers.calibration import set_weight_matrix
from crepe_llm.modifiers.crepe import CRePEModifier

__all__ = ["DSnoTModifier"]

# The published 50 cycles at the width of the models that they were published for.
_CYCLES_PER_CHANNEL = 50 / 4096


class DSnoTModifier(AfterPruningModifier):
    """
    Modifier that swaps weights which an earlier modifier of the recipe has pruned for weights it has kept, so that each
    output of a layer comes closer to the dense layer's in the mean over the calibration tokens (DSnoT,
    https://arxiv.org/abs/2310.08915; see `crepe_llm.functional.repruning.dsnot` for what is the paper's and what is
    ours).

    Every row keeps its number of weights, and an N:M mask stays N:M; weights that grow back are the dense ones. A row
    whose expected error does not become smaller is left as it was. The released code re-prunes attention layers only;
    here the default is all linear layers, as for every other modifier: set `targets` to the attention's to have that.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CRePEModifier:
          mask_structure: "2:4"
        DSnoTModifier:
          score: crepe
    ```

    When it works, and how long dense weights are remembered, is as WeightCorrectionModifier has it, which may follow.

    Lifecycle:

    - on_initialize
        - find the layers; refuse a recipe that prunes nothing earlier, or quantizes or corrects earlier
        - behind one CRePEModifier, follow it; else register_hook(layer, remember the dense weight, "forward_pre")
    - on_calibration_start
        - register_hook(layer, gather input statistics, "forward_pre")
    - on_sequential_epoch_end
        - re-prune the layers of the block
    - on_calibration_end
        - remove_hooks()
    - on_finalize
        - log how many weights every layer swapped, and its mean expected error before and after

    :param max_cycles: at most so many swaps in each row; left out, 50 for every 4096 input channels. The released
        code's 50 of any row re-prunes a sixth of what a row of 576 keeps, and does harm there
    :param threshold: a row is done when its expected error is at most this fraction of the sum of its weights' expected
        contributions, taken positive. The released code's threshold is absolute and depends on the number of tokens
    :param variance_exponent: weights grow back by their expected contribution over the variance of the input to this
        power; 0 leaves the variance out
    :param score: which of the kept weights are pruned first: those of the lowest score by `wanda`, as published, or by
        `crepe`, the score of the CRePEModifier in front with its coefficients (its CVR where it has `score: cvr`)
    :param targets: layers to re-prune, by class name, exact name or `re:` pattern; defaults to all linear layers
    :param ignore: layers to leave alone, likewise; defaults to lm_head
    :param uncalibrated: what to do with a layer that no calibration token reached: `error` (the default), or leave it
        as it is (`dense`)
    """

    max_cycles: int | None = None
    threshold: float = 0.01
    variance_exponent: float = 1.0
    score: Literal["wanda", "crepe"] = "wanda"

    _swapped: dict[str, tuple[int, float, float, float]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check_fields(self) -> "DSnoTModifier":
        if self.max_cycles is not None and self.max_cycles < 1:
            raise ValueError(f"max_cycles={self.max_cycles} must be at least 1")
        for name in ("threshold", "variance_exponent"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} must be a finite number of at least 0")
        return self

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """For each pruned layer the mean magnitude of its rows' expected errors, before and after."""
        return {name: (before, after) for name, (_, _, before, after) in self._swapped.items()}

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        super().on_initialize(state, **kwargs)
        if self.score == "crepe" and not any(isinstance(modifier, CRePEModifier) for modifier in self._pruning):
            raise ValueError(
                "score: crepe takes the coefficients of a CRePEModifier in front, and there is none: "
                "use score: wanda, or prune with CRePEModifier"
            )
        return True

    def improve(
        self,
        name: str,
        module: torch.nn.Module,
        weight: torch.Tensor,
        dense: torch.Tensor,
        keep: torch.Tensor,
        statistics: InputStatistics,
    ) -> None:
        pruning = self._pruned_by(name, module)
        if isinstance(pruning, CRePEModifier):
            _, structure = pruning.structure_of(name)
        else:
            structure = parse_mask_structure(pruning.mask_structure)
        # Kept weights may have been updated as they were pruned (SparseGPT); what competes with them are dense ones.
        candidates = torch.where(keep, weight, dense)
        if self.score == "wanda":
            scores = wanda_scores(candidates, statistics.norm)
        elif isinstance(pruning, CRePEModifier):
            scores = pruning.scores(name, candidates, statistics)
        else:
            raise ValueError(
                f"score: crepe takes the coefficients of the CRePEModifier in front, but {name} was pruned by "
                f"{type(pruning).__name__}: use score: wanda, or add the layer to `ignore`"
            )
        found = dsnot(
            weight,
            dense,
            keep,
            scores,
            statistics.mean,
            statistics.variance,
            group=structure[1] if structure else None,
            max_cycles=self.max_cycles or max(1, round(_CYCLES_PER_CHANNEL * weight.shape[1])),
            threshold=self.threshold,
            variance_exponent=self.variance_exponent,
        )
        set_weight_matrix(module, candidates.masked_fill_(~found.keep, 0))
        swaps = int(found.swaps.sum())
        errors = (found.before.abs().mean().item(), found.after.abs().mean().item())
        self._swapped[name] = (swaps, swaps / max(int(keep.sum()), 1), *errors)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        logger.info(self._table())
        return True

    def _pruned_by(self, name: str, module: torch.nn.Module) -> CRePEModifier | SparsityModifierBase:
        """The last modifier in front that pruned the layer."""
        return next(
            modifier
            for modifier in reversed(self._pruning)
            if (name in modifier.realised if isinstance(modifier, CRePEModifier) else module in modifier._module_names)
        )

    def _table(self) -> str:
        width = max(map(len, self._swapped))
        lines = [f"{'layer':<{width}}  swapped          mean |row error| before      after"]
        for name, (swaps, share, before, after) in self._swapped.items():
            lines.append(f"{name:<{width}}  {swaps:>7} {share:7.2%}  {before:>22.4g} {after:>10.4g}")
        return (
            f"Weights swapped in {len(self._swapped)} layers (share of those kept), and the rows' expected errors:\n"
            + "\n".join(lines)
        )
