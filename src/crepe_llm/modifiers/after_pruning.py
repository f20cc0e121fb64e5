"""What modifiers behind one that prunes share: dense weights, where they may stand, how new weights are judged."""

from typing import Any, ClassVar, Literal

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.core import State, active_session
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin
from loguru import logger
from pydantic import PrivateAttr, field_validator
from torch.utils.hooks import RemovableHandle

from crepe_llm.functional.compensation import asymmetric_target, output_error
from crepe_llm.functional.statistics import InputStatistics, relative_weights
from crepe_llm.models.channels import normalises_outputs
from crepe_llm.models.ffn import find_blocks
from crepe_llm.modifiers.calibration import CalibratedModifier, linear_outputs, set_weight_matrix, weight_matrix
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.dense_inputs import DenseInputs

__all__ = ["DEFAULT_SHARE", "AfterPruningModifier", "ReconstructionModifier"]

#: Of asymmetric calibration, where it is possible and the recipe does not say. Chosen on validation text.
DEFAULT_SHARE = 0.25


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

    Subclasses implement :meth:`reconstruct`, called once per pruned layer. A layer whose output error on the
    calibration data does not become smaller is left as it was, and a table says so.
    """

    changes_kept_weights: ClassVar[bool] = True

    dampening: float = 0.01
    asymmetric_calibration: float | None = None
    true_sequential: bool | None = None
    token_weighting: Literal["uniform", "relative"] | None = None

    _normalises_outputs: bool = PrivateAttr(default=False)
    _dense_inputs: DenseInputs | None = PrivateAttr(default=None)
    _errors: dict[str, tuple[float, float]] = PrivateAttr(default_factory=dict)
    _marks: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("asymmetric_calibration")
    @classmethod
    def _check_asymmetric_calibration(cls, value: float | None) -> float | None:
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"asymmetric_calibration={value} must be from 0 to 1: it is a share, such as 0.25")
        return value

    def reconstruct(
        self, name: str, dense: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, statistics: InputStatistics
    ) -> torch.Tensor:
        """New weights [d_out, d_in] on this mask, to come close to a dense weight by the Gram matrix of the inputs."""
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
    def _profits(self) -> bool:
        """Whether inputs are gathered in the ways that are better and dearer, where the recipe does not say."""
        return self._leader is not None and self.fits_outputs

    @property
    def _share(self) -> float:
        if self.asymmetric_calibration is not None:
            return self.asymmetric_calibration
        return DEFAULT_SHARE if self._profits else 0.0

    @property
    def _in_turn(self) -> bool:
        return self._profits if self.true_sequential is None else self.true_sequential

    @property
    def _is_relative(self) -> bool:
        if self.token_weighting is not None:
            return self.token_weighting == "relative"
        return self._profits and self._normalises_outputs

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """For each pruned layer the squared error of its outputs, relative to those aimed at, before and after."""
        return dict(self._errors)

    def needs_gram(self, name: str) -> bool:
        return True

    def token_weights(self, module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
        return relative_weights(linear_outputs(module, inputs)) if self._is_relative else None

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        super().on_initialize(state, **kwargs)
        self._normalises_outputs = normalises_outputs(state.model.config.model_type)
        for name, value in (("asymmetric_calibration", self._share), ("true_sequential", self._in_turn)):
            if value and self._leader is None:
                raise ValueError(
                    f"{name}={value} needs layers that are dense when they are calibrated, so in front of "
                    f"{type(self).__name__} one CRePEModifier and no other that prunes, not "
                    f"{' and '.join(type(modifier).__name__ for modifier in self._pruning)}: leave it out"
                )
        return True

    def watch_too(self, model: torch.nn.Module) -> None:
        if not (self._share or self._in_turn):
            return
        try:
            blocks = list(find_blocks(model).values())
        except ValueError as error:
            raise ValueError(
                f"asymmetric_calibration={self._share} and true_sequential={self._in_turn} run the model block "
                f"by block, and {error}: set `asymmetric_calibration: 0` and `true_sequential: false`"
            ) from error
        assert self._leader is not None  # on_initialize
        if self._in_turn:
            self._leader.calibrate_in_turn(blocks)
        if self._share:
            self._dense_inputs = DenseInputs(
                self, self._layers, blocks, self._dataloader, self._leader.is_deferred, self.token_weights
            )

    def watch_again(self, layers: list[torch.nn.Module]) -> set[RemovableHandle]:
        return self._dense_inputs.again(layers) if self._dense_inputs is not None else set()

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
        target = dense
        try:
            target = self._target(name, module, dense, gram)
            changed = self.reconstruct(name, target, keep, gram, statistics).to(weight.dtype)
        except torch.linalg.LinAlgError:
            logger.warning(
                f"{name} is left as it was: the Gram matrix of its inputs is not positive definite with "
                f"dampening={self.dampening}; raise it, or calibrate with more text"
            )
            changed = weight
        total, before, after = (
            output_error(target, other, gram).sum().item() for other in (torch.zeros_like(target), weight, changed)
        )
        # Not `after >= before`, which NaN would pass.
        if after < before:
            set_weight_matrix(module, changed)
        else:
            self._marks[name] = "left as it was"
            after = before
        self._errors[name] = (before / total, after / total) if total else (0.0, 0.0)

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        logger.info(self._table())
        return True

    def _target(self, name: str, module: torch.nn.Module, dense: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        """The weight to whose outputs the layer's shall come close."""
        if self._dense_inputs is None:
            return dense
        cross = self._dense_inputs.pop(module)
        if self._dense_inputs.is_routed(module):
            self._marks[name] = "gets some tokens only: no asymmetric calibration"
        if cross is None:
            return dense
        return asymmetric_target(dense, gram, cross, share=self._share, dampening=self.dampening)

    def _table(self) -> str:
        width = max(map(len, self._errors))
        lines = [f"{'layer':<{width}}  before   after"]
        for name, (before, after) in self._errors.items():
            lines.append(f"{name:<{width}}  {before:6.2%}  {after:6.2%}  {self._marks.get(name, '')}".rstrip())
        return (
            f"Squared output error of {len(self._errors)} layers, relative to their outputs, before and after "
            f"{self.label}:\n" + "\n".join(lines)
        )
