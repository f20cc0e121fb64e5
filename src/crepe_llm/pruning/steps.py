"""The steps of pruning: each changes one layer, given what the steps before it have made of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from crepe_llm.functional.compensation import asymmetric_target, output_error
from crepe_llm.functional.repruning import Repruned
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.pruning.layer import Layer

__all__ = ["Mask", "Refit", "Reprune", "Step"]


class Step(Protocol):
    """Changes `layer.weight` and `layer.keep`; says what it needs to know of the layer's inputs.

    Attributes:
        needs_gram: whether it needs their Gram matrix.
        records: what it has noted of each layer, by name; dictionaries that may be added to.
    """

    needs_gram: bool

    @property
    def records(self) -> list[dict[str, Any]]: ...

    def __call__(self, layer: Layer) -> None: ...


@dataclass
class Mask:
    """Choose a mask by scores, and set the rest of the weight to zero.

    Attributes:
        scores: of (name, weight, statistics), fp32 scores [d_out, d_in], larger being more important.
        mask: of (name, scores), what is kept: bool [d_out, d_in].
        realised: by layer its shape and the fraction of its weights that was pruned.
    """

    scores: Callable[[str, torch.Tensor, InputStatistics], torch.Tensor]
    mask: Callable[[str, torch.Tensor], torch.Tensor]
    realised: dict[str, tuple[torch.Size, float]] = field(default_factory=dict)
    needs_gram: bool = False

    @property
    def records(self) -> list[dict[str, Any]]:
        return [self.realised]

    def __call__(self, layer: Layer) -> None:
        layer.keep = self.mask(layer.name, self.scores(layer.name, layer.weight, layer.statistics))
        layer.weight = layer.weight.masked_fill(~layer.keep, 0)
        self.realised[layer.name] = (layer.weight.shape, 1 - layer.keep.count_nonzero().item() / layer.keep.numel())


@dataclass
class Reprune:
    """Swap pruned weights for kept ones (DSnoT); rows keep their number of weights.

    Attributes:
        reprune: of (layer, candidates), the new mask. Candidates [d_out, d_in] are the kept weights and, elsewhere, the
            dense ones, which are what grows back.
        swapped: by layer the number of swaps, their share of the kept weights, and the mean magnitude of the rows'
            expected errors before and after.
    """

    reprune: Callable[[Layer, torch.Tensor], Repruned]
    swapped: dict[str, tuple[int, float, float, float]] = field(default_factory=dict)
    needs_gram: bool = False

    @property
    def records(self) -> list[dict[str, Any]]:
        return [self.swapped]

    def __call__(self, layer: Layer) -> None:
        assert layer.keep is not None
        # Kept weights may have been updated as they were pruned (SparseGPT); what competes with them are dense ones.
        candidates = torch.where(layer.keep, layer.weight, layer.dense)
        found = self.reprune(layer, candidates)
        swaps, kept = int(found.swaps.sum()), max(int(layer.keep.sum()), 1)
        errors = (found.before.abs().mean().item(), found.after.abs().mean().item())
        self.swapped[layer.name] = (swaps, swaps / kept, *errors)
        layer.keep = found.keep
        layer.weight = candidates.masked_fill_(~found.keep, 0)


@dataclass
class Refit:
    """Give a pruned layer other weights, and perhaps another mask, whose outputs come closer to the dense layer's.

    A layer whose output error on the calibration data does not become smaller is left as it was.

    Attributes:
        solve: of (layer, target), the mask bool [d_out, d_in] and the weight [d_out, d_in], where the target
            [d_out, d_in] is the weight to whose outputs the layer's shall come close.
        share: how much of what earlier pruning has done to the layer's inputs the target makes up for, 0 to 1.
        dampening: added to the diagonal of the Gram matrix, as a fraction of its mean.
        warn: told of layers that cannot be refitted.
        errors: by layer the squared error of its outputs, relative to the target's outputs, before and after.
        remarks: by layer what is to be said of it.
    """

    solve: Callable[[Layer, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    share: float = 0.0
    dampening: float = 0.01
    warn: Callable[[str], None] = lambda message: None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    needs_gram: bool = True

    @property
    def records(self) -> list[dict[str, Any]]:
        return [self.errors, self.remarks]

    def __call__(self, layer: Layer) -> None:
        assert layer.keep is not None
        target, keep, changed = layer.dense, layer.keep, layer.weight
        try:
            target = self._target(layer)
            keep, weight = self.solve(layer, target)
            changed = weight.to(layer.weight.dtype)
        except torch.linalg.LinAlgError:
            self.warn(
                f"{layer.name} is left as it was: the Gram matrix of its inputs is not positive definite with "
                f"dampening={self.dampening}; raise it, or calibrate with more text"
            )
        total, before, after = (
            output_error(target, weight, layer.gram).sum().item()
            for weight in (torch.zeros_like(target), layer.weight, changed)
        )
        # Not `after >= before`, which NaN would pass.
        if after < before:
            layer.keep, layer.weight = keep, changed
        else:
            self.remarks[layer.name] = "left as it was"
            after = before
        self.errors[layer.name] = (before / total, after / total) if total else (0.0, 0.0)

    def _target(self, layer: Layer) -> torch.Tensor:
        if not self.share:
            return layer.dense
        if layer.routed:
            self.remarks[layer.name] = "gets some tokens only: no asymmetric calibration"
        if layer.cross is None:
            return layer.dense
        # As large as the Gram matrix, and of no more use: only one modifier of a recipe refits.
        cross, layer.cross = layer.cross, None
        return asymmetric_target(layer.dense, layer.gram, cross, share=self.share, dampening=self.dampening)
