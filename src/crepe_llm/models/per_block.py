"""transformers models whose blocks have FFNs of different widths: their configs, classes and registration.

Such a checkpoint has `block_intermediate_sizes`, one width a block, in its config.json, and a model type of its own.
transformers and vLLM without this package refuse that type by name, and the name says what to install.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from crepe_llm.models.families import PER_BLOCK
from crepe_llm.models.ffn import cut, find_ffns

__all__ = ["check_family", "convert", "register", "set_width", "width_field", "write_config"]

_PREFIX = "PerBlock"
_WIDTH_FIELDS = ("ffn_dim", "n_inner", "ffn_hidden_size", "intermediate_size")
_WRITTEN = ("model_type", "architectures", "block_intermediate_sizes", "block_importance")


def register() -> None:
    """Make transformers load checkpoints with per-block FFN widths. Idempotent."""
    for family in PER_BLOCK:
        AutoConfig.register(_model_type(family), _deferred_config_class(family), exist_ok=True)


def width_field(config: Any) -> str:
    """The name of the field in which a config keeps its FFNs' width.

    Raises:
        ValueError: if it has none that is known.
    """
    for field in _WIDTH_FIELDS:
        if hasattr(config, field):
            return field
    raise ValueError(f"{type(config).__name__} has no field for the width of its FFNs (known: {_WIDTH_FIELDS})")


def check_width(config: Any, width: int) -> None:
    """Raise ValueError if FFNs of one width are not those that a config tells, so that it could not tell another.

    RecurrentGemma's field is twice the width; of some models it is a stray field that their family does not read.
    """
    field = width_field(config)
    value = getattr(config, field)
    told = set(value) if isinstance(value, list | tuple) else {value}
    if not told <= {width, None}:  # None: so many times the hidden size
        raise ValueError(
            f"{field}={value} in the config of {type(config).__name__} is not the width of the model's FFNs, which is "
            f"{width}, so what would be cut could not be written there: CFSP prunes models whose config tells the width"
        )


def set_width(model: Any, width: int) -> None:
    """Record in the model's config that all its FFNs have been cut to one width."""
    config = model.config.get_text_config()
    setattr(config, width_field(config), width)


def convert(model: Any, widths: list[int]) -> None:
    """Make a model whose FFNs have been cut to `widths`, in place, one of the class that loads as such.

    Raises:
        ValueError: if the model's family has no such class; naming those that have.
    """
    config_class, model_class = _classes_of(model)
    model.__class__ = model_class
    config = model.config
    config.__class__ = config_class
    config.block_intermediate_sizes = list(widths)
    config.architectures = [model_class.__name__]
    setattr(config, width_field(config), max(widths))


def check_family(model: Any) -> None:
    """Raise ValueError if the model's family has no class with per-block widths; naming those that have."""
    _classes_of(model)


def write_config(config: Any, folder: Path) -> None:
    """Correct the config.json of a model that was cut: llm-compressor copies that of the model it started from."""
    text = config.get_text_config()
    if getattr(text, "block_importance", None) is None:
        return
    path = folder / "config.json"
    content = json.loads(path.read_text())
    described = text.to_dict()
    inner = content.get("text_config", content)
    for field in (*_WRITTEN, width_field(text)):
        if described.get(field) is not None:
            inner[field] = described[field]
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class _PerBlockConfig:
    """What the config classes share: making one tells AutoModelForCausalLM which class it belongs to."""

    def __post_init__(self, **kwargs: Any) -> None:
        from transformers import AutoModelForCausalLM

        super().__post_init__(**kwargs)  # type: ignore[misc]
        config_class = type(self)
        family = config_class.__mro__[2].model_type  # type: ignore[attr-defined]
        AutoModelForCausalLM.register(config_class, _model_class(family), exist_ok=True)


class _PerBlockModel:
    """What the model classes share: FFNs are cut to their widths as soon as they are made."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        widths = getattr(config, "block_intermediate_sizes", None)
        ffns = find_ffns(self)
        if not isinstance(widths, list) or len(widths) != len(ffns):
            raise ValueError(
                f"config.json: block_intermediate_sizes={widths} must be a list of {len(ffns)} widths, one for each "
                "block; the checkpoint is damaged"
            )
        for ffn, width in zip(ffns, widths, strict=True):
            if not isinstance(width, int) or not 0 < width <= ffn.width:
                raise ValueError(
                    f"config.json: block_intermediate_sizes gives {ffn.name} the width {width}, which is not from 1 to "
                    f"{ffn.width}; the checkpoint is damaged"
                )
            cut(ffn, torch.arange(width))


def _model_type(family: str) -> str:
    # The refusal of a transformers without this package quotes the model type.
    return f"{family} (pip install crepe-llm)"


@functools.cache
def _deferred_config_class(family: str) -> type[PreTrainedConfig]:
    """A stand-in that makes the config class when a config is read: transformers' own modules of the families cannot
    be imported yet when its registry of configs has just been."""

    def from_dict(cls: type, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return _config_class(family).from_dict(config_dict, **kwargs)

    fields = {"model_type": _model_type(family), "from_dict": classmethod(from_dict), "__module__": __name__}
    return type(f"Deferred{_PREFIX}{PER_BLOCK[family].config}", (PreTrainedConfig,), fields)


@functools.cache
def _config_class(family: str) -> type[PreTrainedConfig]:
    import transformers

    base = getattr(transformers, PER_BLOCK[family].config)
    fields = {"model_type": _model_type(family), "__module__": __name__}
    return type(_PREFIX + base.__name__, (_PerBlockConfig, base), fields)


@functools.cache
def _model_class(family: str) -> Any:
    import transformers

    base = getattr(transformers, PER_BLOCK[family].model)
    fields = {"config_class": _config_class(family), "__module__": __name__}
    return type(_PREFIX + base.__name__, (_PerBlockModel, base), fields)


def _classes_of(model: Any) -> tuple[type[PreTrainedConfig], Any]:
    for family in PER_BLOCK:
        config_class, model_class = _config_class(family), _model_class(family)
        if type(model) in (model_class, model_class.__mro__[2]) and isinstance(model.config, config_class.__mro__[2]):
            return config_class, model_class
    known = ", ".join(classes.model for classes in PER_BLOCK.values())
    raise ValueError(
        f"a {type(model).__name__} cannot be loaded again with FFNs of different widths, which exist for {known}: set "
        "`uniform: true`"
    )


def __getattr__(name: str) -> Any:
    """The classes by name, for pickle."""
    for family, bases in PER_BLOCK.items():
        if name == _PREFIX + bases.config:
            return _config_class(family)
        if name == _PREFIX + bases.model:
            return _model_class(family)
    raise AttributeError(f"module {__name__} has no attribute {name}")
