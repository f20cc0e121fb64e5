"""CRePE pruning as a modifier."""

from typing import Any

import torch
from compressed_tensors.utils import match_name
from llmcompressor.core import State
from loguru import logger
from pydantic import PrivateAttr, field_validator, model_validator

from crepe_llm.importance import check_coefficients, crepe_scores
from crepe_llm.masks import ComparisonGroup, keep_mask, parse_mask_structure
from crepe_llm.modifiers.calibration import CalibratedModifier, input_channels, set_weight_matrix, weight_matrix
from crepe_llm.statistics import InputStatistics

__all__ = ["CRePEModifier"]


class CRePEModifier(CalibratedModifier):
    """
    Modifier that prunes linear layers in one shot by CRePE (our reading of https://arxiv.org/abs/2606.01544):
    each weight is scored relative to its row, its column and its K x K neighbourhood, times the norm of its input
    channel to a power. See `crepe_llm.importance.crepe_scores` for the formula; RIA and Wanda are special cases.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        CRePEModifier:
          mask_structure: "2:4"
          row: 0.64
          column: 2.1
          neighbourhood: 0.54
          kernel_size: 31
          activation_exponent: 0.98
    ```

    Lifecycle:

    - on_initialize
        - find the layers, check fields against them
    - on_calibration_start
        - register_hook(layer, gather input statistics, "forward_pre")
    - on_sequential_epoch_end
        - score, mask and prune the layers of the block
    - on_calibration_end
        - remove_hooks()
    - on_finalize
        - log the realised sparsity of every layer

    :param sparsity: fraction of each layer to prune, at least 0 and below 1, or a mapping from layer name patterns
        (exact or `re:`; the first that matches counts) to fractions. N:M structures imply it, and it may be left out
    :param mask_structure: "N:M" prunes N of every M consecutive input channels; "0:0" is unstructured
    :param comparison_group: for unstructured masks, which weights compete: those of a `row`, of the whole `matrix`,
        or of a `column_block` of 128 input channels
    :param row: coefficient of the row term
    :param column: coefficient of the column term
    :param neighbourhood: coefficient of the neighbourhood term
    :param kernel_size: odd width of the neighbourhood
    :param activation_exponent: power of the input norm
    :param targets: layers to prune, by class name, exact name or `re:` pattern; defaults to all linear layers
    :param ignore: layers to leave dense, likewise; defaults to lm_head
    :param uncalibrated: what to do with a layer that no calibration token reached: `error` (the default), or leave it
        `dense`
    """

    sparsity: float | dict[str, float] | None = None
    mask_structure: str = "0:0"
    comparison_group: ComparisonGroup = "row"
    row: float = 1.0
    column: float = 1.0
    neighbourhood: float = 1.0
    kernel_size: int = 3
    activation_exponent: float = 0.5

    _realised: dict[str, tuple[torch.Size, float]] = PrivateAttr(default_factory=dict)

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | dict[str, float] | None) -> float | dict[str, float] | None:
        if value is None:
            return value
        fractions = value if isinstance(value, dict) else {"sparsity": value}
        for pattern, fraction in fractions.items():
            if not 0 <= fraction < 1:
                raise ValueError(
                    f"sparsity={fraction}{f' for {pattern}' * isinstance(value, dict)} must be at least 0 and below 1: "
                    "it is the fraction of weights to prune, such as 0.5"
                )
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> "CRePEModifier":
        check_coefficients(self.row, self.column, self.neighbourhood, self.kernel_size, self.activation_exponent)
        structure = parse_mask_structure(self.mask_structure)
        if structure is None:
            if self.sparsity is None:
                raise ValueError('mask_structure="0:0" is unstructured and needs `sparsity`, such as 0.5')
            return self
        implied = structure[0] / structure[1]
        stated = self.sparsity.values() if isinstance(self.sparsity, dict) else [self.sparsity]
        for fraction in stated:
            if fraction is not None and abs(fraction - implied) > 1e-6:
                raise ValueError(
                    f'sparsity={fraction} contradicts mask_structure="{self.mask_structure}", which prunes '
                    f"{structure[0]} of every {structure[1]} weights: leave sparsity out or set it to {implied:g}"
                )
        return self

    def check_layer(self, name: str, module: torch.nn.Module) -> None:
        self._sparsity_of(name)
        structure = parse_mask_structure(self.mask_structure)
        channels = input_channels(module)
        if structure is not None and channels % structure[1]:
            raise ValueError(
                f'{name} has {channels} input channels, which mask_structure="{self.mask_structure}" cannot cut into '
                f"groups of {structure[1]}: add the layer to `ignore`"
            )

    def compress(self, name: str, module: torch.nn.Module, statistics: InputStatistics) -> None:
        weight = weight_matrix(module)
        scores = crepe_scores(
            weight,
            statistics.norm,
            row=self.row,
            column=self.column,
            neighbourhood=self.neighbourhood,
            kernel_size=self.kernel_size,
            activation_exponent=self.activation_exponent,
        )
        keep = keep_mask(scores, self._sparsity_of(name), self.mask_structure, self.comparison_group)
        del scores
        self._realised[name] = (weight.shape, 1 - keep.count_nonzero().item() / keep.numel())
        set_weight_matrix(module, weight.masked_fill(~keep, 0))

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        super().on_finalize(state, **kwargs)
        logger.info(self._table())
        return True

    def _sparsity_of(self, name: str) -> float:
        structure = parse_mask_structure(self.mask_structure)
        if structure is not None:
            return structure[0] / structure[1]
        if isinstance(self.sparsity, dict):
            for pattern, fraction in self.sparsity.items():
                if match_name(name, pattern):
                    return fraction
            raise ValueError(
                f"no pattern of sparsity={self.sparsity} matches the targeted layer {name}: "
                'add one (a last "re:.*" catches the rest), or add the layer to `ignore`'
            )
        assert self.sparsity is not None  # _check_fields
        return self.sparsity

    def _table(self) -> str:
        width = max(map(len, self._realised), default=5)
        weights = sum(shape.numel() for shape, _ in self._realised.values())
        pruned = sum(shape.numel() * fraction for shape, fraction in self._realised.values())
        lines = [f"{'layer':<{width}}  {'shape':>14}  pruned"]
        for name, (shape, fraction) in self._realised.items():
            lines.append(f"{name:<{width}}  {'x'.join(map(str, shape)):>14}  {fraction:6.2%}")
        lines.append(f"{'all':<{width}}  {weights:>14}  {pruned / max(weights, 1):6.2%}")
        return f"Realised sparsity of {len(self._realised)} layers ({self.mask_structure}):\n" + "\n".join(lines)
