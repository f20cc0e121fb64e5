"""Non-uniform sparsity of decoder blocks as a modifier."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, Literal

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import align_module_device, match_named_modules, match_targets
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import PRUNABLE_LAYER_TYPES, SparsityModifierBase
from llmcompressor.utils.pytorch.module import infer_sequential_targets
from loguru import logger
from pydantic import (
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from crepe_llm import processes
from crepe_llm.calibration.shares import give_all, give_share
from crepe_llm.functional.allocation import Allocation, Method, fraction_of, plot_allocation
from crepe_llm.functional.masks import parse_mask_structure
from crepe_llm.functional.scores import wanda_scores
from crepe_llm.modifiers import order
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.fields import Fraction, NonNegative
from crepe_llm.modifiers.judging import texts_in
from crepe_llm.modifiers.layers import LayerModifier
from crepe_llm.modifiers.measured_spread import SpreadSearch
from crepe_llm.modifiers.observe import Observer
from crepe_llm.modifiers.tables import aligned
from crepe_llm.pruning.block_pass import Wanted
from crepe_llm.pruning.layer import weight_matrix

__all__ = ["SparsityAllocationModifier"]

MEASURED: Literal["measured"] = "measured"


class SparsityAllocationModifier(LayerModifier):
    """
    Modifier that chooses how much of each decoder block the modifier after it prunes, so that the whole model is
    pruned to a target. It changes no weight. `crepe_llm.functional.allocation` has the methods:

    - `owl`: less of blocks with more outliers among Wanda's scores (https://arxiv.org/abs/2310.05175)
    - `alphapruning`: less of blocks with heavier-tailed spectra, without data (https://arxiv.org/abs/2410.10912)
    - `dlp`: more of blocks with higher typical scores (https://arxiv.org/abs/2505.23807)
    - `atp`: each block by the same amount more than the one before it, without data (OpenReview otNB7BzsiR)
    - `uniform`: all alike

    All layers of a block get the same sparsity, and the sparsities, weighted by the blocks' sizes, meet the target
    exactly; what is pruned is up to one weight of each comparison group less, as counts are rounded down.

    The modifier after it is a CRePEModifier or llm-compressor's SparseGPTModifier or WandaPruningModifier, whose
    `sparsity` is left out (or `null`). With an N:M structure, which only CRePEModifier can vary, each block gets an N
    of its own and M stays; 2:4 is refused, because the hardware that runs it wants 2:4 everywhere.

    The modifier after it prunes by what was chosen, and the recipe that is saved with the model has it: as `found`
    here, and as the CRePEModifier's `sparsity` or `mask_structure`. So that recipe prunes the same again without data.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        SparsityAllocationModifier:
          method: owl
          sparsity: 0.7
        CRePEModifier:
          comparison_group: row
    ```

    `owl` and `dlp` look at the dense model, so they need a calibration epoch of their own, as oneshot's default
    pipeline gives them. Beside the inputs' norms they hold the scores of one block at a time.

    `atp` with `spread: measured` needs one, too. The whole model is pruned with five spreads and with none, by the
    CRePEModifier after it, and judged by how far its predictions are from the dense model's; the best two are pruned
    once more as the recipe prunes. No spread is used unless one is clearly better on the calibration text, which both
    prunes and judges. That takes as long as about twenty calibrations (ours; the paper searches by perplexity).

    Lifecycle:

    - on_initialize
        - find the modifier after it, its layers and their blocks; refuse what cannot be allocated
    - on_calibration_start
        - `owl`, `dlp`: watch the layers' inputs
        - otherwise, or with `found`: hand the sparsities over
    - on_sequential_epoch_end
        - `owl`, `dlp`: reduce the scores of the block to one number
    - on_calibration_end
        - `owl`, `dlp`: remove_hooks(), hand the sparsities over
        - `spread: measured`: prune the model for a while with each spread, hand the best one's sparsities over
    - on_finalize
        - nothing is left to do

    :param method: `owl`, `alphapruning`, `dlp`, `atp` or `uniform`
    :param sparsity: fraction to prune of all weights of the layers that the modifier after it prunes
    :param threshold: for `owl`, M of the paper: an outlier is above so many times the mean score; 5 where left out
    :param spread: for `owl` (lambda, 0.08 where left out), `dlp` (alpha, 0.15) and `atp` (half of what is possible),
        half of the range of the sparsities; for `alphapruning` (epsilon, 0.3) the same, relative to their mean. For
        `atp` also `measured`
    :param statistic: for `dlp`, the typical score: `median` (the paper's text; where left out) or `mean` (its code)
    :param tail: for `alphapruning`, where the tail of a spectrum begins: `peak` (where left out) or `middle`
    :param slope: for `atp`, in the place of `spread`, beta of the paper: how much more each block is pruned than the
        one before it
    :param low: smallest sparsity of a block
    :param high: largest sparsity of a block
    :param plot: file for a plot of the sparsities (needs matplotlib)
    :param found: what each block gets, in a saved recipe; nothing is computed

    `targets`, `ignore` and `uncalibrated` are the pruning modifier's, and need not be given.
    """

    method: Method
    sparsity: Fraction
    threshold: NonNegative | None = None
    spread: NonNegative | Literal["measured"] | None = None
    statistic: Literal["median", "mean"] | None = None
    tail: Literal["peak", "middle"] | None = None
    slope: NonNegative | None = None
    low: Fraction = 0.0
    high: Fraction = 0.99
    plot: str | None = None
    found: dict[str, float | str] | None = None

    _pruning: CRePEModifier | SparsityModifierBase = PrivateAttr()
    _chosen: dict[str, float | str] = PrivateAttr(default_factory=dict)
    _group: int | None = PrivateAttr(default=None)
    _blocks: dict[str, dict[torch.nn.Module, str]] = PrivateAttr(default_factory=dict)
    _sizes: dict[str, int] = PrivateAttr(default_factory=dict)
    _norms: dict[torch.nn.Module, torch.Tensor] = PrivateAttr(default_factory=dict)
    _measures: dict[str, float] = PrivateAttr(default_factory=dict)
    _search: SpreadSearch | None = PrivateAttr(default=None)
    _spread: float = PrivateAttr(default=0.0)

    @property
    def _allocation(self) -> Allocation:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Allocation)}
        return Allocation(**fields | ({"spread": self._spread} if self.spread == MEASURED else {}))

    @property
    def measures(self) -> dict[str, float]:
        """What the method ranks blocks by: outlier percentage, tail exponent or typical score; empty for the others."""
        return {block: self._measures[block] for block in self._blocks if block in self._measures}

    @property
    def chosen(self) -> dict[str, float | str]:
        """What each block gets, a fraction or "N:M": of the recipe, or as it was allocated."""
        return dict(self._chosen)

    @field_validator("found")
    @classmethod
    def _check_found(cls, value: dict[str, float | str] | None) -> dict[str, float | str] | None:
        for block, chosen in (value or {}).items():
            if isinstance(chosen, str):
                parse_mask_structure(chosen)
            elif not 0 <= chosen < 1:
                raise ValueError(f"found={chosen} for {block} must be at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _check_fields(self) -> "SparsityAllocationModifier":
        if self.spread == MEASURED and (self.method != "atp" or self.slope is not None):
            raise ValueError("spread=measured is for method: atp without slope: give a number, or leave it out")
        needs_data = self._allocation.needs_data or self.spread == MEASURED
        self.requires_calibration_data = self.found is None and needs_data
        if not self.low <= self.sparsity <= self.high:
            raise ValueError(f"low={self.low}, sparsity={self.sparsity} and high={self.high} must ascend")
        return self

    @model_serializer(mode="wrap")
    def _with_what_was_found(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A saved recipe has what was found, and says of which layers."""
        if not self._chosen:
            return serialize(self)
        names = [name for name in ("targets", "ignore", "uncalibrated") if hasattr(self._pruning, name)]
        return serialize(self) | {name: getattr(self._pruning, name) for name in names} | {"found": self.chosen}

    @property
    def looks_at_layers(self) -> bool:
        return self.requires_calibration_data

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        order.check(self)
        self._pruning = next(
            m for m in order.modifiers_after(self) if isinstance(m, CRePEModifier | SparsityModifierBase)
        )
        self._check_contradictions()
        if self.spread == MEASURED and not isinstance(self._pruning, CRePEModifier):
            raise ValueError(
                f"spread=measured prunes by a CRePEModifier to measure, not by {type(self._pruning).__name__}: use a "
                "CRePEModifier, or give a number"
            )
        self._group = self._wanted_group()
        self.take_data(state, **kwargs)
        self._find_blocks(state.model, kwargs.get("sequential_targets"))
        if self._group is None:
            # Until the blocks have theirs, so that the modifier that prunes can check its fields.
            self._set_sparsity(self.sparsity)
        if self.requires_calibration_data:
            super().on_initialize(state, **kwargs)
        elif self.found is None and not self._allocation.needs_weights:
            self._allocated()  # what it cannot keep to is found out before any time is spent
        return True

    def find_layers(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        if isinstance(self._pruning, CRePEModifier):
            return self._pruning.find_layers(model)
        return {module: name for layers in self._upstream_layers(model) for module, name in layers.items()}

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        self._weigh_blocks()
        if not self.requires_calibration_data:
            self._conclude(state.model)
            return
        if self._pruning in active_session().lifecycle.recipe.modifiers:
            raise ValueError(
                f"SparsityAllocationModifier with method: {self.method} must have seen the whole dense model before "
                f"{type(self._pruning).__name__} prunes, so each needs a calibration epoch of its own: leave out "
                'pipeline=, or give oneshot pipeline="independent" (alphapruning, and atp with a given spread, need no '
                "epoch)"
            )
        if self.spread == MEASURED:
            give_all(self._dataloader)
            sequences = texts_in(self._dataloader, "SparsityAllocationModifier with spread: measured")
        wanted = {module: Wanted(name) for module, name in self._layers.items()}
        self._observer = Observer(self, state.model, self._dataloader, wanted)
        if self.spread == MEASURED:
            assert isinstance(self._pruning, CRePEModifier)  # checked when the recipe started
            self._search = SpreadSearch(self._pruning, state.model, sequences, self._observer)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Keep what the scores of the blocks need; once a block is complete, reduce them to one number."""
        if self._observer is None:
            return
        uncalibrated = getattr(self._pruning, "uncalibrated", self.uncalibrated)
        if self._search is not None:  # what matters here is that layers are calibrated at all
            with processes.alone():
                list(self._observer.ended(modules, uncalibrated))
            return
        for module, _, statistics in self._observer.ended(modules, uncalibrated):
            self._norms[module] = statistics.norm
        unseen = set(self._observer.unseen)
        for block, layers in self._blocks.items():
            if not unseen.intersection(layers.values()) and self._norms.keys() & layers:
                self._measures[block] = self._measure(layers)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._observer is None:
            return
        self.stop_watching()
        if self._search is not None:
            give_share(self._dataloader)
            self._spread = self._search.find(self.sparsity, self._try_spread)
            self._search = None
            self._conclude(state.model)
            return
        for block in self._blocks:
            if block not in self._measures:
                raise ValueError(
                    f"no calibration token reached the layers of {block}: calibrate with more or other text"
                )
        self._conclude(state.model)

    def _try_spread(self, spread: float) -> None:
        """Have the CRePEModifier prune with this spread of ATP's line."""
        self._spread = spread
        self._use(self._allocated())

    def _allocated(self) -> dict[str, float | str]:
        """What each block gets by the method."""
        measures, sizes = list(self.measures.values()), list(self._sizes.values())
        chosen = self._allocation.choose(measures, sizes, self.sparsity, self._group)
        return dict(zip(self._blocks, chosen, strict=True))

    def _set_sparsity(self, sparsity: Any) -> None:
        if isinstance(self._pruning, CRePEModifier):
            self._pruning.use(sparsity=sparsity)
        else:
            self._pruning.sparsity = sparsity  # llm-compressor's own have no other way to be told

    def _check_contradictions(self) -> None:
        """Refuse what contradicts the modifier that prunes."""
        kind = type(self._pruning).__name__
        for name in ("targets", "ignore", "uncalibrated"):
            own, theirs = getattr(self, name), getattr(self._pruning, name, getattr(self, name))
            if name in self.model_fields_set and own != theirs:
                raise ValueError(f"{name}={own} contradicts the {kind}'s {name}={theirs}: leave it out")
        if getattr(self._pruning, "sparsity_profile", None) is not None:
            raise ValueError(
                f"the {kind} has a sparsity_profile and so allocates by itself: leave that out (with its owl_ fields), "
                "or leave out the SparsityAllocationModifier"
            )
        theirs = self._pruning.sparsity
        if self.found is None and theirs is not None and theirs != self.sparsity:
            raise ValueError(
                f"sparsity={self.sparsity} is what SparsityAllocationModifier allocates, and the {kind} has "
                f"sparsity={theirs}: leave it out there"
            )

    def _wanted_group(self) -> int | None:
        """M of N:M structures, None where masks are unstructured."""
        kind, text = type(self._pruning).__name__, self._pruning.mask_structure
        if isinstance(text, dict):
            if self.found is None:
                raise ValueError(
                    f"the {kind} has a mapping as mask_structure, which SparsityAllocationModifier would overwrite: "
                    'give it one structure, such as "4:8"'
                )
            text = next(iter(text.values()))
        structure = parse_mask_structure(text)
        if structure is None:
            return None
        n, m = structure
        if not isinstance(self._pruning, CRePEModifier):
            raise ValueError(
                f'{kind} prunes all layers by one mask_structure, here "{text}", so there is nothing to allocate: use '
                "CRePEModifier, or unstructured masks"
            )
        if self.found is not None:
            return m
        if (n, m) == (2, 4):
            raise ValueError(
                'mask_structure="2:4" leaves nothing to allocate: the hardware that runs it wants two of every four '
                'weights in every layer. Leave out the SparsityAllocationModifier, or use groups such as "4:8"'
            )
        if abs(self.sparsity * m - n) >= 1:
            nearest = round(self.sparsity * m)
            raise ValueError(
                f'mask_structure="{text}" is far from sparsity={self.sparsity}, which blocks shall have on average: '
                f'write "{min(max(nearest, 1), m - 1)}:{m}" or change the sparsity'
            )
        low, high = max(self.low, 1 / m), min(self.high, 1 - 1 / m)
        if not low <= self.sparsity <= high:
            raise ValueError(
                f'mask_structure="{text}" with low={self.low} and high={self.high} gives each block from {low:.4g} to '
                f"{high:.4g}, and sparsity={self.sparsity} is not between: give a sparsity that is, or groups of more"
            )
        return m

    def _find_blocks(self, model: torch.nn.Module, sequential_targets: Any) -> None:
        """Find which layers each decoder layer has, and how many weights they have."""
        names = [name for name, _ in match_named_modules(model, infer_sequential_targets(model, sequential_targets))]
        self._blocks = {}
        for module, name in self.find_layers(model).items():
            block = next((block for block in names if name == block or name.startswith(f"{block}.")), None)
            if block is None:
                raise ValueError(
                    f"{name} is in none of the {len(names)} decoder layers of {type(model).__name__}, to which "
                    f"sparsity is allocated: add it to `ignore` of {type(self._pruning).__name__}"
                )
            self._blocks.setdefault(block, {})[module] = name
        self._weigh_blocks()
        if not self._blocks:
            raise ValueError(
                f"{type(self._pruning).__name__} with targets={self._pruning.targets} and "
                f"ignore={self._pruning.ignore} matches no layer"
            )
        if self.found is not None and self.found.keys() != self._blocks.keys():
            raise ValueError(
                f"found has sparsities for {', '.join(self.found)}, and {type(model).__name__} has the blocks "
                f"{', '.join(self._blocks)}: remove `found` to allocate anew"
            )
        for block, chosen in (self.found or {}).items():
            if isinstance(chosen, str) != (self._group is not None):
                raise ValueError(
                    f"found={chosen} for {block} does not fit the {type(self._pruning).__name__}'s "
                    f'mask_structure="{self._pruning.mask_structure}": remove `found` to allocate anew'
                )

    def _weigh_blocks(self) -> None:
        """How many weights the layers of each block have; CFSPModifier changes that before the allocation's turn."""
        with disable_onloading():
            self._sizes = {
                block: sum(layer.weight.numel() for layer in layers)  # type: ignore[union-attr, operator, misc]
                for block, layers in self._blocks.items()
            }

    def _upstream_layers(self, model: torch.nn.Module) -> Iterator[dict[torch.nn.Module, str]]:
        """What llm-compressor's own modifiers prune in each module that their targets match, which is what they take a
        list of sparsities for."""
        for outer, layer in match_named_modules(model, self._pruning.targets):
            yield {
                module: f"{outer}.{name}".removesuffix(".")
                for name, module in match_named_modules(layer, PRUNABLE_LAYER_TYPES)
                if not match_targets(f"{outer}.{name}", module, self._pruning.ignore)
            }

    def _measure(self, layers: dict[torch.nn.Module, str]) -> float:
        scores = []
        for module in layers:
            if module in self._norms:
                with torch.no_grad(), align_module_device(module):
                    scores.append(wanda_scores(weight_matrix(module), self._norms.pop(module)).flatten())
        return self._allocation.of_scores(torch.cat(scores))

    def _conclude(self, model: torch.nn.Module) -> None:
        """Allocate, unless that was done in an earlier run, and hand the result over."""
        if self.found is not None:
            self._chosen = dict(self.found)
        else:
            if self.method == "alphapruning":
                owners = processes.assign({block: float(size) for block, size in self._sizes.items()})
                mine = {block: layers for block, layers in self._blocks.items() if owners[block] == processes.rank()}
                self._measures = {block: self._tail(layers) for block, layers in mine.items()}
                processes.merge(self._measures, self._blocks)
            self._chosen = processes.from_first(self._allocated())
        self._hand_over(model)
        logger.info(self._table())
        if self.plot is not None and processes.is_first():
            title = f"{self.method}, {type(model).__name__}"
            plot_allocation(
                [fraction_of(self._chosen[block]) for block in self._blocks], self.sparsity, self.plot, title
            )

    def _tail(self, layers: dict[torch.nn.Module, str]) -> float:
        weights = []
        for module, name in layers.items():
            with torch.no_grad(), align_module_device(module):
                weights.append(weight_matrix(module))
                if not bool(torch.isfinite(weights[-1]).all()):
                    raise ValueError(f"the weight of {name} contains NaN or infinity: the checkpoint is damaged")
        return self._allocation.of_weights(weights)

    def _hand_over(self, model: torch.nn.Module) -> None:
        if isinstance(self._pruning, CRePEModifier):
            self._use(self._chosen)
            return
        owner = {module: block for block, layers in self._blocks.items() for module in layers}
        sparsities = []
        for layers in self._upstream_layers(model):
            blocks = {owner[module] for module in layers}
            if len(blocks) > 1:
                raise ValueError(
                    f"targets={self._pruning.targets} of {type(self._pruning).__name__} match a module with "
                    f"{len(blocks)} decoder layers, which get one sparsity there: target linear or decoder layers"
                )
            # A module whose layers are all ignored is not pruned, but is counted.
            sparsities.append(float(self._chosen[blocks.pop()]) if blocks else self.sparsity)
        self._set_sparsity(sparsities)

    def _use(self, chosen: dict[str, float | str]) -> None:
        """Have the CRePEModifier prune each block by its sparsity."""
        assert isinstance(self._pruning, CRePEModifier)
        mapping: dict[str, Any] = {f"re:{re.escape(block)}(\\.|$)": each for block, each in chosen.items()}
        if self._group is None:
            self._pruning.use(sparsity=mapping)
        else:
            self._pruning.use(mask_structure=mapping, sparsity=None)

    def _table(self) -> str:
        total = sum(self._sizes.values())
        mean = sum(self._sizes[block] * fraction_of(chosen) for block, chosen in self._chosen.items()) / total
        rows = []
        for block, size in self._sizes.items():
            chosen = self._chosen[block]
            shown = f"{chosen:>8}" if isinstance(chosen, str) else f"{chosen:8.2%}"
            measure = f"  {self._measures[block]:.6g}" if block in self._measures else ""
            rows.append((block, f"{size:>12}  {shown}{measure}"))
        rows.append(("all", f"{total:>12}  {mean:8.2%}"))
        return (
            f"Sparsity of {len(self._sizes)} blocks by {self.method}, {mean:.4%} of all weights for a target of "
            f"{self.sparsity:.4%}:\n" + aligned(("block", f"{'weights':>12}  sparsity"), rows)
        )
