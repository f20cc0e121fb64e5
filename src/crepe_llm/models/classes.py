"""Models loaded whole: with all their parts, and no weight that the checkpoint does not hold; and tokenizers."""

import logging
from pathlib import Path
from typing import Any

__all__ = ["auto_class", "load_tokenizer", "load_whole", "load_within", "sizes_of", "without_weights"]

_logger = logging.getLogger(__name__)


def load_whole(name: str, config: Any, **options: Any) -> Any:
    """Load a causal language model by transformers' class for all of it.

    What the checkpoint holds beyond the model is left out, with a warning.

    Args:
        name: a folder or an id.
        config: transformers' config of the model.
        options: of `from_pretrained`.

    Raises:
        ValueError: the checkpoint lacks weights, which transformers would make up, or as :func:`auto_class`.
    """
    loaded: Any = auto_class(config).from_pretrained(name, config=config, output_loading_info=True, **options)
    model, found = loaded
    missing, unknown = (sorted(found[kind]) for kind in ("missing_keys", "unexpected_keys"))
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise ValueError(
            f"the weights of {name} lack {missing[0]}{more}, which would get random values: fetch or export the model "
            "again"
        )
    if unknown:
        _logger.warning(
            f"{name} holds {len(unknown)} tensors that {type(model).__name__} has no place for, such as {unknown[0]}: "
            "they are left out, and out of what is made of this model, too"
        )
    return model


def load_within(name: str, config: Any, memory: int, folder: Path, **options: Any) -> Any:
    """:func:`load_whole` for llm-compressor, with so many bytes of weights in memory: the others stay on the disk.

    They are read whenever they are needed. Those that change are written to `folder`, which exists and has to stay as
    long as the model does. Several processes share what one of them loads, in memory and on the disk.

    Args:
        name, config, options: of :func:`load_whole`.
        memory: bytes of weights that are held on the CPU.
        folder: for the weights that change, and links to the others.
    """
    from compressed_tensors.offload.convert import from_accelerate

    from crepe_llm import processes

    limits: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": str(folder)}
    if not processes.is_first():
        limits = {"device_map": "meta"}
    model = load_whole(name, config, offload_buffers=True, **limits, **options)
    from_accelerate(model)
    _take_apart(model, folder)
    return model


def _take_apart(model: Any, folder: Path) -> None:
    """Let tied weights that are on the disk be two of the same values.

    llm-compressor takes an embedding and a head apart to quantize them, and deletes the file of both with the first.
    """
    import torch
    from compressed_tensors.offload.cache import DiskCache

    from crepe_llm import processes

    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module._parameters, DiskCache):
            continue
        waiting = module._parameters.offloaded_values
        for name, weight in waiting.items():
            if weight is not None and id(weight) in seen:
                waiting[name] = own = torch.nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)
                if processes.is_first():
                    DiskCache.create_checkpoint_symlink(own, DiskCache.index[weight], folder)
                DiskCache.index[own] = processes.from_first(DiskCache.index.get(own))
            seen.add(id(waiting[name]))


def sizes_of(config: Any, dtype: Any, **options: Any) -> tuple[int, int]:
    """The bytes of a model's weights, and the inputs of its widest linear layer; nothing of it is loaded.

    Args:
        config: transformers' config of the model.
        dtype: of the weights, a torch dtype; None for the config's, or fp32.
        options: of `from_config`.
    """
    import torch

    model = without_weights(config, dtype=dtype or config.dtype or torch.float32, **options)
    widths = [module.in_features for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return model.get_memory_footprint(return_buffers=False), max(widths, default=0)


def without_weights(config: Any, **options: Any) -> Any:
    """A model whose tensors have shapes and no values.

    Args:
        config: transformers' config of the model.
        options: of `from_config`.
    """
    import torch

    with torch.device("meta"):
        return auto_class(config).from_config(config, **options)


def load_tokenizer(name: str | Path, **options: Any) -> Any:
    """A model's tokenizer.

    Args:
        name: a folder or an id.
        options: of `from_pretrained`.

    Raises:
        ValueError: transformers can load none, or code that comes with it is not trusted.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{name} has no tokenizer that transformers can load ({why}): put the files of its base model's tokenizer "
            "into the folder (tokenizer.json, tokenizer_config.json)"
        ) from error


def auto_class(config: Any) -> Any:
    """The auto class that loads a causal language model with all its parts, a vision or audio tower included.

    AutoModelForCausalLM knows no class for many models of images and text, and takes only a part of others, such as the
    language model of a Llama 4.

    Args:
        config: transformers' config of the model.

    Raises:
        ValueError: the model has an encoder beside its decoder, or transformers has no causal language model of its
            type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    if getattr(config, "auto_map", None):  # code of its own
        return AutoModelForCausalLM
    named = set(getattr(config, "architectures", None) or ())
    known = {kind: _class_names(kind, config) for kind in (AutoModelForCausalLM, AutoModelForMultimodalLM)}
    if getattr(config, "is_encoder_decoder", False) and not named & known[AutoModelForCausalLM]:
        raise ValueError(
            f"a model of type {config.model_type} has an encoder and a decoder, which a text alone does not run: in "
            f"Python, load it with its own class{', ' + min(named) if named else ''}, and give that to "
            "llmcompressor.oneshot with data and a data_collator that give `decoder_input_ids`, too"
        )
    for kind, names in known.items():
        if named & names:
            return kind
    for kind, names in known.items():
        if names:
            return kind
    raise ValueError(
        f"transformers has no causal language model of type {config.model_type} ({type(config).__name__}): give a "
        "model that predicts the next token"
    )


def _class_names(kind: Any, config: Any) -> set[str]:
    """The names of the classes that an auto class has for a config."""
    found = kind._model_mapping.get(type(config), ())
    return {each.__name__ for each in (found if isinstance(found, tuple) else (found,))}
