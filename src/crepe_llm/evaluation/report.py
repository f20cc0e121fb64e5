"""What a pruned model's folder is like beside its dense model: zeros, output errors, perplexity, size, completions."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crepe_llm.evaluation.model_card import LayerZeros, linear_zeros
from crepe_llm.evaluation.perplexity import Perplexity, perplexity
from crepe_llm.model_files import RECOVERY
from crepe_llm.models.blocks import block_of
from crepe_llm.models.losses import longest_sequence

__all__ = ["Curve", "Measured", "Report", "blocks_of", "gram_errors", "measure", "output_grams", "read_curve"]

PROMPTS = (
    "The three most important things to know about the Moon are",
    "Once upon a time there was a lighthouse keeper who",
    "Water boils at a lower temperature on a mountain because",
)
_COMPLETION = 32  # tokens
_GRAM_TOKENS = 256  # whose outputs are compared


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured of one model.

    Attributes:
        name: of the model, as the user gave it.
        zeros: of its linear layers.
        perplexity: with its conditions.
        grams: by layer the inner products of its outputs for the first tokens of the text, [tokens, tokens].
        completions: what it says after each of `PROMPTS`, greedily.
        bytes: of its weights' files; None where they are no safetensors in a folder.
    """

    name: str
    zeros: list[LayerZeros]
    perplexity: Perplexity
    grams: dict[str, torch.Tensor]
    completions: list[str]
    bytes: int | None


@dataclasses.dataclass(frozen=True)
class Curve:
    """The losses of a recovery.

    Attributes:
        losses: of each step.
        held_out: step and held-out loss of each evaluation.
        tokens: that were trained on.
        seconds: that it took.
    """

    losses: list[float]
    held_out: list[tuple[int, float]]
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Report:
    """A pruned model beside its dense one, and how it was trained, where it was."""

    pruned: Measured
    dense: Measured | None
    curve: Curve | None


def measure(name: str, model: Any, tokenizer: Any, windows: torch.Tensor, corpus: str, size: int | None) -> Measured:
    """Measure a transformers causal language model.

    Args:
        name: as it is to be called.
        model: the model.
        tokenizer: its tokenizer, which completes `PROMPTS`.
        windows: token ids, int64 [windows, window], of the test text.
        corpus: what that text is.
        size: bytes of the weights' files, or None.

    Raises:
        ValueError: as :func:`crepe_llm.evaluation.perplexity.perplexity`.
    """
    result = perplexity(model, windows, corpus=corpus)  # first: a quantized model has its weights after a forward pass
    return Measured(
        name,
        linear_zeros(model),
        result,
        output_grams(model, windows[:1, :_GRAM_TOKENS]),
        [_complete(model, tokenizer, prompt) for prompt in PROMPTS],
        size,
    )


@torch.no_grad()
def output_grams(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Y Y^T of every linear layer's outputs Y [tokens, d_out] in a forward pass, fp32 [tokens, tokens], by layer.

    Args:
        model: a transformers causal language model.
        ids: int64 [1, tokens].
    """
    grams: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
            flat = output.detach().flatten(0, -2).float()
            grams[name] = (flat @ flat.T).cpu()

        return keep

    layers = {layer.name for layer in linear_zeros(model)}
    hooks = [module.register_forward_hook(keeper(name)) for name, module in model.named_modules() if name in layers]
    try:
        model(ids.to(model.get_input_embeddings().weight.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gram for name, gram in grams.items() if gram.shape == (ids.numel(), ids.numel())}


def gram_errors(dense: dict[str, torch.Tensor], pruned: dict[str, torch.Tensor]) -> dict[str, float]:
    """By layer ||P P^T - D D^T|| / ||D D^T||, the error of a pruned layer's outputs P beside the dense D (our measure).

    Inner products of outputs between tokens do not change where channels change places, and have the same shape where
    channels were cut. Layers that one of the models lacks are left out, and so are outputs that are zero.
    """
    errors = {}
    for name in dense.keys() & pruned.keys():
        norm = dense[name].norm().item()
        if norm:
            errors[name] = (pruned[name] - dense[name]).norm().item() / norm
    return {name: errors[name] for name in dense if name in errors}


def blocks_of(layers: Sequence[LayerZeros]) -> dict[str, tuple[int, int]]:
    """By decoder block, in order, how many weights its linear layers hold and how many of them are not zero."""
    blocks: dict[str, tuple[int, int]] = {}
    for layer in layers:
        block = block_of(layer.name)
        if not block:
            continue
        numel = layer.shape[0] * layer.shape[1]
        held, kept = blocks.get(block, (0, 0))
        blocks[block] = (held + numel, kept + round(numel * (1 - layer.zeros)))
    return blocks


def read_curve(folder: Path) -> Curve | None:
    """The losses that `crepe recover` left in a model's folder; None where it did not.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / RECOVERY
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        held_out = [(int(step), float(loss)) for step, loss in content["held_out"]]
        losses = [float(loss) for loss in content["losses"]]
        return Curve(losses, held_out, int(content["tokens"]), float(content["seconds"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): remove it, or recover the model again") from error


@torch.no_grad()
def _complete(model: Any, tokenizer: Any, prompt: str) -> str:
    from transformers import GenerationConfig

    inputs = tokenizer(prompt, return_tensors="pt").to(model.get_input_embeddings().weight.device)
    known = {name: value for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    context = longest_sequence(model.config, model) or _COMPLETION * 8
    length = known["input_ids"].shape[1]
    if length >= context:
        return ""
    settings = model.generation_config
    # In their place, as options of `generate` leave beams and penalties of the model's own settings as they are.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=min(_COMPLETION, context - length),
        eos_token_id=settings.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )
    try:
        ids = model.generate(**known, generation_config=model.generation_config)
    finally:
        model.generation_config = settings
    return str(tokenizer.decode(ids[0, length:], skip_special_tokens=True))
