"""Pruning with weights that make up for it on the way, as a modifier."""

import torch
from pydantic import Field, model_validator

from crepe_llm.functional.admm import ADMMOptions, admm
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.refitting import RefittingModifier
from crepe_llm.pruning.layer import Layer

__all__ = ["ADMMModifier"]


class ADMMModifier(RefittingModifier):
    """
    Modifier that prunes the layers of the CRePEModifier before it again, step by step, to the same structure and
    sparsity. Between steps the kept weights make up for what is lost. The mask is then chosen anew, by the new weights
    and the CRePEModifier's score (ADMM-Grad, https://arxiv.org/abs/2401.02938). `crepe_llm.functional.admm` says what
    is the paper's and what is ours. It is better than WeightCorrectionModifier's methods, whose mask is that of the
    dense weights, most of all where much is pruned. It is slower, too.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CRePEModifier:
          mask_structure: "2:4"
        ADMMModifier: {}
    ```

    Each layer is worked on as soon as it is pruned, in the CRePEModifier's calibration epoch, so that the next block is
    calibrated on what it will get. In memory are, beside the Gram matrix and two more of its size, at most about seven
    fp32 copies of one layer's weight at a time.

    Lifecycle:

    - on_initialize
        - refuse a recipe without exactly one CRePEModifier before, or that re-prunes, quantizes or corrects earlier
        - find the layers; join the CRePEModifier's pruning pass
    - during that pass
        - prune each layer again, after the CRePEModifier's step
    - on_finalize
        - log every layer's output error before and after

    :param rounds: how often the mask is chosen anew
    :param iterations: of ADMM in all, at least `rounds`
    :param penalty: how strongly weights are drawn to the mask, relative to the (normalised) energy of the inputs
    :param refinement: iterations of conjugate gradients on the mask that is found
    """

    rounds: int = Field(default=15, ge=1)
    iterations: int = Field(default=20, ge=1)
    penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    refinement: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _check_fields(self) -> "ADMMModifier":
        if self.rounds > self.iterations:
            raise ValueError(f"rounds={self.rounds} must be at least 1 and at most iterations={self.iterations}")
        return self

    @property
    def label(self) -> str:
        return "ADMM"

    def reconstruct(self, layer: Layer, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        crepe = self.pruning_pass.leader
        assert isinstance(crepe, CRePEModifier)  # the order of the recipe was checked
        found = admm(
            target,
            layer.gram,
            lambda weight: crepe.scores(layer.name, weight, layer.statistics),
            lambda scores: crepe.mask(layer.name, scores),
            ADMMOptions(self.dampening, self.penalty, self.rounds, self.iterations, self.refinement),
        )
        return found.keep, found.weight
