"""vLLM's models with an FFN width per block, as CFSP's pruning leaves them: `block_intermediate_sizes` in config.json.

vLLM builds every block from one config. These subclasses of its models give each block its own width while it is being
built; everything else, tensor parallelism and quantization included, is vLLM's.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

from compressed_tensors.utils import patch_attr
from vllm.model_executor.models.utils import extract_layer_index

from crepe_llm.models import per_block
from crepe_llm.models.families import PER_BLOCK

# By vLLM's class: the module that it is in, and the one whose `make_layers` builds its blocks.
_MODELS = {classes.model: classes.vllm for classes in PER_BLOCK.values()}


def architectures() -> dict[str, str]:
    """The names that stand under `architectures` in config.json, and where vLLM finds their classes."""
    return {f"PerBlock{name}": f"{__name__}:PerBlock{name}" for name in _MODELS}


@functools.cache
def _model_class(name: str) -> Any:
    module, builder = (importlib.import_module(f"vllm.model_executor.models.{part}") for part in _MODELS[name])
    base: Any = getattr(module, name)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: N807
        make_layers = _with_widths(builder.make_layers, vllm_config.model_config.hf_config)
        with patch_attr(builder, "make_layers", make_layers):
            base.__init__(self, vllm_config=vllm_config, prefix=prefix)

    return type(f"PerBlock{name}", (base,), {"__init__": __init__, "__module__": __name__})


def _with_widths(make_layers: Callable[..., Any], config: Any) -> Callable[..., Any]:
    """vLLM's builder of a list of blocks, which sets the config's width to each block's before the block is built."""
    field = per_block.width_field(config)

    def make(count: int, layer_fn: Callable[..., Any], prefix: str) -> Any:
        widths = getattr(config, "block_intermediate_sizes", None)
        if not isinstance(widths, list) or len(widths) != count:
            raise ValueError(
                f"damaged checkpoint: config.json: block_intermediate_sizes={widths} must be a list of {count} widths, "
                "one for each block"
            )

        def build(prefix: str) -> Any:
            setattr(config, field, widths[extract_layer_index(prefix)])
            return layer_fn(prefix=prefix)

        return make_layers(count, build, prefix)

    return make


def __getattr__(name: str) -> Any:
    """The classes by name, for vLLM's registry."""
    base = name.removeprefix("PerBlock")
    if base != name and base in _MODELS:
        return _model_class(base)
    raise AttributeError(f"module {__name__} has no attribute {name}")
