"""One run of methods.py: a fresh model pruned by a recipe, and its perplexity."""

import time
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from method_recipes import MODELS, STRUCTURES
from studies import studies_folder


def by_magnitude(structure: str) -> dict[str, Any]:
    """The recipe of magnitude pruning, which needs no data and stands in no row."""
    fields = {"score": "magnitude", "comparison_group": "matrix", **STRUCTURES[structure][0]}
    return {"magnitude_stage": {"pruning_modifiers": {"CRePEModifier": fields}}}


def prune(key: dict[str, Any]) -> tuple[Any, Any, float, float]:
    """The pruned model, its tokenizer, the seconds that pruning took, and the fraction of zeros."""
    folder = MODELS[key["model"]]()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, key["dtype"]))
    reset_session()
    started = time.perf_counter()
    if key["structure"]:
        recipe, data = key.get("recipe") or by_magnitude(key["structure"]), None
        if "recipe" in key:
            data = samples.calibration_windows(
                tokenizer, samples.wikipedia().train, windows=key["windows"], length=key["length"], seed=key["seed"]
            )
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=yaml.safe_dump(recipe, sort_keys=False).replace("{studies}", str(studies_folder())),
            dataset=data,
            num_calibration_samples=key["windows"],
            shuffle_calibration_samples=False,
        )
    seconds = time.perf_counter() - started
    head = model.get_output_embeddings()
    layers = [layer.weight for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    zeros = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    if key["structure"] and abs(zeros - STRUCTURES[key["structure"]][0].get("sparsity", 0.5)) > 0.03:
        raise RuntimeError(f"{zeros:.2%} of the weights are zero after {key}")
    return model, tokenizer, seconds, zeros


def run(key: dict[str, Any]) -> dict[str, Any]:
    """Prune and measure once."""
    model, tokenizer, seconds, zeros = prune(key)
    corpus = samples.wikipedia()
    test = samples.token_windows(tokenizer, getattr(corpus, key["split"]), key["length"], tokens=key["tokens"])
    result = perplexity(model, test, corpus=corpus.name, progress=False)
    return key | {
        "perplexity": result.perplexity,
        "predicted": result.tokens,
        "seconds": round(seconds, 1),
        "zeros": round(zeros, 6),
    }
