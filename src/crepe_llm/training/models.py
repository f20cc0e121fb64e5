"""The two models of a distillation, the pruned one and the dense one: how they are read, and what is refused."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from crepe_llm.checkpoints.reading import CONFIG, find_quantization, objects_in, read_config
from crepe_llm.checkpoints.sparse_config import SPARSITY
from crepe_llm.models.blocks import find_blocks
from crepe_llm.models.classes import auto_class
from crepe_llm.models.generation import repair_generation_config
from crepe_llm.models.linear import is_linear
from crepe_llm.training.masked import find_masks, sparse_layer

__all__ = [
    "linear_layers",
    "load_dense",
    "load_pruned",
    "masks_of",
    "not_finite",
    "parameter_name",
    "refuse_quantized",
    "refuse_sparse_config",
]


def load_pruned(source: Path, dtype: torch.dtype | str, trust_remote_code: bool = False) -> Any:
    """A pruned model as an ordinary one with its zeros in place; packed layers have their masks recorded.

    Raises ValueError if a weight is NaN or infinite.
    """
    model = _load(source, dtype, trust_remote_code)
    repair_generation_config(model)  # or transformers would refuse to save it after the training
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    _refuse_not_finite(model, source)
    return model


def load_dense(teacher: str | Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A teacher; raises ValueError if it is sparse, or a weight of it NaN or infinite."""
    model = _load(teacher, dtype, trust_remote_code)
    found = sparse_layer({name: model.get_submodule(name) for name in linear_layers(model)})
    if found is not None:
        raise ValueError(_no_teacher(teacher, f"{found[1]:.0%} of {found[0]} are zeros"))
    _refuse_not_finite(model, f"teacher={teacher}")
    return model


def _load(name: str | Path, dtype: torch.dtype | str, trust: bool) -> Any:
    """A model with all its parts, of images, too."""
    kind = auto_class(AutoConfig.from_pretrained(name, trust_remote_code=trust))
    return kind.from_pretrained(name, dtype=dtype, trust_remote_code=trust)


def _is_structural(source: Path) -> bool:
    """Whether a folder's model has FFN channels removed: its config.json, or the part of its language model, holds
    CFSP's importances."""
    content = read_config(source)
    config = objects_in(content.get("text_config")) or content
    return any(field in config for field in ("block_importance", "block_intermediate_sizes"))


def masks_of(model: Any, source: Path) -> dict[str, torch.Tensor]:
    """By layer the packed masks; none for a model that is pruned by structure alone."""
    try:
        return find_masks(model)
    except ValueError as error:
        if _is_structural(source):
            return {}
        raise ValueError(f"{source} is not pruned: {error}") from None


def refuse_quantized(source: Path) -> None:
    """Raise ValueError if a folder holds no model, or one that is quantized."""
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source} is not a folder with a model: it has no {CONFIG}")
    quantization = objects_in(find_quantization(read_config(source))[1])
    if quantization.get("config_groups"):
        raise ValueError(
            f"{source} is quantized, which training would undo: recover the sparse model, then quantize it"
        )
    if objects_in(quantization.get("transform_config")).get("config_groups"):
        raise ValueError(
            f"{source} rotates its inputs while it runs, which transformers does not: recover a model without "
            "transform_config"
        )


def refuse_sparse_config(config: Any, teacher: str | Path) -> None:
    """Raise ValueError if a teacher's config says that it was pruned."""
    content = config.to_dict()
    if content.get(SPARSITY) or objects_in(find_quantization(content)[1]).get(SPARSITY):
        raise ValueError(_no_teacher(teacher, f"its {CONFIG} has a {SPARSITY}"))


def _refuse_not_finite(model: Any, name: str | Path) -> None:
    found = not_finite(model)
    if found is not None:
        raise ValueError(f"{name}: {found} holds NaN or infinity, so the checkpoint is damaged")


def not_finite(model: Any) -> str | None:
    """The first parameter that holds NaN or infinity."""
    return next((name for name, value in model.named_parameters() if not bool(value.isfinite().all())), None)


def _no_teacher(teacher: str | Path, why: str) -> str:
    return f"teacher={teacher} was pruned itself: {why}. Give the dense model that it was made from"


def linear_layers(model: Any) -> list[str]:
    """The names of the linear layers in a model's blocks."""
    return [
        f"{block}.{name}"
        for block, inside in find_blocks(model).items()
        for name, module in inside.named_modules()
        if is_linear(module)
    ]


def parameter_name(model: Any, name: str) -> str:
    """The parameter that a mask is of, whether its layer has an update of its own or not."""
    names = (f"{name}.weight", f"{name}.parametrizations.weight.original", name)
    parameters = dict(model.named_parameters())
    return next(candidate for candidate in names if candidate in parameters)
