"""Perplexity and size of 2:4 checkpoints with each quantization on top: the table of docs/results.md.

    python benchmarks/quantization.py                    # both models
    python benchmarks/quantization.py --models SmolLM2-135M-Instruct --tokens 4096

CRePE prunes each model once; every quantization then starts from that 2:4 checkpoint, read back from disk, with the
quantization of its recipe, so that all have the same mask. What is measured is the saved checkpoint, loaded again.
Every line of the table is a row of --results.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.checkpoints import attach, is_2of4, read_folder
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.recipe_files import recipe_path
from records import RESULTS, append, provenance

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1

MODELS = {"SmolLM2-135M-Instruct": samples.smollm2, "Gemma-3-270M": samples.gemma3}
QUANTIZATIONS = {
    "2:4 + FP8 (W8A8)": "crepe_2of4_fp8",
    "2:4 + INT8 (W8A8)": "crepe_2of4_int8",
    "2:4 + INT4 (W4A16), nearest": "crepe_2of4_w4a16",
    "2:4 + INT4 (W4A16), masked GPTQ": "crepe_2of4_w4a16_gptq",
}


def quantization_of(name: str) -> str:
    """A shipped recipe without its pruning, as YAML."""
    (stage,) = yaml.safe_load(recipe_path(name).read_text()).values()
    return yaml.safe_dump({"quantization_stage": {"quantization_modifiers": stage["quantization_modifiers"]}})


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all linear layers but the head, by name."""
    head = model.get_output_embeddings()
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}


def weight_bytes(folder: Path) -> int:
    """The size of a checkpoint's safetensors."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measure(folder: Path, windows: torch.Tensor, corpus: str, keep: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Load a checkpoint, check its mask, and return its perplexity and sizes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    result = perplexity(model, windows, corpus=corpus, progress=False)
    for name, weight in linear_weights(model).items() if keep else ():
        if not is_2of4(weight) or weight[~keep[name]].any():
            raise RuntimeError(f"{folder}: {name} left CRePE's mask")
    packed = len(read_folder(folder).layers)
    return {"perplexity": result.perplexity, "bytes": weight_bytes(folder), "packed": packed}


def run(name: str, options: argparse.Namespace, scratch: Path) -> None:
    """Measure, record and print the rows of one model."""
    source = MODELS[name]()
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = samples.wikipedia()
    windows = samples.token_windows(tokenizer, corpus.test, options.window, tokens=options.tokens)
    data = samples.calibration_windows(
        tokenizer, corpus.train, windows=options.samples, length=options.length, seed=options.seed
    )
    calibration = {
        "dataset": data,
        "tokenizer": tokenizer,
        "num_calibration_samples": options.samples,
        "max_seq_length": options.length,
        "shuffle_calibration_samples": False,
    }

    conditions = {key: getattr(options, key) for key in ("tokens", "window", "samples", "length", "seed")}

    def row(label: str, made: dict[str, Any]) -> None:
        append(options.results, PROTOCOL, {"model": name, "weights": label, **conditions, **made})
        size = f"{made['bytes'] / 1e6:.1f} MB"
        print(f"| {name} | {label} | {made['perplexity']:.3f} | {size} | {made['packed']} |", flush=True)

    dense, sparse = scratch / f"{name}-dense", scratch / f"{name}-sparse"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(dense)
    row("dense", measure(dense, windows, corpus.name, {}))
    reset_session()
    oneshot(model=model, recipe=str(recipe_path("crepe_2of4")), **calibration)
    keep = {layer: weight != 0 for layer, weight in linear_weights(model).items()}
    model.save_pretrained(sparse)
    row("2:4", measure(sparse, windows, corpus.name, keep))
    for label, recipe in QUANTIZATIONS.items():
        reset_session()
        model = AutoModelForCausalLM.from_pretrained(sparse)
        oneshot(model=model, recipe=quantization_of(recipe), **calibration)
        attach(model)
        folder = scratch / f"{name}-{recipe}"
        model.save_pretrained(folder)
        row(label, measure(folder, windows, corpus.name, keep))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=16384, help="of the test text (%(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="tokens per window (%(default)s)")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens per calibration window (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration windows (%(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS / "quantization.jsonl", help="a row a checkpoint")
    options = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    torch.manual_seed(options.seed)
    print(f"$ {provenance()['command']}")
    print(
        f"{samples.wikipedia().name}: test, {options.tokens} tokens in windows of {options.window}; calibration on "
        f"{options.samples} windows of {options.length} tokens of train, seed {options.seed}; bf16; "
        f"torch {torch.__version__}, {provenance()['processor']}, {provenance()['cores']} cores\n"
    )
    print("| model | weights | perplexity | safetensors | packed layers |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            run(name, options, Path(scratch))


if __name__ == "__main__":
    main()
