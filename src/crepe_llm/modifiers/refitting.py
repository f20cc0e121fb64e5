"""What the modifiers that give pruned layers other weights share: how layers are calibrated, and what is reported."""

from functools import partial
from typing import Any, Literal

import torch
from llmcompressor.core import State
from loguru import logger
from pydantic import Field, PrivateAttr

from crepe_llm.functional.statistics import relative_weights
from crepe_llm.models.channels import family_of, normalises_outputs
from crepe_llm.modifiers import order
from crepe_llm.modifiers.pruning_pass import PruningModifier
from crepe_llm.modifiers.tables import aligned
from crepe_llm.pruning.block_pass import Calibration, TokenWeights
from crepe_llm.pruning.layer import Layer, linear_outputs
from crepe_llm.pruning.steps import Refit

__all__ = ["DEFAULT_SHARE", "RefittingModifier"]

#: Of asymmetric calibration, where it is possible and the recipe does not say. Chosen on validation text.
DEFAULT_SHARE = 0.25


class RefittingModifier(PruningModifier):
    """Base of modifiers that give pruned layers other weights, whose outputs come closer to the dense layer's.

    A layer whose output error on the calibration data does not become smaller is left as it was, and a table says so.

    :param dampening: what is added to the diagonal of the Gram matrix, as a fraction of its mean (`method: mean`: to
        the variances, as a fraction of the mean squared input)
    :param asymmetric_calibration: the share, from 0 to 1, of the error in its inputs that a layer makes up for (see
        `crepe_llm.functional.compensation.asymmetric_target`). It needs layers that are dense when they are calibrated,
        so one CRePEModifier before this modifier and no other that prunes. Where it is left out, 0.25 where that is so
        and the method fits outputs, else 0. It takes a second Gram matrix for each layer, the block's inputs in the
        dense model and more passes through the block
    :param true_sequential: calibrate each layer of a decoder block on what the pruned layers before it in that block
        give it, not on what the dense ones do. The block is run on all calibration data once for each group of layers
        with the same inputs, four times in most models. Needed and left out as `asymmetric_calibration`
    :param token_weighting: how much each token of the calibration data counts, in fit and scores: `uniform`, or by
        the error of a layer's outputs relative to their size (`relative`, see
        `crepe_llm.functional.statistics.relative_weights`). Where it is left out, `relative` for methods that fit
        outputs after a CRePEModifier in families that normalise what attention and feed-forward give (Gemma 2 and 3,
        OLMo 2 and 3, GLM 4), else `uniform`
    """

    dampening: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    asymmetric_calibration: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    true_sequential: bool | None = None
    token_weighting: Literal["uniform", "relative"] | None = None

    _normalises_outputs: bool = PrivateAttr(default=False)
    _step: Refit | None = PrivateAttr(default=None)

    def reconstruct(self, layer: Layer, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A mask and weights (both [d_out, d_in]) on it, whose outputs come close to those of the target."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What the table of errors says that has been done."""
        raise NotImplementedError

    @property
    def fits_outputs(self) -> bool:
        """Whether :meth:`reconstruct` looks at the Gram matrix."""
        return True

    @property
    def step(self) -> Refit:
        if self._step is None:
            self._step = Refit(self.reconstruct, dampening=self.dampening, warn=logger.warning)
        return self._step

    @property
    def calibration(self) -> Calibration:
        in_turn = self._by_default if self.true_sequential is None else self.true_sequential
        return Calibration(in_turn, cross=self._share > 0)

    def token_weights(self, module: torch.nn.Module) -> TokenWeights | None:
        by_default = "relative" if self._by_default and self._normalises_outputs else "uniform"
        relative = (self.token_weighting or by_default) == "relative"
        return partial(_relative_to_outputs, module) if relative else None

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """For each pruned layer the squared error of its outputs, relative to those aimed at, before and after."""
        return dict(self.step.errors)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        super().on_initialize(state, **kwargs)
        self._normalises_outputs = normalises_outputs(family_of(state.model.config))
        self.step.share = self._share
        for name in ("asymmetric_calibration", "true_sequential"):
            value = getattr(self, name)
            if value and not self.pruning_pass.starts_dense:
                pruning = [m for m in order.modifiers_before(self) if order.role_of(m) == "prunes"]
                raise ValueError(
                    f"{name}={value} needs layers that are dense when they are calibrated, so before "
                    f"{type(self).__name__} one CRePEModifier and no other that prunes, not "
                    f"{' and '.join(type(modifier).__name__ for modifier in pruning)}: leave it out"
                )
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        self.require_pruned_layers(self.step.errors)
        logger.info(self._table())
        return True

    @property
    def _by_default(self) -> bool:
        """Whether inputs are gathered in the ways that are better and dearer, where the recipe does not say."""
        return self.pruning_pass.starts_dense and self.fits_outputs

    @property
    def _share(self) -> float:
        if self.asymmetric_calibration is not None:
            return self.asymmetric_calibration
        return DEFAULT_SHARE if self._by_default else 0.0

    def _table(self) -> str:
        errors, remarks = self.step.errors, self.step.remarks
        rows = (
            (name, f"{before:6.2%}  {after:6.2%}  {remarks.get(name, '')}") for name, (before, after) in errors.items()
        )
        return (
            f"Squared output error of {len(errors)} layers, relative to their outputs, before and after "
            f"{self.label}:\n" + aligned(("layer", "before   after"), rows)
        )


def _relative_to_outputs(module: torch.nn.Module, inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return relative_weights(linear_outputs(module, inputs), mask)
