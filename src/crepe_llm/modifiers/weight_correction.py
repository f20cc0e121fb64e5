"""Weight correction under a fixed mask as a modifier."""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator

from crepe_llm.functional.compensation import (
    conjugate_gradients,
    energy_compensation,
    mean_compensation,
    sparsegpt_update,
)
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.modifiers.after_pruning import ReconstructionModifier

__all__ = ["WeightCorrectionModifier"]


class WeightCorrectionModifier(ReconstructionModifier):
    """
    Modifier that changes the weights which an earlier modifier of the recipe has kept, so that each layer's outputs
    come closer to those of the dense layer. Masks stay exactly as they are. `crepe_llm.functional.compensation` has
    the methods:

    - `energy`: rescales columns and rows to regain their energy (https://arxiv.org/abs/2602.07375)
    - `mean`: gives the kept weights what the pruned ones added to the mean of each output (ours)
    - `sparsegpt`: SparseGPT's update, column by column (https://arxiv.org/abs/2301.00774)
    - `pcg`: least squares on the mask by conjugate gradients, as ALPS does (https://arxiv.org/abs/2406.07831)

    What `sparsegpt` and `pcg` fit makes up, too, for a share of what pruning the blocks in front of it has done to its
    inputs (`asymmetric_calibration`, see `crepe_llm.functional.compensation.asymmetric_target`), where that is known:
    behind one CRePEModifier. It takes a second Gram matrix for each layer of a block, one hidden state for each
    calibration token, and one more pass through the dense model.

    A layer whose output error on the calibration data does not become smaller is left as it was.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CRePEModifier:
          mask_structure: "2:4"
        WeightCorrectionModifier:
          method: pcg
    ```

    Behind one CRePEModifier each layer is corrected as soon as it is pruned, in the same calibration epoch, so that the
    next block is calibrated on what it will get. Behind llm-compressor's own pruning modifiers there is an epoch of its
    own, and the dense weights of all targeted layers are remembered until then; `pipeline="sequential"` makes all
    modifiers share one, and then only those of one block are.

    Lifecycle:

    - on_initialize
        - find the layers; refuse a recipe that prunes nothing earlier, or quantizes or corrects earlier
        - behind one CRePEModifier, follow it; else register_hook(layer, remember the dense weight, "forward_pre")
    - on_calibration_start
        - register_hook(layer, gather Gram matrices of inputs, "forward_pre"), unless it follows
    - on_sequential_epoch_end
        - correct the layers of the block
    - on_calibration_end
        - remove_hooks()
    - on_finalize
        - log every layer's output error before and after

    :param method: `energy`, `mean`, `sparsegpt` or `pcg`
    :param dampening: for `sparsegpt` and `pcg`, what is added to the diagonal of the Gram matrix, as a fraction of its
        mean; for `mean`, what is added to the variances, likewise
    :param block_size: for `sparsegpt`, columns whose updates are gathered into one product; changes only the speed
    :param iterations: for `pcg`, the most iterations
    :param clamp: for `energy`, the smallest and the largest scale
    :param asymmetric_calibration: for `sparsegpt` and `pcg`, the share, from 0 to 1, of the error in its inputs that a
        layer makes up for. Where it is left out, 0.25 behind one CRePEModifier, and 0 behind llm-compressor's own
    :param true_sequential: calibrate each layer of a decoder block on what the pruned layers in front of it in that
        block give it, not on what the dense ones do, as in ADMMModifier. Where it is left out, true for `sparsegpt` and
        `pcg` behind one CRePEModifier, else false
    :param token_weighting: for `sparsegpt` and `pcg`, how much each token of the calibration data counts, as in
        ADMMModifier: `uniform` or `relative`, to the outputs that the layer has when it is calibrated. Where it is left
        out, behind one CRePEModifier as there, and behind llm-compressor's own `uniform`
    :param targets: layers to correct, by class name, exact name or `re:` pattern; defaults to all linear layers
    :param ignore: layers to leave alone, likewise; defaults to lm_head
    :param uncalibrated: what to do with a layer that no calibration token reached: `error` (the default), or leave it
        as it is (`dense`)
    """

    method: Literal["energy", "mean", "sparsegpt", "pcg"] = "pcg"
    block_size: int = 128
    iterations: int = 10
    clamp: list[float] = Field(default_factory=lambda: [0.5, 2.0])

    @model_validator(mode="after")
    def _check_fields(self) -> "WeightCorrectionModifier":
        if not (math.isfinite(self.dampening) and self.dampening > 0):
            raise ValueError(f"dampening={self.dampening} must be a finite positive number, such as 0.01")
        for name in ("block_size", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
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

    def reconstruct(
        self, name: str, dense: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, statistics: InputStatistics
    ) -> torch.Tensor:
        if self.method == "energy":
            return energy_compensation(dense, keep, clamp=(self.clamp[0], self.clamp[1]))
        if self.method == "mean":
            return mean_compensation(dense, keep, statistics.mean, statistics.variance, dampening=self.dampening)
        if self.method == "sparsegpt":
            return sparsegpt_update(dense, keep, gram, dampening=self.dampening, block_size=self.block_size)
        return conjugate_gradients(dense, keep, gram, dampening=self.dampening, iterations=self.iterations)
