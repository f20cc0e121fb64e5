"""Channel permutation as a modifier."""

import time
from typing import Any, cast

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import align_module_device
from llmcompressor.core import Event, State, active_session
from loguru import logger
from pydantic import Field, PrivateAttr, model_validator
from tqdm import tqdm

from crepe_llm import journal, processes
from crepe_llm.functional.permutation import channel_index, permute_channels, retained_score, sample_rows, split_heads
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.models.blocks import block_of
from crepe_llm.models.channels import AXES, family_of, module_axes
from crepe_llm.models.permuting import permute_parameters
from crepe_llm.modifiers import order
from crepe_llm.modifiers.allocation import SparsityAllocationModifier
from crepe_llm.modifiers.crepe import CRePEModifier
from crepe_llm.modifiers.layers import LayerModifier
from crepe_llm.modifiers.observe import Observer
from crepe_llm.modifiers.tables import aligned
from crepe_llm.pruning.block_pass import Wanted
from crepe_llm.pruning.layer import input_channels, weight_matrix

__all__ = ["ChannelPermutationModifier"]


class ChannelPermutationModifier(LayerModifier):
    """
    Modifier that reorders the channels of the dense model, such that the N:M masks of the CRePEModifier after it keep
    more of the weights' scores. What it makes of the model is a model of the same class with the same outputs: every
    reordering is absorbed by the layers that share the channels, and nothing happens at inference. The channels that
    can be reordered are those of

    - `mlp`: the inputs of down_proj, by the rows of gate_proj and up_proj
    - `attention`: the inputs of o_proj within each head, by the rows of v_proj; query heads that share a key-value head
      share its order
    - `residual`: the residual stream, one order for the whole model, by embeddings, norms, every layer and the head

    The search is RIA's channel permutation (OpenReview Tr0lPx9woF), see `crepe_llm.functional.permutation`; RIA itself
    permutes every layer on its own, which no stored model can express. The scores are those that the CRePEModifier
    gives on the dense model. Layers that share channels count by their number of weights: each layer's scores are
    taken relative to their mean. An order that would not raise the retained score of all rows is left out.

    A weight's score depends on its neighbours, which permuting replaces. The CRePEModifier is told about it, and scores
    every layer in its original order, so that what is maximised here is what it prunes by.

    Sample yaml:

    ```yaml
    pruning_stage:
      pruning_modifiers:
        ChannelPermutationModifier: {}
        CRePEModifier:
          mask_structure: "2:4"
    ```

    With `residual`, what was trained on the hidden states of the original model, such as an adapter or a draft model
    for speculative decoding, no longer fits.

    It needs a calibration epoch of its own, as oneshot's default pipeline gives it: the order of the residual stream
    depends on every block. At most the scores of one layer and a sample of rows are held at a time.

    Lifecycle:

    - on_initialize
        - find the CRePEModifier and its layers; refuse other orders of the recipe
        - where it is unknown which modules of the model share channels, say so and do nothing from here on
    - on_calibration_start
        - watch the layers' inputs; in a run that goes on, permute by the orders that it had found
    - on_sequential_epoch_end
        - keep the statistics of the block
    - on_calibration_end
        - remove_hooks()
        - search for the orders, permute the model, tell the CRePEModifier
        - log the retained share of the scores before and after
    - on_finalize
        - nothing is left to do

    :param mlp: reorder the channels between gate_proj, up_proj and down_proj
    :param attention: reorder the channels within heads between v_proj and o_proj
    :param residual: reorder the residual stream
    :param sweeps: how often at most the search goes through all places of a group
    :param rows: how many rows of the layers that share channels the search looks at, drawn at random of all of them
    :param seed: of the rows drawn and of the blocks into which the search cuts wide layers

    `targets`, `ignore` and `uncalibrated` are the CRePEModifier's, and need not be given; `uncalibrated: dense` leaves
    the scores of a layer that no calibration token reached out.
    """

    mlp: bool = True
    attention: bool = True
    residual: bool = True
    sweeps: int = Field(default=4, ge=1)
    rows: int = Field(default=8192, ge=1)
    seed: int = 0

    _crepe: CRePEModifier = PrivateAttr()
    _modules: dict[str, torch.nn.Module] = PrivateAttr(default_factory=dict)
    _axes: dict[str, tuple[str | None, ...]] = PrivateAttr(default_factory=dict)
    _heads: int = PrivateAttr(default=1)
    _repeat: int = PrivateAttr(default=1)
    _sites: dict[str, list[str]] = PrivateAttr(default_factory=dict)
    _inputs: dict[str, InputStatistics] = PrivateAttr(default_factory=dict)
    _retained: dict[str, tuple[float, float]] = PrivateAttr(default_factory=dict)
    _kept: dict[str, Any] | None = PrivateAttr(default=None)
    _key: str = PrivateAttr(default="")

    @property
    def retained(self) -> dict[str, tuple[float, float]]:
        """For each set of channels the share of the scores that the masks keep, before and after."""
        return dict(self._retained)

    @model_validator(mode="after")
    def _check_fields(self) -> "ChannelPermutationModifier":
        if not any(getattr(self, axis) for axis in AXES):
            raise ValueError("mlp, attention and residual are all false, so nothing would be permuted: switch one on")
        return self

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        order.check(self)
        self._crepe = next(m for m in order.modifiers_after(self) if isinstance(m, CRePEModifier))
        super().on_initialize(state, **kwargs)
        config = state.model.config.get_text_config()
        names = [name for name, _ in state.model.named_parameters(remove_duplicate=False)]
        try:
            self._axes = module_axes(family_of(config), names)
        except ValueError as error:
            logger.warning(f"ChannelPermutationModifier does nothing, and the recipe goes on without it: {error}")
            self.requires_calibration_data, self._layers = False, {}
            return True
        self._modules = {name: state.model.get_submodule(name) for name in self._axes}
        self._repeat = self._sharing_heads() if self.attention else 1
        self._heads = config.num_attention_heads // self._repeat
        for name in self._layers.values():
            axis = self._axes[name][-1]
            if axis is not None and getattr(self, axis):
                self._sites.setdefault(_site(name, axis), []).append(name)
        if not self._sites:
            raise ValueError(
                "the CRePEModifier prunes no layer whose input channels ChannelPermutationModifier may permute: "
                f"its targets={self._crepe.targets} and ignore={self._crepe.ignore} leave out what "
                f"mlp={self.mlp}, attention={self.attention}, residual={self.residual} would serve"
            )
        self._refuse_allocated_structures()
        kept, self._key = journal.active(), f"{len(order.modifiers_before(self)):02}-orders"
        self._kept = None if kept is None else kept.read(self._key)
        self.requires_calibration_data = self._kept is None
        return True

    def _refuse_allocated_structures(self) -> None:
        """Refuse an allocation that gives blocks an N of their own, before its calibration: the blocks share the
        residual stream. What a saved recipe has found is compared as it is, and calibrates nothing."""
        readers = self._sites.get("residual", [])
        if len({block_of(name) for name in readers}) < 2 or self._crepe.structure_of(readers[0])[1] is None:
            return
        for modifier in order.modifiers_before(self):
            if not isinstance(modifier, SparsityAllocationModifier) or modifier.found is not None:
                continue
            if modifier.method != "uniform":
                raise ValueError(
                    f"SparsityAllocationModifier with method: {modifier.method} gives each block's N:M masks an N of "
                    "its own, and the residual channels, which all blocks read, can have one order only: give "
                    "ChannelPermutationModifier residual: false, or leave the allocation out"
                )

    def find_layers(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        return self._crepe.find_layers(model)

    def unseen(self) -> list[str]:
        return [] if self._kept is not None else super().unseen()

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if not self._axes:
            return
        if active_session().lifecycle.recipe.modifiers != [self]:
            raise ValueError(
                "ChannelPermutationModifier must have permuted the model before the modifiers after it look at it, so "
                'it needs a calibration epoch of its own: leave out pipeline=, or give oneshot pipeline="independent"'
            )
        for site in self._sites:
            self._structure(site)
        if self._kept is not None:
            self._retained = self._kept["retained"]
            self._permute(self._kept["orders"])
            logger.info(self._table(0, 0))
            return
        wanted = {module: Wanted(name) for module, name in self._layers.items()}
        self._observer = Observer(self, state.model, self._dataloader, wanted)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Keep the statistics; the layers stay as they are until those of all are known."""
        if self._observer is None:
            return
        for _, name, statistics in self._observer.ended(modules, self._crepe.uncalibrated):
            self._inputs[name] = statistics

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        if self._observer is None:
            return
        self.stop_watching()
        started = time.perf_counter()
        orders = self._search()
        kept = journal.active()
        if kept is not None:
            kept.write(self._key, {"orders": orders, "retained": self._retained})
        searched = time.perf_counter()
        self._permute(orders)
        self._inputs.clear()
        logger.info(self._table(searched - started, time.perf_counter() - searched))

    def _search(self) -> dict[str, torch.Tensor]:
        """The orders that retain more, by site; CPU int64 [heads, width] each."""
        orders: dict[str, torch.Tensor] = {}
        owners = processes.assign({site: float(self._widths(site)) for site in self._sites})
        mine = {site: names for site, names in self._sites.items() if owners[site] == processes.rank()}
        with tqdm(total=sum(map(len, mine.values())), desc="Permuting channels", unit=" layers") as progress:
            for site, names in mine.items():
                readers = [name for name in names if name in self._inputs]
                n, m = self._structure(site)
                heads, repeat = self._head_counts(self._axes[names[0]][-1])
                drawn = sample_rows([len(weight_matrix(self._modules[name])) for name in readers], self.rows, self.seed)
                parts, total, before = [], 0.0, 0.0
                for name, rows in zip(readers, drawn, strict=True):
                    scores = self._scores(name)
                    total += scores.sum(dtype=torch.float64).item()
                    before += retained_score(scores, n, m)
                    parts.append(split_heads(scores[rows.to(scores.device)], heads, repeat))
                    del scores
                    progress.update()
                if not total:
                    continue
                permutation = torch.stack(
                    [permute_channels(head, n, m, sweeps=self.sweeps, seed=self.seed) for head in torch.cat(parts, 1)]
                )
                index = channel_index(permutation, repeat)
                after = sum(retained_score(self._scores(name)[:, index], n, m) for name in readers)
                if after > before:
                    orders[site] = permutation.cpu()
                self._retained[site] = (before / total, max(before, after) / total)
        for record in (orders, self._retained):
            processes.merge(record, self._sites)
        return orders

    def _widths(self, site: str) -> int:
        """The input channels of a site's readers, all together."""
        return sum(input_channels(self._modules[name]) for name in self._sites[site])

    def _permute(self, orders: dict[str, torch.Tensor]) -> None:
        """Permute every parameter along the axes that have an order, and tell the CRePEModifier."""
        indices = {}
        for name, axes in self._axes.items():
            found = [None if axis is None else orders.get(_site(name, axis)) for axis in axes]
            # Only inputs hold heads more than once.
            repeats = [self._head_counts(axis)[1] if place else 1 for place, axis in enumerate(axes)]
            if any(each is not None for each in found):
                with disable_onloading():
                    sizes = weight_matrix(self._modules[name]).shape
                indices[name] = tuple(
                    None if each is None else _as_often_as_held(channel_index(each, repeat), size)
                    for each, repeat, size in zip(found, repeats, sizes, strict=True)
                )
        permute_parameters(self._modules, indices)
        self._crepe.score_in_original_order({name: (i[0], i[1]) for name, i in indices.items() if len(i) == 2})

    def _scores(self, name: str) -> torch.Tensor:
        """The layer's scores, relative to their mean."""
        module = self._modules[name]
        with torch.no_grad(), align_module_device(module):
            scores = self._crepe.scores(name, weight_matrix(module), self._inputs[name])
        return scores.div_(scores.mean(dtype=torch.float64).clamp_min(torch.finfo(torch.float32).tiny).float())

    def _sharing_heads(self) -> int:
        """How many query heads share the values of one head, by the layers: a config may have a field for it that its
        family does not read."""
        with disable_onloading():
            sizes = {name: weight_matrix(self._modules[name]).shape for name, axes in self._axes.items() if axes[1:]}
        axis = "attention"
        written = {_site(name, axis): size[0] for name, size in sizes.items() if self._axes[name][0] == axis}
        read = {_site(name, axis): size[1] for name, size in sizes.items() if self._axes[name][1] == axis}
        counts = {size / written[site] for site, size in read.items()} or {1.0}
        if len(counts) > 1 or not min(counts).is_integer():
            raise ValueError(
                f"the blocks have {', '.join(f'{count:g}' for count in sorted(counts))} query heads to one of values, "
                "and ChannelPermutationModifier permutes where all have one number: set `attention: false`"
            )
        return int(counts.pop())

    def _head_counts(self, axis: str | None) -> tuple[int, int]:
        """How many heads the channels of an axis have, and how often an input holds each."""
        return (self._heads, self._repeat) if axis == "attention" else (1, 1)

    def _structure(self, site: str) -> tuple[int, int]:
        """N and M of the masks of a site's readers."""
        readers = self._sites[site]
        structures = {name: self._crepe.structure_of(name)[1] for name in readers}
        if None in structures.values():
            raise ValueError(
                "ChannelPermutationModifier serves N:M masks, and the CRePEModifier after it is unstructured: give it "
                'mask_structure: "2:4", or leave the permutation out'
            )
        if len(set(structures.values())) > 1:
            raise ValueError(
                f"the layers that read the {site} channels have different mask structures, and they can have one order "
                f"only: give ChannelPermutationModifier {site}: false"
            )
        n, m = cast(tuple[int, int], structures[readers[0]])
        axis = cast(str, self._axes[readers[0]][-1])
        heads, repeat = self._head_counts(axis)
        width = input_channels(self._modules[readers[0]]) // (heads * repeat)
        if width % m:
            raise ValueError(
                f"{readers[0]} has {width} channels in each head, which {n}:{m} cannot cut into groups of {m}: give "
                f"ChannelPermutationModifier {axis}: false"
            )
        return n, m

    def _table(self, searching: float, absorbing: float) -> str:
        rows = (
            (site, f"{before:6.2%}  {after:6.2%}{'  left as it was' * (after == before)}")
            for site, (before, after) in self._retained.items()
        )
        return (
            f"Share of the scores that masks keep, before and after permuting ({searching:.1f} s to search, "
            f"{absorbing:.1f} s to absorb):\n" + aligned(("channels", "before   after"), rows)
        )


def _site(module: str, axis: str) -> str:
    """The name of the channels that a module shares on an axis: with its block, or with its expert alone."""
    within = ".".join(module.split(".")[: _last_number(module) + 1])
    return axis if axis == "residual" else f"{within}.{axis}"


def _last_number(name: str) -> int:
    return max((place for place, part in enumerate(name.split(".")) if part.isdecimal()), default=-1)


def _as_often_as_held(index: torch.Tensor, size: int) -> torch.Tensor:
    """The order of an axis that holds the channels several times, one set after the other."""
    width = len(index)
    return torch.cat([index + start for start in range(0, size, width)])
