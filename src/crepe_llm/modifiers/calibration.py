"""What modifiers that look at layers' inputs share: which layers, hooks, statistics, padding."""

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import (
    align_module_device,
    get_execution_device,
    match_named_modules,
    update_offload_parameter,
)
from llmcompressor.core import Event, State, active_session
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr
from torch.utils.hooks import RemovableHandle

from crepe_llm.checkpoints import attach
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.models.ffn import is_transposed
from crepe_llm.modifiers.block_replay import BlockReplay

__all__ = [
    "CalibratedModifier",
    "block_inputs",
    "block_outputs",
    "input_channels",
    "linear_outputs",
    "set_weight_matrix",
    "start_recording",
    "stop_recording",
    "token_mask",
    "weight_matrix",
]


def input_channels(module: torch.nn.Module) -> int:
    """The module's d_in."""
    return cast(torch.Tensor, module.weight).shape[0 if is_transposed(module) else 1]


def weight_matrix(module: torch.nn.Module) -> torch.Tensor:
    """The module's weight as [d_out, d_in], a view. Call it where offloaded weights are on the device."""
    weight = cast(torch.Tensor, module.weight)
    return weight.T if is_transposed(module) else weight


def set_weight_matrix(module: torch.nn.Module, weight: torch.Tensor) -> None:
    """Overwrite the module's weight, wherever it is kept, with one given as [d_out, d_in]."""
    update_offload_parameter(module, "weight", weight.T if is_transposed(module) else weight)


def linear_outputs(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a linear layer gives for inputs [..., d_in], its hooks not called."""
    bias = cast(torch.Tensor | None, getattr(module, "bias", None))
    return torch.nn.functional.linear(inputs.detach(), weight_matrix(module).detach(), bias)


def block_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among a decoder block's arguments."""
    return cast(torch.Tensor, args[0] if args else kwargs["hidden_states"])


def block_outputs(output: Any) -> torch.Tensor:
    """The hidden states that a decoder block returns, alone or first of several things."""
    return cast(torch.Tensor, output[0] if isinstance(output, tuple) else output)


class CalibratedModifier(Modifier):
    """Base of modifiers that gather the input statistics of linear layers and then change those layers.

    Subclasses implement :meth:`compress`, called once per layer when the layer's calibration is over: at the end
    of its block in the sequential pipeline, so that the next block sees what it became.

    :param targets: layers to work on, by class name, exact name or `re:` pattern
    :param ignore: layers to leave alone, likewise
    :param uncalibrated: what to do with a layer that no calibration token reached, such as an expert that was
        never routed to: `error` (the default), or leave it `dense`
    """

    requires_calibration_data: bool = True

    targets: list[str] = Field(default_factory=lambda: ["Linear", "Conv1D"])
    ignore: list[str] = Field(default_factory=lambda: ["re:.*lm_head"])
    uncalibrated: Literal["error", "dense"] = "error"

    _layers: dict[torch.nn.Module, str] = PrivateAttr(default_factory=dict)
    _statistics: dict[torch.nn.Module, InputStatistics] = PrivateAttr(default_factory=dict)
    _dataloader: Any = PrivateAttr(default=None)
    _followers: list["CalibratedModifier"] = PrivateAttr(default_factory=list)
    _leader: "CalibratedModifier | None" = PrivateAttr(default=None)
    _handles: dict[torch.nn.Module, RemovableHandle] = PrivateAttr(default_factory=dict)
    _replay: BlockReplay | None = PrivateAttr(default=None)

    def compress(self, name: str, module: torch.nn.Module, statistics: InputStatistics) -> None:
        """Change one layer, given the statistics of its inputs."""
        raise NotImplementedError

    def find_layers(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        """The layers to work on, with their names."""
        return {module: name for name, module in match_named_modules(model, self.targets, self.ignore)}

    def needs_gram(self, name: str) -> bool:
        """Whether the statistics of one layer's inputs include their Gram matrix."""
        return False

    def token_weights(self, module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor | None:
        """How much each token [...] of a layer's inputs [..., d_in] counts for that; None where all count alike."""
        return None

    def check_layer(self, name: str, module: torch.nn.Module) -> None:
        """Raise ValueError if the layer cannot be compressed as the fields ask; called before any calibration."""

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the layers, and refuse what cannot work before any time is spent."""
        # Not state.data.calib: that is a deep copy of the loader that the pipelines iterate.
        self._dataloader = kwargs.get("calib_data")
        if self._dataloader is None:
            raise ValueError(
                f"{type(self).__name__} needs calibration data, and oneshot was given none: pass `dataset=` "
                "(a name, or a tokenized datasets.Dataset)"
            )
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
                weight = getattr(module, "weight", None)
                if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
                    kind = type(module).__name__
                    raise ValueError(f"targets={self.targets} match {name}, a {kind}, which is no linear layer")
                if id(weight) in tables:
                    raise ValueError(
                        f"{name} shares its weight with the embedding {tables[id(weight)]}, which would change too: "
                        f"add {name} to `ignore`, or load the model with tie_word_embeddings=False"
                    )
                self.check_layer(name, module)
        return True

    def follow(self, leader: "CalibratedModifier") -> None:
        """Compress each layer right behind another modifier of the same recipe, with the statistics that one gathers.

        What follows in the model is then calibrated on what both have made of the layer, and no epoch is spent twice.
        """
        self._leader = leader
        leader._followers.append(self)
        self._layers = {module: name for module, name in self._layers.items() if module in leader._layers}
        self.requires_calibration_data = False

    def remember_dense(self, module: torch.nn.Module) -> None:
        """Called on a follower before its leader changes a layer."""

    def watch_too(self, model: torch.nn.Module) -> None:
        """Called on a follower when its leader has begun to watch; hooks that it registers are removed for it."""

    def calibrate_in_turn(self, blocks: list[torch.nn.Module]) -> None:
        """Compress each block's layers one group after the other, each calibrated on what those in front became."""
        self._replay = BlockReplay(self, self._layers, blocks)

    def is_deferred(self, layer: torch.nn.Module) -> bool:
        """Whether what the layer is given now does not count, as its block will be run again for it."""
        return self._replay is not None and self._replay.is_deferred(layer)

    def watch_again(self, layers: list[torch.nn.Module]) -> set[RemovableHandle]:
        """What these deferred layers are given is learnt by these hooks, when their block is run again."""
        return {self._handles[layer] for layer in layers if layer in self._handles}

    def on_calibration_start(self, state: State, event: Event, **kwargs: Any) -> None:
        """Watch the inputs of every layer."""
        if self._leader is not None:
            return
        start_recording(self._dataloader)
        self._handles = {
            module: self.register_hook(module, self._update, "forward_pre")  # type: ignore[arg-type]
            for module in self._layers
        }
        for follower in self._followers:
            follower.watch_too(state.model)

    def on_sequential_epoch_end(
        self, state: State, event: Event, modules: list[torch.nn.Module], **kwargs: Any
    ) -> None:
        """Compress the layers whose calibration has just ended."""
        ended = [module for module in modules if module in self._layers] if self._leader is None else []
        for layers in [ended] if self._replay is None else self._replay.steps(ended, self._all_watch_again):
            for module in layers:
                self._compress(module)

    def _all_watch_again(self, layers: list[torch.nn.Module]) -> set[RemovableHandle]:
        return {handle for modifier in (self, *self._followers) for handle in modifier.watch_again(layers)}

    def _compress(self, module: torch.nn.Module) -> None:
        name = self._layers.pop(module)
        statistics = self._statistics.pop(module, None)
        followers = [
            (follower, follower._layers.pop(module)) for follower in self._followers if module in follower._layers
        ]
        if statistics is None or statistics.tokens == 0:
            if self.uncalibrated == "dense":
                return
            raise ValueError(
                f"{name} never saw a calibration token, so its inputs are unknown: calibrate with more or other "
                "text, add it to `ignore`, or set `uncalibrated: dense` to leave such layers unpruned"
            )
        if not bool(torch.isfinite(statistics.square_sum).all()):
            channels = (~torch.isfinite(statistics.square_sum)).nonzero().flatten().tolist()
            raise ValueError(
                f"the inputs of {name} are NaN or infinite in {len(channels)} channels, first {channels[:5]}: "
                "the model overflows on this data; load it with dtype=float32 or bfloat16"
            )
        with torch.no_grad(), align_module_device(module):
            if not bool(torch.isfinite(weight_matrix(module)).all()):
                raise ValueError(f"the weight of {name} contains NaN or infinity: the checkpoint is damaged")
            for follower, _ in followers:
                follower.remember_dense(module)
            self.compress(name, module, statistics)
            for follower, name_there in followers:
                follower.compress(name_there, module, statistics)

    def on_calibration_end(self, state: State, event: Event, **kwargs: Any) -> None:
        """Stop watching."""
        self._stop_watching()

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Refuse to leave a layer out silently; make the model save what is 2:4 as such."""
        self._stop_watching()
        if self._layers:
            names = list(self._layers.values())
            raise ValueError(
                f"{len(names)} targeted layers were not part of the calibrated model, the first being {names[0]}: "
                "add them to `ignore`"
            )
        attach(state.model)
        return True

    def _stop_watching(self) -> None:
        for follower in self._followers:
            follower.remove_hooks()
        if self._hooks and self._leader is None:
            self.remove_hooks()
            stop_recording(self._dataloader)

    def _update(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if self.is_deferred(module):
            return
        inputs, name = args[0], self._layers[module]
        # At most one: each that fits outputs starts from the dense weights, so there is no second one behind it.
        fitting = next((modifier for modifier in (self, *self._followers) if modifier.needs_gram(name)), None)
        if module not in self._statistics:
            self._statistics[module] = InputStatistics(
                input_channels(module), gram=fitting is not None, device=get_execution_device(module)
            )
        weights = None if fitting is None else fitting.token_weights(module, inputs)
        self._statistics[module].update(inputs, token_mask(self._dataloader, inputs), weights)


def start_recording(dataloader: Any) -> None:
    """Have a dataloader remember every batch's attention mask in `.masks`, so that hooks can leave padding out.

    Pipelines hand hooks a layer's inputs and the index of the batch, but no mask; giving the loader a subclass of its
    own class is the one way to watch its iteration that works for any loader, also with worker processes.
    """
    if not hasattr(dataloader, "recorders"):
        original = type(dataloader)

        def iterate(self: Any) -> Iterator[Any]:
            self.masks = []
            for batch in original.__iter__(self):
                mask = batch.get("attention_mask") if hasattr(batch, "get") else None
                has_padding = mask is not None and mask.dim() == 2 and not bool(mask.all())
                self.masks.append(mask if has_padding else None)
                yield batch

        dataloader.__class__ = type(f"MaskRecording{original.__name__}", (original,), {"__iter__": iterate})
        dataloader.recorders = 0
    dataloader.recorders += 1


def token_mask(dataloader: Any, inputs: torch.Tensor) -> torch.Tensor | None:
    """The attention mask of the batch whose hidden states `inputs` [..., d_in] are; None where all tokens count."""
    mask = dataloader.masks[active_session().state.current_batch_idx]
    if mask is not None and mask.numel() != inputs.shape[:-1].numel():
        return None  # routed to an expert: the toolkit does not say which tokens these are
    return mask


def stop_recording(dataloader: Any) -> None:
    """Undo :func:`start_recording`, once for each time that it was called."""
    dataloader.recorders -= 1
    if dataloader.recorders == 0:
        dataloader.__class__ = type(dataloader).__bases__[0]
        del dataloader.recorders, dataloader.masks
