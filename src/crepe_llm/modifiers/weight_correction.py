"""Weight correction under a fixed mask as a modifier."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from crepe_llm.functional.compensation import (
    conjugate_gradients,
    energy_compensation,
    mean_compensation,
    sparsegpt_update,
)
from crepe_llm.modifiers.refitting import RefittingModifier
from crepe_llm.pruning.layer import Layer

__all__ = ["WeightCorrectionModifier"]


class WeightCorrectionModifier(RefittingModifier):
    """
    Modifier that changes the weights which an earlier modifier of the recipe has kept, so that each layer's outputs
    come closer to those of the dense layer. Masks stay exactly as they are. `crepe_llm.functional.compensation` has
    the methods:

    - `energy`: rescales columns and rows to regain their energy (https://arxiv.org/abs/2602.07375)
    - `mean`: gives the kept weights what the pruned ones added to the mean of each output (ours)
    - `sparsegpt`: SparseGPT's update, column by column (https://arxiv.org/abs/2301.00774)
    - `pcg`: least squares on the mask by conjugate gradients, as ALPS does (https://arxiv.org/abs/2406.07831)

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CRePEModifier:
          mask_structure: "2:4"
        WeightCorrectionModifier:
          method: pcg
    ```

    After one CRePEModifier each layer is corrected as soon as it is pruned, in the same calibration epoch, so that the
    next block is calibrated on what it will get. After llm-compressor's own pruning modifiers there is an epoch of its
    own, and the dense weights of all targeted layers are kept until then. `pipeline="sequential"` makes all modifiers
    share one epoch, and then only those of one block are kept.

    Lifecycle:

    - on_initialize
        - refuse a recipe that prunes nothing earlier, or quantizes or corrects earlier
        - find the layers; join the CRePEModifier's pruning pass, or make one
    - during that pass
        - correct each layer that was pruned
    - on_finalize
        - log every layer's output error before and after

    :param method: `energy`, `mean`, `sparsegpt` or `pcg`; the latter two fit outputs
    :param block_size: for `sparsegpt`, columns whose updates are gathered into one product; changes only the speed
    :param iterations: for `pcg`, the most iterations
    :param clamp: for `energy`, the smallest and the largest scale
    """

    method: Literal["energy", "mean", "sparsegpt", "pcg"] = "pcg"
    block_size: int = Field(default=128, ge=1)
    iterations: int = Field(default=10, ge=1)
    clamp: list[float] = Field(default_factory=lambda: [0.5, 2.0])

    @model_validator(mode="after")
    def _check_fields(self) -> "WeightCorrectionModifier":
        for name, nothing in (("asymmetric_calibration", 0), ("token_weighting", "uniform")):
            value = getattr(self, name)
            if value not in (None, nothing) and not self.fits_outputs:
                raise ValueError(
                    f"{name}={value} is for methods that fit the Gram matrix of a layer's inputs, and {self.method} "
                    "does not: leave it out, or set `method: pcg`"
                )
        if len(self.clamp) != 2 or not 0 < self.clamp[0] <= self.clamp[1]:
            raise ValueError(f"clamp={self.clamp} must be two positive numbers, the smaller first")
        return self

    @property
    def label(self) -> str:
        return f"`{self.method}`"

    @property
    def fits_outputs(self) -> bool:
        return self.method in ("sparsegpt", "pcg")

    def reconstruct(self, layer: Layer, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keep = layer.keep
        assert keep is not None  # a step before has made it
        match self.method:
            case "energy":
                weight = energy_compensation(target, keep, clamp=(self.clamp[0], self.clamp[1]))
            case "mean":
                mean, variance = layer.statistics.mean, layer.statistics.variance
                weight = mean_compensation(target, keep, mean, variance, dampening=self.dampening)
            case "sparsegpt":
                weight = sparsegpt_update(
                    target, keep, layer.gram, dampening=self.dampening, block_size=self.block_size
                )
            case "pcg":
                weight = conjugate_gradients(
                    target, keep, layer.gram, dampening=self.dampening, iterations=self.iterations
                )
        return keep, weight
