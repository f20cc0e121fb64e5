"""DSnoT re-pruning as a modifier."""

from typing import Any, Literal

import torch
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr

from crepe_llm.functional.masks import parse_mask_structure
from crepe_llm.functional.repruning import DSnoTOptions, Repruned, dsnot
from crepe_llm.functional.scores import wanda_scores
from crepe_llm.modifiers import order
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.fields import NonNegative
from crepe_llm.modifiers.pruning_pass import PruningModifier
from crepe_llm.modifiers.tables import aligned
from crepe_llm.pruning.layer import Layer
from crepe_llm.pruning.steps import Reprune

__all__ = ["DSnoTModifier"]

# The published 50 cycles at the width of the models that they were published for.
_CYCLES_PER_CHANNEL = 50 / 4096


class DSnoTModifier(PruningModifier):
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

    When it works, and how long dense weights are kept, is as WeightCorrectionModifier has it, which may follow.

    Lifecycle:

    - on_initialize
        - refuse a recipe that prunes nothing earlier, or quantizes or corrects earlier
        - find the layers; join the CRePEModifier's pruning pass, or make one
    - during that pass
        - re-prune each layer that was pruned
    - on_finalize
        - log how many weights every layer swapped, and its mean expected error before and after

    :param max_cycles: at most so many swaps in each row; left out, 50 for every 4096 input channels. The released
        code's 50 of any row re-prunes a sixth of what a row of 576 keeps, and does harm there
    :param threshold: a row is done when its expected error is at most this fraction of the sum of its weights' expected
        contributions, taken positive. The released code's threshold is absolute and depends on the number of tokens
    :param variance_exponent: weights grow back by their expected contribution over the variance of the input to this
        power; 0 leaves the variance out
    :param score: which of the kept weights are pruned first: those of the lowest score by `wanda`, as published, or by
        `crepe`, the score of the CRePEModifier before with its coefficients (its CVR where it has `score: cvr`)
    """

    max_cycles: int | None = Field(default=None, ge=1)
    threshold: NonNegative = 0.01
    variance_exponent: NonNegative = 1.0
    score: Literal["wanda", "crepe"] = "wanda"

    _pruning: list[Modifier] = PrivateAttr(default_factory=list)
    _step: Reprune | None = PrivateAttr(default=None)

    @property
    def step(self) -> Reprune:
        if self._step is None:
            self._step = Reprune(self._reprune)
        return self._step

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """For each pruned layer the mean magnitude of its rows' expected errors, before and after."""
        return {name: (before, after) for name, (_, _, before, after) in self.step.swapped.items()}

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        super().on_initialize(state, **kwargs)
        self._pruning = [m for m in order.modifiers_before(self) if order.role_of(m) == "prunes"]
        if self.score == "crepe" and not any(isinstance(modifier, CRePEModifier) for modifier in self._pruning):
            raise ValueError(
                "score: crepe takes the coefficients of a CRePEModifier before it, and there is none: "
                "use score: wanda, or prune with CRePEModifier"
            )
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        self.require_pruned_layers(self.step.swapped)
        logger.info(self._table())
        return True

    def _reprune(self, layer: Layer, candidates: torch.Tensor) -> Repruned:
        pruning = self._pruned_by(layer)
        if isinstance(pruning, CRePEModifier):
            _, structure = pruning.structure_of(layer.name)
        else:
            structure = parse_mask_structure(pruning.mask_structure)
        if self.score == "wanda":
            scores = wanda_scores(candidates, layer.statistics.norm)
        elif isinstance(pruning, CRePEModifier):
            scores = pruning.scores(layer.name, candidates, layer.statistics)
        else:
            raise ValueError(
                f"score: crepe takes the coefficients of the CRePEModifier before it, but {layer.name} was pruned by "
                f"{type(pruning).__name__}: use score: wanda, or add the layer to `ignore`"
            )
        assert layer.keep is not None  # a step before has made it
        return dsnot(
            layer.weight,
            layer.dense,
            layer.keep,
            scores,
            layer.statistics.mean,
            layer.statistics.variance,
            DSnoTOptions(
                group=structure[1] if structure else None,
                max_cycles=self.max_cycles or max(1, round(_CYCLES_PER_CHANNEL * candidates.shape[1])),
                threshold=self.threshold,
                variance_exponent=self.variance_exponent,
            ),
        )

    def _pruned_by(self, layer: Layer) -> Any:
        """The last modifier before this one that pruned the layer."""
        for modifier in reversed(self._pruning):
            # llm-compressor's own modifiers list the modules that they prune in `_module_names`.
            pruned = modifier.layers if isinstance(modifier, CRePEModifier) else getattr(modifier, "_module_names", {})
            if layer.module in pruned:
                return modifier
        raise ValueError(f"{layer.name} was pruned by no modifier of the recipe: add it to `ignore`")

    def _table(self) -> str:
        swapped = self.step.swapped
        rows = (
            (name, f"{swaps:>7} {share:7.2%}  {before:>22.4g} {after:>10.4g}")
            for name, (swaps, share, before, after) in swapped.items()
        )
        return (
            f"Weights swapped in {len(swapped)} layers (share of those kept), and the rows' expected errors:\n"
            + aligned(("layer", "swapped          mean |row error| before      after"), rows)
        )
