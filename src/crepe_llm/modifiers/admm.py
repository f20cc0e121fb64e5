"""Pruning with weights that make up for it on the way, as a modifier."""

import math

import torch
from pydantic import model_validator

from crepe_llm.functional.admm import admm
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.modifiers.after_pruning import ReconstructionModifier
from crepe_llm.modifiers.crepe import CRePEModifier

__all__ = ["ADMMModifier"]


class ADMMModifier(ReconstructionModifier):
    """
    Modifier that prunes the layers of the CRePEModifier in front of it again, step by step, to the same structure and
    sparsity: between steps the kept weights make up for what is lost, and by their new values and that modifier's score
    the mask is chosen anew (ADMM-Grad, https://arxiv.org/abs/2401.02938; see `crepe_llm.functional.admm.admm` for what
    is the paper's and what is ours). Better than WeightCorrectionModifier's methods, whose mask is the dense weights',
    most of all where much is pruned, and slower.

    With `asymmetric_calibration` a layer's weights make up, too, for a share of what pruning the blocks in front of it
    has done to its inputs; see `crepe_llm.functional.compensation.asymmetric_target`. It takes a second Gram matrix
    for each layer of a block, one hidden state for each calibration token, and one more pass through the dense model.

    A layer whose output error on the calibration data does not become smaller is left as it was.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CRePEModifier:
          mask_structure: "2:4"
        ADMMModifier: {}
    ```

    Each layer is worked on as soon as it is pruned, in the CRePEModifier's calibration epoch, so that the next block is
    calibrated on what it will get. In memory are, beside the Gram matrix and two more of its size, at most about ten
    fp32 copies of one layer's weight at a time.

    Lifecycle:

    - on_initialize
        - find the layers; refuse a recipe without one CRePEModifier in front, or that re-prunes, quantizes or corrects
          earlier; follow the CRePEModifier
    - on_calibration_start
        - register_hook(layer, gather Gram matrices of inputs, "forward_pre")
    - on_sequential_epoch_end
        - prune the layers of the block again
    - on_calibration_end
        - remove_hooks()
    - on_finalize
        - log every layer's output error before and after

    :param rounds: how often the mask is chosen anew
    :param iterations: of ADMM in all, at least `rounds`
    :param penalty: how strongly weights are drawn to the mask, relative to the (normalised) energy of the inputs
    :param dampening: added to the diagonal of the Gram matrix, as a fraction of its mean
    :param refinement: iterations of conjugate gradients on the mask that is found
    :param asymmetric_calibration: the share, from 0 to 1, of the error in its inputs that a layer makes up for; 0.25
        where it is left out
    :param true_sequential: calibrate each layer of a decoder block on what the pruned layers in front of it in that
        block give it (the default), not on what the dense ones do. The block is run on all calibration data again for
        it, three times in most models, and its and its layers' inputs are kept on the CPU until it is done (those of
        all blocks with `pipeline="basic"`)
    :param token_weighting: how much each token of the calibration data counts, in fit and scores: `uniform`, or by
        the error of a layer's outputs relative to their size (`relative`, see
        `crepe_llm.functional.statistics.relative_weights`). Where it is left out, `relative` in families that
        normalise what attention and feed-forward give (Gemma 2 and 3, OLMo 2 and 3), `uniform` in others
    :param targets: layers to work on, by class name, exact name or `re:` pattern; defaults to all linear layers
    :param ignore: layers to leave alone, likewise; defaults to lm_head
    :param uncalibrated: what to do with a layer that no calibration token reached: `error` (the default), or leave it
        as it is (`dense`)
    """

    rounds: int = 15
    iterations: int = 20
    penalty: float = 1.0
    refinement: int = 10

    @model_validator(mode="after")
    def _check_fields(self) -> "ADMMModifier":
        for name in ("penalty", "dampening"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be a finite positive number")
        if not 1 <= self.rounds <= self.iterations:
            raise ValueError(f"rounds={self.rounds} must be at least 1 and at most iterations={self.iterations}")
        if self.refinement < 1:
            raise ValueError(f"refinement={self.refinement} must be at least 1")
        return self

    @property
    def label(self) -> str:
        return "ADMM"

    @property
    def _crepe(self) -> CRePEModifier:
        pruning = self._pruning[0]
        assert isinstance(pruning, CRePEModifier)  # _check_order
        return pruning

    def reconstruct(
        self, name: str, dense: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, statistics: InputStatistics
    ) -> torch.Tensor:
        return admm(
            dense,
            gram,
            lambda weight: self._crepe.scores(name, weight, statistics),
            lambda scores: self._crepe.mask(name, scores),
            dampening=self.dampening,
            penalty=self.penalty,
            rounds=self.rounds,
            iterations=self.iterations,
            refinement=self.refinement,
        ).weight

    def _check_order(self) -> None:
        super()._check_order()
        if len(self._pruning) != 1 or not isinstance(self._pruning[0], CRePEModifier):
            raise ValueError(
                "ADMMModifier takes score, structure and sparsity from the modifier in front of it, which must be one "
                "CRePEModifier, and no other that prunes: put CRePEModifier there"
            )
        if self._in_front:
            raise ValueError(
                f"ADMMModifier chooses masks of its own and would undo the {type(self._in_front[0]).__name__} in front "
                "of it: keep one of the two"
            )
