"""CRePE pruning as a modifier."""

from typing import Annotated, Any, Literal, cast

import torch
from compressed_tensors.utils import align_module_device, match_name
from llmcompressor.core import State
from loguru import logger
from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from crepe_llm.functional.masks import ComparisonGroup, keep_mask, parse_mask_structure
from crepe_llm.functional.scores import check_coefficients, crepe_scores, cvr_scores, magnitude_scores
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.modifiers import order
from crepe_llm.modifiers.fields import NonNegative, unquoted
from crepe_llm.modifiers.layers import check_groups
from crepe_llm.modifiers.pruning_pass import PruningModifier
from crepe_llm.modifiers.tables import aligned
from crepe_llm.pruning.layer import weight_matrix
from crepe_llm.pruning.steps import Mask

__all__ = ["CRePEModifier"]

_FIELDS_OF_SCORE = {
    "crepe": ("row", "column", "neighbourhood", "kernel_size", "activation_exponent"),
    "cvr": ("alpha",),
    "magnitude": (),
}


class CRePEModifier(PruningModifier):
    """
    Modifier that prunes linear layers in one shot by CRePE (our reading of https://arxiv.org/abs/2606.01544). Each
    weight is scored relative to its row, its column and its K x K neighbourhood, times the norm of its input channel to
    a power. `crepe_llm.functional.scores.crepe_scores` has the formula; RIA and Wanda are special cases.

    With `score: cvr` it prunes by column-variance reweighting (https://arxiv.org/abs/2602.07375) instead: each weight
    by its magnitude, relative to the standard deviation of its column to the power of `alpha`, times the square root of
    that of its input channel; see `crepe_llm.functional.scores.cvr_scores`. With `score: magnitude` it prunes the
    smallest weights, and needs no calibration data where no other modifier of the recipe does.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CRePEModifier:
          mask_structure: "2:4"
          row: 1.0
          column: 7.0
          neighbourhood: 6.0
          kernel_size: 31
          activation_exponent: 0.85
    ```

    What a PHOSearchModifier or a SparsityAllocationModifier before it finds takes the place of these fields, and of
    them in the recipe that is saved with the model, which so prunes the same again.

    Lifecycle:

    - on_initialize
        - find the layers, check fields against them, make a pruning pass
    - on_calibration_start
        - watch the layers, or the blocks that will be run again
    - on_sequential_epoch_end
        - score, mask and prune the layers of the block, and run the steps of the modifiers that joined the pass
    - on_calibration_end
        - remove_hooks()
    - on_finalize
        - log the realised sparsity of every layer

    :param sparsity: fraction of each layer to prune, or a mapping from layer name patterns (exact or `re:`; the first
        that matches counts) to fractions. N:M structures imply it, and it may be left out; a SparsityAllocationModifier
        before this modifier finds it
    :param mask_structure: "N:M" prunes N of every M consecutive input channels; "0:0" is unstructured. Or a mapping
        from layer name patterns to "N:M"
    :param comparison_group: for unstructured masks, which weights compete: those of a `row` or of the whole `matrix`
    :param score: `crepe`, `cvr` or `magnitude`
    :param row: for `crepe`, coefficient of the row term
    :param column: for `crepe`, coefficient of the column term
    :param neighbourhood: for `crepe`, coefficient of the neighbourhood term
    :param kernel_size: for `crepe`, odd width of the neighbourhood
    :param activation_exponent: for `crepe`, power of the input norm
    :param alpha: for `cvr`, power of the column's standard deviation, at most 9. The paper gives neither a value for it
        nor for the epsilon added to the variances; 1, and 1e-8 of the columns' mean variance, are our choices
    """

    sparsity: float | dict[str, float] | None = None
    mask_structure: Annotated[str | dict[str, str], BeforeValidator(unquoted)] = "0:0"
    comparison_group: ComparisonGroup = "row"
    score: Literal["crepe", "cvr", "magnitude"] = "crepe"
    row: NonNegative = 1.0
    column: NonNegative = 1.0
    neighbourhood: NonNegative = 1.0
    kernel_size: int = Field(default=3, ge=1)
    activation_exponent: NonNegative = 0.5
    alpha: float = Field(default=1.0, ge=0, le=9)

    _found: dict[str, Any] = PrivateAttr(default_factory=dict)
    _orders: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]] = PrivateAttr(default_factory=dict)
    _step: Mask | None = PrivateAttr(default=None)

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        for pattern, fraction in value.items() if isinstance(value, dict) else [("", value)]:
            if fraction is not None and not 0 <= fraction < 1:
                raise ValueError(
                    f"sparsity={fraction}{f' for {pattern}' * bool(pattern)} must be at least 0 and below 1: "
                    "it is the fraction of weights to prune, such as 0.5"
                )
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> "CRePEModifier":
        self.requires_calibration_data = self.score != "magnitude"
        for score, names in _FIELDS_OF_SCORE.items():
            foreign = [name for name in names if name in self.model_fields_set]
            if score != self.score and foreign:
                raise ValueError(
                    f"score: {self.score} makes no use of {', '.join(foreign)}, which belongs to score: {score}: "
                    "leave it out"
                )
        check_coefficients(self.row, self.column, self.neighbourhood, self.kernel_size, self.activation_exponent)
        _check_structure(self.mask_structure, self.sparsity)
        return self

    @model_serializer(mode="wrap")
    def _with_what_was_found(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved recipe has what was found, and only the fields of its own score, as the others are refused."""
        foreign = [name for score, names in _FIELDS_OF_SCORE.items() if score != self.score for name in names]
        fields = {**serialize(self), **self._found}
        return {name: value for name, value in fields.items() if name not in foreign}

    @property
    def step(self) -> Mask:
        if self._step is None:
            self._step = Mask(self.scores, self.mask)
        return self._step

    @property
    def realised(self) -> dict[str, float]:
        """For each layer that has been pruned, the fraction of its weights that went."""
        return {name: fraction for name, (_, fraction) in self.step.realised.items()}

    def use(self, **found: Any) -> None:
        """Take values that another modifier has found in the place of these fields, and into the saved recipe."""
        type(self)(**{name: getattr(self, name) for name in self.model_fields_set - found.keys()}, **found)
        self._found |= found

    def value(self, name: str) -> Any:
        """What counts for a field: what was found for it, else the field itself."""
        return self._found.get(name, getattr(self, name))

    def check_layer(self, name: str, module: torch.nn.Module) -> None:
        text, structure = self.structure_of(name)
        if structure is None:
            self._sparsity_of(name)
        check_groups(name, module, text)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        super().on_initialize(state, **kwargs)
        self._look_for_weights_to_prune()
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        logger.info(self._table())
        return True

    def structure_of(self, name: str) -> tuple[str, tuple[int, int] | None]:
        """A layer's mask structure, as written and as read (N of M, None for unstructured)."""
        text = self._of_layer("mask_structure", name)
        return text, parse_mask_structure(text)

    def score_in_original_order(self, orders: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]) -> None:
        """Learn which row and which column of the original layer stands where, of layers whose channels were permuted.

        They are scored as they stood, because neighbourhoods are those of the layer's own order.
        """
        self._orders = orders

    def scores(self, name: str, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        """The fp32 scores of a layer, [d_out, d_in] as the given weight."""
        if name not in self._orders:
            return self._scores(weight, statistics)
        rows, columns = (
            torch.arange(size, device=weight.device) if order is None else order.to(weight.device)
            for size, order in zip(weight.shape, self._orders[name], strict=True)
        )
        original = weight[rows.argsort()][:, columns.argsort()]
        return self._scores(original, statistics.reordered(columns.argsort()))[rows][:, columns]

    def mask(self, name: str, scores: torch.Tensor) -> torch.Tensor:
        """What of a layer is kept by given scores: bool, both [d_out, d_in]."""
        text, structure = self.structure_of(name)
        sparsity = structure[0] / structure[1] if structure else self._sparsity_of(name)
        return keep_mask(scores, sparsity, text, self.value("comparison_group"))

    @torch.no_grad()
    def _look_for_weights_to_prune(self) -> None:
        """Say so if all layers are as sparse as wanted: the zeros have the lowest scores by any score.

        Raises:
            ValueError: another modifier of the recipe searches for masks, or works on what this one has pruned.
        """
        wanted = 0.0
        for module, name in self.layers.items():
            _, structure = self.structure_of(name)
            if structure is None and self.value("sparsity") is None:  # that will be found during the calibration
                return
            wanted = structure[0] / structure[1] if structure else self._sparsity_of(name)
            with align_module_device(module):
                weight = weight_matrix(module)
                if weight[~self.mask(name, weight.abs().nan_to_num())].any():
                    return
        if not wanted:
            return
        said = (
            f"nothing is left to prune: all {len(self.layers)} targeted layers are sparse already, as "
            f"{type(self).__name__} would make them"
        )
        for modifier in [*order.modifiers_before(self), *order.modifiers_after(self)]:
            if order.role_of(modifier) in ("searches", "re-prunes", "refits"):
                raise ValueError(f"{said}, so {type(modifier).__name__} has nothing to work on: give the dense model")
        logger.warning(f"{said}, and stay as they are")

    def _scores(self, weight: torch.Tensor, statistics: InputStatistics) -> torch.Tensor:
        if self.score == "magnitude":
            return magnitude_scores(weight)
        if self.score == "cvr":
            return cvr_scores(weight, statistics.variance, alpha=self.alpha)
        coefficients = {name: self.value(name) for name in _FIELDS_OF_SCORE["crepe"]}
        return crepe_scores(weight, statistics.norm, **coefficients)

    def _sparsity_of(self, name: str) -> float:
        if self.value("sparsity") is None:
            raise ValueError(
                'mask_structure="0:0" is unstructured and needs `sparsity`, such as 0.5, or a '
                "SparsityAllocationModifier before it that chooses it"
            )
        return self._of_layer("sparsity", name)

    def _of_layer(self, field: str, name: str) -> Any:
        value = self.value(field)
        if not isinstance(value, dict):
            return value
        for pattern, chosen in value.items():
            if match_name(name, pattern):
                return chosen
        raise ValueError(
            f"no pattern of {field}={value} matches the targeted layer {name}: "
            'add one (a last "re:.*" catches the rest), or add the layer to `ignore`'
        )

    def _table(self) -> str:
        realised = self.step.realised
        weights = sum(shape.numel() for shape, _ in realised.values())
        pruned = sum(shape.numel() * fraction for shape, fraction in realised.values())
        rows = [
            (name, f"{'x'.join(map(str, shape)):>14}  {fraction:6.2%}") for name, (shape, fraction) in realised.items()
        ]
        rows.append(("all", f"{weights:>14}  {pruned / max(weights, 1):6.2%}"))
        structures = ", ".join(sorted({self.structure_of(name)[0] for name in realised}))
        table = aligned(("layer", f"{'shape':>14}  pruned"), rows)
        return f"Realised sparsity of {len(realised)} layers ({structures}):\n{table}"


def _check_structure(mask_structure: str | dict[str, str], sparsity: float | dict[str, float] | None) -> None:
    """Raise ValueError if structure and sparsity contradict each other."""
    if isinstance(mask_structure, dict):
        for pattern, text in mask_structure.items():
            if parse_mask_structure(text) is None:
                raise ValueError(
                    f'mask_structure="{text}" for {pattern} is unstructured, and a mapping is for "N:M": '
                    "map `sparsity` instead"
                )
        if sparsity is not None:
            raise ValueError(
                f"sparsity={sparsity} contradicts the mapping mask_structure={mask_structure}, which "
                "implies the sparsity of each layer: leave sparsity out"
            )
        return
    structure = parse_mask_structure(mask_structure)
    if structure is None:
        return
    implied = structure[0] / structure[1]
    stated = sparsity.values() if isinstance(sparsity, dict) else [sparsity]
    for fraction in cast(list[float | None], list(stated)):
        if fraction is not None and abs(fraction - implied) > 1e-6:
            raise ValueError(
                f'sparsity={fraction} contradicts mask_structure="{mask_structure}", which prunes '
                f"{structure[0]} of every {structure[1]} weights: leave sparsity out or set it to {implied:g}"
            )
