"""The lifecycle of the pruning modifiers: one pass over the model's blocks, which runs the steps of all of them."""

import json
from collections.abc import Collection
from typing import Any, cast

import torch
from compressed_tensors.utils import align_module_device
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.utils.hooks import HooksMixin
from pydantic import PrivateAttr

from crepe_llm import journal, processes
from crepe_llm.functional.bitmask import RECORDED
from crepe_llm.models.blocks import find_blocks
from crepe_llm.modifiers import order
from crepe_llm.modifiers.layers import LayerModifier
from crepe_llm.modifiers.observe import Observer, is_usable
from crepe_llm.pruning.block_pass import Batch, Calibration, TokenWeights, Wanted, prune_block, shared_out
from crepe_llm.pruning.layer import Layer, mask_of, record_mask, set_weight_matrix, share_layer, weight_matrix
from crepe_llm.pruning.steps import Mask, Step

__all__ = ["PruningModifier", "PruningPass"]


class PruningModifier(LayerModifier):
    """Base of modifiers that prune layers, or improve layers that are pruned. Each gives a step.

    A CRePEModifier and the modifiers after it that re-prune or refit share one :class:`PruningPass`, and so one
    calibration epoch: each layer goes through all their steps before the next is calibrated. llm-compressor's own
    pruning modifiers know nothing of what comes after them. Modifiers after those share a pass of their own.
    """

    _pass: "PruningPass | None" = PrivateAttr(default=None)

    @property
    def step(self) -> Step:
        """What is done to each layer; one object for the modifier's whole life."""
        raise NotImplementedError

    @property
    def calibration(self) -> Calibration:
        """How the modifier wants layers to be calibrated."""
        return Calibration()

    def token_weights(self, module: torch.nn.Module) -> TokenWeights | None:
        """How much each token of a layer's inputs counts; None where all count alike."""
        return None

    @property
    def pruning_pass(self) -> "PruningPass":
        """The pass that the modifier's step is part of, once it has been initialized."""
        assert self._pass is not None
        return self._pass

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        super().on_initialize(state, **kwargs)
        self.refuse_unreached()
        self._pass = self._shared_pass() or PruningPass(self, self._dataloader)
        self._pass.add(self)
        self.requires_calibration_data = self._pass.leader is self and self._dataloader is not None
        return True

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        if self.pruning_pass.leader is self:
            self.pruning_pass.start(state.model)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        if self.pruning_pass.leader is self:
            self.pruning_pass.prune(modules)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        self.stop_watching()
        for record in self.step.records:
            processes.merge(record, self.layers.values())

    def unseen(self) -> list[str]:
        return self.pruning_pass.unseen

    def require_pruned_layers(self, done: Collection[str]) -> None:
        """Raise ValueError if the modifier's step has found no pruned layer; `done` are the layers it worked on."""
        if not done:
            raise ValueError(
                f"{type(self).__name__} found no pruned layer among its targets: its targets and ignore must match "
                "those of the modifier that prunes, and the model must be dense when the recipe starts"
            )

    def stop_watching(self) -> None:
        if self._pass is not None and self._pass.leader is self:
            self._pass.stop()

    def _shared_pass(self) -> "PruningPass | None":
        """The pass of the modifiers before this one that it can join."""
        if isinstance(self.step, Mask):
            return None
        before = order.modifiers_before(self)
        pruning = [modifier for modifier in before if order.role_of(modifier) == "prunes"]
        if len(pruning) == 1 and isinstance(pruning[0], PruningModifier):
            return pruning[0].pruning_pass
        later = before[before.index(pruning[-1]) + 1 :]
        return next((modifier.pruning_pass for modifier in later if isinstance(modifier, PruningModifier)), None)


class PruningPass:
    """Prunes the model while it is calibrated, each block before the next is calibrated.

    Where layers are calibrated together, on the dense block, their statistics are gathered while the pipeline runs the
    block. Where they are calibrated in turn or beside the dense model, one hook a block captures its inputs instead,
    and the block is run on them when its calibration has ended.

    A run with a journal keeps each part of the model when it is pruned. In a run that goes on, those that are there
    take their weights from it and are not calibrated; only the dense model's stream runs through them.

    Args:
        leader: the modifier whose hooks these are and whose calibration epoch this is.
        dataloader: what the epoch iterates; None where nothing is calibrated, and all layers are pruned at once.
    """

    def __init__(self, leader: PruningModifier, dataloader: Any) -> None:
        self.leader = leader
        self._dataloader = dataloader
        self._modifiers: list[PruningModifier] = []
        self._observer: Observer | None = None
        self._blocks: dict[torch.nn.Module, list[torch.nn.Module]] = {}  # in order, with their layers
        self._captured: dict[torch.nn.Module, list[Batch]] = {}
        self._dense_stream: list[torch.Tensor | None] = []  # by batch, what the dense model feeds the next block
        self._remembered: dict[torch.nn.Module, torch.Tensor] = {}  # dense weights of layers that others prune
        self._left: dict[torch.nn.Module, str] = {}
        self._number = len(order.modifiers_before(leader))
        self._parts = 0  # that the pipeline has ended

    @property
    def starts_dense(self) -> bool:
        """Whether the pass's first step makes the masks, so that layers are dense when they are calibrated."""
        return isinstance(self.leader.step, Mask)

    @property
    def unseen(self) -> list[str]:
        """The names of the layers that no calibration has reached."""
        return list(self._left.values())

    def add(self, modifier: PruningModifier) -> None:
        """Add a modifier's step after those that are there. It works on layers of the leader's only."""
        self._modifiers.append(modifier)
        if modifier is self.leader:
            self._left = dict(modifier.layers)
        elif not self.starts_dense:
            self._left |= modifier.layers
        if not self.starts_dense:
            for module in modifier.layers:
                self.leader.register_hook(module, self._remember, "forward_pre")  # type: ignore[arg-type]

    def start(self, model: torch.nn.Module) -> None:
        """Watch the model: blocks that will be run again, and the layers outside of them."""
        calibration = self.calibration
        done = self._done()
        watched = {module: name for module, name in self._left.items() if name not in done}
        if calibration.runs_blocks:
            self._find_blocks(model, calibration)
            for layers in self._blocks.values():
                for module in layers:
                    watched.pop(module, None)
        self._observer = Observer(self.leader, model, self._dataloader, {m: self.wanted(m) for m in watched})
        for block, layers in self._blocks.items():
            if calibration.cross or any(self._left[module] not in done for module in layers):
                self._observer.watch_block(block, self._capture, "forward_pre")

    def prune(self, modules: list[torch.nn.Module]) -> None:
        """Prune the layers whose calibration has just ended, or take them from the run's journal."""
        kept, key = journal.active(), f"{self._number:02}-part{self._parts:04}"
        self._parts += 1
        entry = None if kept is None else kept.read(key)
        if entry is not None:
            self._take(entry)
            return
        before = dict(self._left)
        self._prune(modules)
        ended = {name: module for module, name in before.items() if module not in self._left}
        if kept is not None and ended:
            kept.write(key, self._entry(ended))

    def _done(self) -> set[str]:
        """The names of the layers that the run's journal has."""
        kept = journal.active()
        entries = [] if kept is None else kept.read_all(f"{self._number:02}-part")
        return {name for entry in entries for name in entry["layers"]}

    def _entry(self, ended: dict[str, torch.nn.Module]) -> dict[str, Any]:
        """What the journal keeps of a part: weights and masks, and what the steps have noted of its layers."""
        layers, notes = {}, []
        for name, module in ended.items():
            bits = getattr(module, RECORDED, None)
            with torch.no_grad(), align_module_device(module):
                weight = None if bits is None else cast(torch.Tensor, module.weight).detach().to("cpu", copy=True)
            layers[name] = (weight, bits)
        for modifier in self._modifiers:
            for record in modifier.step.records:
                processes.merge(record, modifier.layers.values())
                notes.append({name: record[name] for name in ended if name in record})
        return {"layers": layers, "notes": notes, "by": self._in_full()}

    def _in_full(self) -> str:
        """What the modifiers prune by, what other modifiers have found for them included."""
        state = set(Modifier.model_fields)
        return json.dumps({type(m).__name__: m.model_dump(exclude=state) for m in self._modifiers}, sort_keys=True)

    def _take(self, entry: dict[str, Any]) -> None:
        """Put a part into the model as the journal has it.

        Raises ValueError if it was pruned by other coefficients or sparsities than this run has found.
        """
        if entry.get("by") != self._in_full():
            kept = journal.active()
            raise ValueError(
                f"{kept.folder if kept else 'the journal'} holds finished blocks that were pruned by "
                f"{entry.get('by')}, and this run prunes by {self._in_full()}: a study or a record has changed since. "
                "Restore it, or remove the folder to start anew"
            )
        for block, batches in self._captured.items():
            self._run_dense(block, batches)
        self._captured.clear()
        modules = {name: module for module, name in self._left.items()}
        for name, (weight, bits) in entry["layers"].items():
            module = modules[name]
            if bits is not None:
                setattr(module, RECORDED, bits.clone())
                with torch.no_grad(), align_module_device(module):
                    processes.write_parameter(module, "weight", weight)
            self._remembered.pop(module, None)
            self._left.pop(module)
        records = [record for modifier in self._modifiers for record in modifier.step.records]
        for record, notes in zip(records, entry["notes"], strict=True):
            record.update(notes)

    def _prune(self, modules: list[torch.nn.Module]) -> None:
        assert self._observer is not None
        owners = shared_out(self._observer.ending(modules))
        uncalibrated = None if self._dataloader is None else self.leader.uncalibrated
        for module, name, statistics in self._observer.ended(modules, uncalibrated):
            if owners[module] == processes.rank():
                dense = weight_matrix(module).detach()
                self._prune_layer(Layer(name, module, dense, statistics, dense))
            self._remembered.pop(module, None)
            self._left.pop(module, None)
        for module, owner in owners.items():
            share_layer(module, owner)
        in_blocks = {module for layers in self._blocks.values() for module in layers}
        for module in modules:
            if module not in in_blocks:
                self._left.pop(module, None)
        for block, layers in self._blocks.items():
            if block in self._captured:
                self._prune_block(block, layers)
            elif any(module in self._left for module in set(layers).intersection(modules)):
                raise ValueError(
                    "true_sequential and asymmetric_calibration run whole decoder blocks, and these are calibrated in "
                    "parts: leave out sequential_targets, or set `true_sequential: false` and "
                    "`asymmetric_calibration: 0`"
                )

    def run_steps(self, layer: Layer) -> None:
        """Run the steps of the modifiers that work on a layer; the module keeps its weight."""
        for modifier in self._modifiers:
            if layer.module in modifier.layers and (layer.keep is None or layer.is_pruned):
                modifier.step(layer)

    def described(self) -> dict[str, Any]:
        """The modifiers after the first by name, with the fields that the recipe gives them."""
        return {type(m).__name__: m.model_dump(include=m.model_fields_set) for m in self._modifiers[1:]}

    def forget(self) -> None:
        """Empty what the steps have recorded of layers, before they are run on the same layers again."""
        for modifier in self._modifiers:
            for record in modifier.step.records:
                record.clear()

    def stop(self) -> None:
        """Remove all hooks. Idempotent."""
        if self._observer is not None:
            self._observer.stop()

    @property
    def calibration(self) -> Calibration:
        """How the layers are calibrated, by what any of the modifiers wants."""
        wanted = [modifier.calibration for modifier in self._modifiers]
        return Calibration(any(each.in_turn for each in wanted), any(each.cross for each in wanted))

    def _find_blocks(self, model: torch.nn.Module, calibration: Calibration) -> None:
        """The blocks with layers to prune and, for the dense stream, those between them."""
        try:
            blocks = list(find_blocks(model).values())
        except ValueError as error:
            raise ValueError(
                "asymmetric_calibration and true_sequential run the model block by block, and "
                f"{error}: set `asymmetric_calibration: 0` and `true_sequential: false`"
            ) from error
        inside = {block: [module for module in block.modules() if module in self._left] for block in blocks}
        places = [place for place, block in enumerate(blocks) if inside[block]]
        between = blocks[places[0] : places[-1] + 1] if places and calibration.cross else blocks
        self._blocks = {block: inside[block] for block in between if inside[block] or calibration.cross}

    def wanted(self, module: torch.nn.Module) -> Wanted:
        """What is gathered for a layer. At most one modifier refits, as each starts from the dense weights."""
        fitting = [m for m in self._modifiers if m.step.needs_gram and module in m.layers]
        return Wanted(self._left[module], bool(fitting), fitting[0].token_weights(module) if fitting else None)

    def _capture(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._observer is not None
        batches = self._captured.setdefault(block, [])
        batch = Batch.of(args, kwargs, self._observer.batch_mask())
        batches.append(batch.sharing_with(batches[-1]) if batches else batch)

    def _prune_block(self, block: torch.nn.Module, layers: list[torch.nn.Module]) -> None:
        assert self._observer is not None
        # What several blocks share is pruned with the first of them.
        layers = [module for module in layers if module in self._left]
        wanted = {module: self._observer.counting(module, self.wanted(module)) for module in layers}
        self._run_dense(block, self._captured.pop(block), wanted)
        for module in layers:
            self._left.pop(module, None)

    def _run_dense(
        self, block: torch.nn.Module, batches: list[Batch], wanted: dict[torch.nn.Module, Wanted] | None = None
    ) -> None:
        """Run the dense stream through a block that is dense, and prune the layers in it that are wanted."""
        for batch, dense in zip(batches, self._dense_stream, strict=False):
            batch.dense = dense
        self._dense_stream = []  # so that what the block makes of it takes its place, batch by batch
        with HooksMixin.disable_hooks():
            prune_block(block, batches, wanted or {}, self.calibration, self._prune_if_usable)
        self._dense_stream = [batch.dense for batch in batches]

    def _prune_if_usable(self, layer: Layer) -> None:
        with torch.no_grad(), align_module_device(layer.module):
            if is_usable(layer.name, layer.module, layer.statistics, self.leader.uncalibrated):
                self._prune_layer(layer)

    def _prune_layer(self, layer: Layer) -> None:
        """Run the steps on a layer, and put what they make of it into its module."""
        if not self.starts_dense and not self._restore(layer):
            return
        self.run_steps(layer)
        set_weight_matrix(layer.module, layer.weight)
        assert layer.keep is not None
        record_mask(layer.module, layer.keep)

    def _restore(self, layer: Layer) -> bool:
        """Give a layer that another modifier has pruned its dense weight and its mask; False if none has pruned it."""
        dense = self._remembered.pop(layer.module, None)
        if dense is None:
            return False
        layer.dense = dense.to(layer.weight.device)
        layer.keep = mask_of(layer.module)
        return layer.is_pruned

    def _remember(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Keep a layer's dense weight as it is when the calibration of the modifier that prunes it begins.

        In an earlier epoch the layer may still change, to one with the same outputs for other inputs.
        """
        if module in self._remembered or module not in self._left:
            return
        at_work = active_session().lifecycle.recipe.modifiers
        if any(order.role_of(modifier) == "prunes" for modifier in at_work):
            with torch.no_grad(), align_module_device(module):
                self._remembered[module] = weight_matrix(module).detach().to("cpu", copy=True)
