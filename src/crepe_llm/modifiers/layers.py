"""What modifiers that work on linear layers share: which these are, and what is checked before any calibration."""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_name, match_named_modules
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from loguru import logger
from pydantic import Field, PrivateAttr
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from crepe_llm.calibration.data import calibration_data, uncalled_layers
from crepe_llm.checkpoints import attach
from crepe_llm.functional.masks import parse_mask_structure
from crepe_llm.models.blocks import block_of, kind_of
from crepe_llm.models.dense_layers import dense_by_default
from crepe_llm.models.linear import is_transposed
from crepe_llm.modifiers import order
from crepe_llm.modifiers.conv1d import record_conv1d
from crepe_llm.modifiers.experts import check_experts, masks_as_stored, restore_experts, saves_whole_experts
from crepe_llm.modifiers.fields import Patterns
from crepe_llm.modifiers.observe import Observer, Uncalibrated
from crepe_llm.pruning.layer import input_channels

__all__ = ["LayerModifier", "check_groups", "save_sparse"]

# In `ignore` it stands for the output head, whatever a model calls that.
_HEAD = "re:.*lm_head"


class LayerModifier(Modifier):
    """Base of modifiers that work on the linear layers of a model.

    :param targets: layers to work on, by class name, exact name or `re:` pattern; all linear layers where left out.
        Those that only a class name matches stay dense, and the log says so, where calibration does not reach them (a
        vision tower, where all is text), and where they are output heads, routers or gates of experts, have fewer than
        8 rows or columns, or are read without being called (dt_proj, kv_b_proj)
    :param ignore: layers to leave alone, likewise; the output head where left out, however the model calls it
    :param uncalibrated: what to do with a layer that no calibration token reached, such as an expert that was never
        routed to: `error`, or leave it `dense`. Where a recipe needs no calibration data and is given none, all layers
        are worked on
    """

    # llm-compressor chooses the pipeline by it when the recipe has been read; it is no part of a saved recipe.
    requires_calibration_data: bool = Field(default=True, exclude=True)

    targets: Patterns = Field(default_factory=lambda: ["Linear", "Conv1D"])
    ignore: Patterns = Field(default_factory=lambda: [_HEAD])
    uncalibrated: Uncalibrated = "error"

    _layers: dict[torch.nn.Module, str] = PrivateAttr(default_factory=dict)
    _dataloader: Any = PrivateAttr(default=None)
    _uncalled: set[torch.nn.Module] = PrivateAttr(default_factory=set)
    _observer: Observer | None = PrivateAttr(default=None)

    @property
    def layers(self) -> Mapping[torch.nn.Module, str]:
        """The layers that the modifier works on, with their names, once it has been initialized."""
        return MappingProxyType(self._layers)

    @property
    def looks_at_layers(self) -> bool:
        """Whether the modifier looks at layers itself: the recipe's first that does checks what is checked once."""
        return True

    @property
    def uncalled(self) -> set[torch.nn.Module]:
        """The modules that calibration will not reach, once the first modifier of the recipe has its data."""
        found = order.first(self, LayerModifier)
        assert isinstance(found, LayerModifier)
        return found._uncalled

    def find_layers(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        """The layers to work on, with their names."""
        matched = dict(match_named_modules(model, self.targets, self.ignore))
        dense = self._left_dense(model, matched)
        return {module: name for name, module in matched.items() if name not in dense}

    def check_layer(self, name: str, module: torch.nn.Module) -> None:
        """Raise ValueError if the modifier cannot work on a layer as its fields ask; called before any calibration."""

    def take_data(self, state: State, **kwargs: Any) -> None:
        """Take the calibration data, and learn which layers it will not reach; called before the layers are found."""
        if self._dataloader is None:
            first = order.first(self, LayerModifier) is self
            self._dataloader = calibration_data(order.needing_data(self), state, not first, **kwargs)
            if self._dataloader is None:
                return
            if first and isinstance(state.model, PreTrainedModel):
                self._uncalled = uncalled_layers(state.model, self._dataloader)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the layers, and refuse what cannot work before any time is spent."""
        order.check(self)
        _refuse_adapters(state.model)
        _refuse_two_halves(state.model)
        self._refuse_quantized(state.model)
        self.take_data(state, **kwargs)
        self._layers = self.find_layers(state.model)
        if not self._layers:
            classes = sorted({type(m).__name__ for m in state.model.modules() if hasattr(m, "weight")})
            raise ValueError(
                f"targets={self.targets} with ignore={self.ignore} match no layer of {type(state.model).__name__}; "
                f"its modules with weights are of the classes {', '.join(classes)}"
            )
        with disable_onloading():
            tables = {id(m.weight): n for n, m in state.model.named_modules() if isinstance(m, torch.nn.Embedding)}
            for module, name in self._layers.items():
                self._check_weight(name, module, tables)
                self.check_layer(name, module)
        if not any(isinstance(m, LayerModifier) and m.looks_at_layers for m in order.modifiers_before(self)):
            check_experts(state.model, [m for m in order.modifiers_after(self) if order.role_of(m) == "quantizes"])
            self._say_what_stays_dense(state.model)
            self._say_what_no_layer_holds(state.model)
            for modifier in (*order.modifiers_before(self), self, *order.modifiers_after(self)):
                _say_what_matches_nothing(modifier, state.model)
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Refuse to leave a layer out silently; make the model save what is 2:4 as such."""
        self.stop_watching()
        unseen = self.unseen()
        if unseen:
            raise ValueError(
                f"{len(unseen)} targeted layers were not part of the calibrated model, the first being {unseen[0]}: "
                'add them to `ignore`, or give oneshot pipeline="basic", which runs the model as a whole'
            )
        save_sparse(state.model)
        return True

    def refuse_unreached(self) -> None:
        """Raise ValueError if a target names a layer that the calibration data does not reach."""
        names = [name for module, name in self._layers.items() if module in self.uncalled]
        if names and self.uncalibrated == "error":
            raise ValueError(
                f"targets={self.targets} name {len(names)} layers that this calibration data does not reach, such as "
                f"{names[0]}: calibrate with inputs that reach them, add them to `ignore` (such as "
                f'"re:{re.escape(block_of(names[0]) or names[0])}.*"), or set `uncalibrated: dense`'
            )

    def unseen(self) -> list[str]:
        """The names of layers whose calibration has not ended when that of the model has."""
        return list(self._layers.values()) if self._observer is None else self._observer.unseen

    def stop_watching(self) -> None:
        """Remove all hooks. Idempotent."""
        if self._observer is not None:
            self._observer.stop()

    def _left_dense(self, model: torch.nn.Module, matched: Mapping[str, torch.nn.Module]) -> dict[str, str]:
        """Of the matched layers those that stay dense, with what they are; not those that a target names."""
        found = {
            name: module
            for name, module in matched.items()
            if hasattr(module, "weight") and not any(match_name(name, target) for target in self.targets)
        }
        with disable_onloading():
            dense = dense_by_default(found, (name for name, _ in model.named_modules()))
        unreached = "layers that this calibration data does not reach"
        heads = _heads_of(model) if _HEAD in self.ignore else []
        return (
            {name: unreached for name, module in found.items() if module in self.uncalled}
            | dense
            | {name: "output heads" for name, module in found.items() if any(module is head for head in heads)}
        )

    def _refuse_quantized(self, model: torch.nn.Module) -> None:
        with disable_onloading():
            for name, module in match_named_modules(model, self.targets, self.ignore):
                dtype = getattr(getattr(module, "weight", None), "dtype", torch.float32)
                if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                    raise ValueError(
                        f"the weight of {name} is {str(dtype).removeprefix('torch.')}: the model is quantized, and "
                        "pruning starts from full precision: load the model that it was made from"
                    )

    def _check_weight(self, name: str, module: torch.nn.Module, tables: Mapping[int, str]) -> None:
        weight, kind = getattr(module, "weight", None), type(module).__name__
        cure = 'target linear layers alone, such as "re:.*mlp.*_proj", or add what else is matched to `ignore`'
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            raise ValueError(f"targets={self.targets} match {name}, a {kind}, which is not a linear layer: {cure}")
        if isinstance(module, torch.nn.Embedding):
            raise ValueError(f"targets={self.targets} match {name}, an embedding, which is not a linear layer: {cure}")
        if id(weight) in tables:
            raise ValueError(
                f"{name} shares its weight with the embedding {tables[id(weight)]}, which would change too: "
                f"add {name} to `ignore`, or load the model with tie_word_embeddings=False"
            )

    def _say_what_no_layer_holds(self, model: torch.nn.Module) -> None:
        """Name matrices that are no layer's weight, such as those of experts in a form that nothing takes apart."""
        others = (torch.nn.Linear, Conv1D, torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
        with disable_onloading():
            sizes = {
                f"{name}.{own}": parameter.numel()
                for name, module in model.named_modules()
                if not isinstance(module, others) and module not in self._layers
                for own, parameter in module.named_parameters(recurse=False)
                if parameter.dim() > 1 and not re.search(r"router|gate(\.|$)|embed", f"{name}.{own}")
            }
            share = sum(sizes.values()) / sum(parameter.numel() for parameter in model.parameters())
        if share > 0.01:
            kinds = ", ".join(f"{count} x {kind}" for kind, count in Counter(map(kind_of, sizes)).items())
            logger.warning(f"{share:.0%} of the model's weights are not pruned, as no linear layer holds them: {kinds}")

    def _say_what_stays_dense(self, model: torch.nn.Module) -> None:
        dense = self._left_dense(model, dict(match_named_modules(model, self.targets, self.ignore)))
        for what in dict.fromkeys(dense.values()):
            kinds = Counter(kind_of(name) for name, found in dense.items() if found == what)
            listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
            logger.warning(f"{what} stay dense: {listed}. To prune them, name them in `targets`")
        for what, names in (
            ("Conv1D layers", [name for module, name in self._layers.items() if is_transposed(module)]),
            ("output heads", [name for module, name in self._layers.items() if module is _head_of(model)]),
            (
                "layers of float64",
                [name for module, name in self._layers.items() if module.weight.dtype == torch.float64],
            ),
            (
                "layers of experts",
                [name for name in self._layers.values() if ".experts." in name and saves_whole_experts(model)],
            ),
        ):
            if names:
                logger.warning(
                    f"{len(names)} {what} such as {names[0]} are pruned along their input channels and saved dense, as "
                    "no sparse format holds them: they will be no smaller and no faster"
                )


def _say_what_matches_nothing(modifier: Modifier, model: torch.nn.Module) -> None:
    """Name the patterns that a recipe gives a modifier and that match no module; other models may have the heads and
    routers that are named.

    Where all targets match nothing, llm-compressor's own modifiers do nothing at all, and say nothing.
    """
    for field in ("targets", "ignore"):
        given = getattr(modifier, field, None) if field in modifier.model_fields_set else None
        for pattern in [given] if isinstance(given, str) else given or []:
            of_others = "head" in pattern or "router" in pattern
            if of_others or next(iter(match_named_modules(model, [pattern])), None) is not None:
                continue
            logger.warning(
                f"{type(modifier).__name__}: {field} has {pattern!r}, which matches no module of "
                f"{type(model).__name__}: look at its spelling, or leave it out"
            )


def _refuse_two_halves(model: torch.nn.Module) -> None:
    """Raise ValueError if a model has weights of both 16-bit floats, which readers of packed checkpoints take for a
    damaged label."""
    with disable_onloading():
        names = {parameter.dtype: name for name, parameter in model.named_parameters()}
    if {torch.float16, torch.bfloat16} <= names.keys():
        raise ValueError(
            f"{names[torch.float16]} is float16 and {names[torch.bfloat16]} is bfloat16: a packed checkpoint has one "
            "of the two; cast the model first, such as by model.to(torch.bfloat16)"
        )


def _head_of(model: torch.nn.Module) -> torch.nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def _heads_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The output head; of a model that has none for tokens, such as a classifier, all layers that follow its body."""
    head, body = _head_of(model), getattr(model, "base_model", model)
    if head is not None or body is model:
        return [] if head is None else [head]
    within = {id(module) for module in body.modules()}
    return [module for module in model.modules() if id(module) not in within]


def _refuse_adapters(model: torch.nn.Module) -> None:
    """Raise ValueError if layers are wrapped by adapters: pruned apart, the two would not be what is merged later."""
    wrapped = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if wrapped:
        raise ValueError(
            f"{len(wrapped)} layers such as {wrapped[0]} are wrapped by an adapter (PEFT): merge it into the model "
            "(merge_and_unload), and prune what that returns"
        )


def save_sparse(model: Any, finish: Callable[[Path], None] | None = None) -> None:
    """Make a model save its 2:4 layers as such, by the recorded masks, and its experts as they are loaded.

    `finish` is called on the folder when all else is in it.
    """
    restore_experts(model)
    # Bound, so that a second call gives the same callable again.
    attach(model, masks=MethodType(masks_as_stored, model), finish=MethodType(record_conv1d, model))
    attach(model, finish=finish)


def check_groups(name: str, module: torch.nn.Module, mask_structure: str) -> None:
    """Raise ValueError if a layer's inputs cannot be cut into the groups of an N:M structure."""
    structure, channels = parse_mask_structure(mask_structure), input_channels(module)
    if structure is not None and channels % structure[1]:
        raise ValueError(
            f'{name} has {channels} input channels, which mask_structure="{mask_structure}" cannot cut into groups of '
            f"{structure[1]}: add the layer to `ignore`"
        )
