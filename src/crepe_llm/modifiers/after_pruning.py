"""What modifiers behind one that prunes share: dense weights, where they may stand, how new weights are judged."""

from typing import Any, ClassVar

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.core import State, active_session
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from loguru import logger
from pydantic import PrivateAttr

from crepe_llm.compensation import output_error
from crepe_llm.modifiers.calibration import CalibratedModifier, set_weight_matrix, weight_matrix
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.statistics import InputStatistics

__all__ = ["AfterPruningModifier", "ReconstructionModifier"]


class AfterPruningModifier(CalibratedModifier):
    """Base of modifiers that improve layers which a modifier in front of them in the recipe has pruned.

    Subclasses implement :meth:`improve`, called once per pruned layer. The dense weight that it gets is the layer's as
    it was when the pruning modifier's calibration reached it, so behind whatever smooths or permutes in front.

    Behind one CRePEModifier the work is done in that one's calibration epoch, on each block before the next is
    calibrated. llm-compressor's own pruning modifiers know nothing of what is behind them: then there is an epoch of
    its own (but for `pipeline="sequential"`, where all share one).
    """

    #: Whether the weights that are kept change: what starts from the dense weights must then not follow.
    changes_kept_weights: ClassVar[bool] = False

    _pruning: list[CRePEModifier | SparsityModifierBase] = PrivateAttr(default_factory=list)
    _in_front: list["AfterPruningModifier"] = PrivateAttr(default_factory=list)
    _dense: dict[torch.nn.Module, torch.Tensor] = PrivateAttr(default_factory=dict)
    _met_a_mask: bool = PrivateAttr(default=False)

    def improve(
        self,
        name: str,
        module: torch.nn.Module,
        weight: torch.Tensor,
        dense: torch.Tensor,
        keep: torch.Tensor,
        statistics: InputStatistics,
    ) -> None:
        """Change one pruned layer, given its weight, its dense weight and its mask (all [d_out, d_in])."""
        raise NotImplementedError

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._check_order()
        super().on_initialize(state, **kwargs)
        if len(self._pruning) == 1 and isinstance(self._pruning[0], CRePEModifier):
            self.follow(self._pruning[0])
            return True
        self.requires_calibration_data = True  # a recipe that was saved when it followed says that it does not
        for module in self._layers:
            self.register_hook(module, self._remember, "forward_pre")  # type: ignore[arg-type]
        return True

    def remember_dense(self, module: torch.nn.Module) -> None:
        for other in self._in_front:
            if module in other._dense:
                self._dense[module] = other._dense[module]
                return
        with torch.no_grad(), align_module_device(module):
            weight = weight_matrix(module).detach()
            # A follower uses it at once; an epoch of its own would hold those of the whole model on the device.
            self._dense[module] = weight.to("cpu" if self._leader is None else weight.device, copy=True)

    def compress(self, name: str, module: torch.nn.Module, statistics: InputStatistics) -> None:
        remembered = self._dense.pop(module, None)
        if remembered is None:
            return  # the modifier that prunes did not reach it either
        weight = weight_matrix(module)
        dense = remembered.to(weight.device)
        keep = weight != 0
        if bool((keep | (dense == 0)).all()):
            return
        self._met_a_mask = True
        self.improve(name, module, weight, dense, keep, statistics)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        if not self._met_a_mask:
            raise ValueError(
                f"{type(self).__name__} found no pruned layer among its targets: its targets and ignore must match "
                "those of the modifier that prunes, and the model must be dense when the recipe starts"
            )
        return True

    def _check_order(self) -> None:
        own = type(self).__name__
        modifiers = active_session().lifecycle.recipe.modifiers
        in_front = modifiers[: next(place for place, modifier in enumerate(modifiers) if modifier is self)]
        self._pruning = [
            modifier for modifier in in_front if isinstance(modifier, CRePEModifier | SparsityModifierBase)
        ]
        self._in_front = [modifier for modifier in in_front if isinstance(modifier, AfterPruningModifier)]
        for modifier in in_front:
            if isinstance(modifier, QuantizationMixin):
                raise ValueError(
                    f"{own} would undo the {type(modifier).__name__} in front of it: "
                    "put it between the modifier that prunes and the one that quantizes"
                )
        for modifier in self._in_front:
            if modifier.changes_kept_weights:
                raise ValueError(
                    f"{own} starts from the dense weights and would undo the {type(modifier).__name__} in front of it: "
                    + ("keep one of the two" if type(modifier) is type(self) else "put it in front of that one")
                )
        if not self._pruning:
            raise ValueError(
                f"{own} has no modifier in front of it that prunes, so there is no mask to work on and no dense layer "
                "to come closer to: put it behind CRePEModifier (or SparseGPTModifier or WandaPruningModifier) in the "
                "same recipe"
            )

    def _remember(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if module not in self._layers or module in self._dense:
            return
        # In an earlier epoch the layer may still change, to one with the same outputs for other inputs.
        at_work = {id(modifier) for modifier in active_session().lifecycle.recipe.modifiers}
        if any(id(modifier) in at_work for modifier in self._pruning):
            self.remember_dense(module)


class ReconstructionModifier(AfterPruningModifier):
    """Base of those that give pruned layers new weights, whose outputs come closer to the dense layer's.

    Subclasses implement :meth:`reconstruct`, called once per pruned layer, and have a field `dampening`. A layer whose
    output error on the calibration data does not become smaller is left as it was, and a table says so.
    """

    changes_kept_weights: ClassVar[bool] = True

    dampening: float = 0.01

    _errors: dict[str, tuple[float, float]] = PrivateAttr(default_factory=dict)
    _left: list[str] = PrivateAttr(default_factory=list)

    def reconstruct(
        self, name: str, dense: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, statistics: InputStatistics
    ) -> torch.Tensor:
        """New weights [d_out, d_in] for a layer of this dense weight and mask, with the Gram matrix of its inputs."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What the table of errors says that has been done."""
        raise NotImplementedError

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """For each pruned layer its squared output error, relative to the squared outputs, before and after."""
        return dict(self._errors)

    def needs_gram(self, name: str) -> bool:
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
        gram = statistics.gram
        assert gram is not None  # needs_gram
        total = output_error(dense, torch.zeros_like(dense), gram).sum().item()
        before = output_error(dense, weight, gram).sum().item()
        try:
            changed = self.reconstruct(name, dense, keep, gram, statistics).to(weight.dtype)
        except torch.linalg.LinAlgError:
            logger.warning(
                f"{name} is left as it was: the Gram matrix of its inputs is not positive definite with "
                f"dampening={self.dampening}; raise it, or calibrate with more text"
            )
            changed = weight
        after = output_error(dense, changed, gram).sum().item()
        # Not `after >= before`, which NaN would pass.
        if after < before:
            set_weight_matrix(module, changed)
        else:
            self._left.append(name)
            after = before
        self._errors[name] = (before / total, after / total) if total else (0.0, 0.0)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        logger.info(self._table())
        return True

    def _table(self) -> str:
        width = max(map(len, self._errors))
        lines = [f"{'layer':<{width}}  before   after"]
        for name, (before, after) in self._errors.items():
            mark = "  left as it was" * (name in self._left)
            lines.append(f"{name:<{width}}  {before:6.2%}  {after:6.2%}{mark}")
        return (
            f"Squared output error of {len(self._errors)} layers, relative to their outputs, before and after "
            f"{self.label}:\n" + "\n".join(lines)
        )
