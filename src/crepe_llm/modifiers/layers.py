"""What modifiers that work on linear layers share: which these are, and what is checked before any calibration."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.utils import match_named_modules
from llmcompressor.core import State
from llmcompressor.modifiers import Modifier
from pydantic import Field, PrivateAttr

from crepe_llm.checkpoints import attach
from crepe_llm.modifiers import order
from crepe_llm.modifiers.observe import Observer, Uncalibrated
from crepe_llm.pruning.layer import recorded_masks

__all__ = ["LayerModifier", "save_sparse"]


class LayerModifier(Modifier):
    """Base of modifiers that work on the linear layers of a model.

    :param targets: layers to work on, by class name, exact name or `re:` pattern; all linear layers where left out
    :param ignore: layers to leave alone, likewise; the output head where left out
    :param uncalibrated: what to do with a layer that no calibration token reached, such as an expert that was never
        routed to: `error`, or leave it `dense`
    """

    # llm-compressor chooses the pipeline by it when the recipe has been read; it is no part of a saved recipe.
    requires_calibration_data: bool = Field(default=True, exclude=True)

    targets: list[str] = Field(default_factory=lambda: ["Linear", "Conv1D"])
    ignore: list[str] = Field(default_factory=lambda: ["re:.*lm_head"])
    uncalibrated: Uncalibrated = "error"

    _layers: dict[torch.nn.Module, str] = PrivateAttr(default_factory=dict)
    _dataloader: Any = PrivateAttr(default=None)
    _observer: Observer | None = PrivateAttr(default=None)

    @property
    def layers(self) -> Mapping[torch.nn.Module, str]:
        """The layers that the modifier works on, with their names, once it has been initialized."""
        return MappingProxyType(self._layers)

    def find_layers(self, model: torch.nn.Module) -> dict[torch.nn.Module, str]:
        """The layers to work on, with their names."""
        return {module: name for name, module in match_named_modules(model, self.targets, self.ignore)}

    def check_layer(self, name: str, module: torch.nn.Module) -> None:
        """Raise ValueError if the modifier cannot work on a layer as its fields ask; called before any calibration."""

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        """Find the layers, and refuse what cannot work before any time is spent."""
        order.check(self)
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

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        """Refuse to leave a layer out silently; make the model save what is 2:4 as such."""
        self.stop_watching()
        unseen = self.unseen()
        if unseen:
            raise ValueError(
                f"{len(unseen)} targeted layers were not part of the calibrated model, the first being {unseen[0]}: "
                "add them to `ignore`"
            )
        save_sparse(state.model)
        return True

    def unseen(self) -> list[str]:
        """The names of layers whose calibration has not ended when that of the model has."""
        return list(self._layers.values()) if self._observer is None else self._observer.unseen

    def stop_watching(self) -> None:
        """Remove all hooks. Idempotent."""
        if self._observer is not None:
            self._observer.stop()


def save_sparse(model: Any, finish: Callable[[Path], None] | None = None) -> None:
    """Make a model save its 2:4 layers as such, by the masks that were recorded with them.

    `finish` is called on the folder when all else is in it.
    """
    # Bound, so that a second call gives the same callable again.
    attach(model, masks=MethodType(recorded_masks, model), finish=finish)
