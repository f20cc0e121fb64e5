"""Perplexity of pruning methods over calibration seeds: the 50 % columns of the README.

    python benchmarks/quality.py                         # both models, 2:4 and 50 %, seeds 0 1 2
    python benchmarks/quality.py --split valid --seeds 0 # what coefficients may be chosen on

Every run is one `oneshot` of a fresh model. Runs are appended to --results as they finish and not repeated.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import yaml
from llmcompressor import oneshot
from loguru import logger
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import methods
from crepe_llm.evaluation import samples
from crepe_llm.evaluation.perplexity import perplexity, token_windows
from crepe_llm.modifiers import CRePEModifier
from crepe_llm.recipe_files import recipe_path

STRUCTURES = {name: methods.STRUCTURES[name] for name in ("2:4", "50%")}
METHODS = ("dense", "magnitude", "Wanda", "RIA", "CRePE")


def recipe_fields(name: str) -> dict:
    """The CRePEModifier's fields in a shipped recipe."""
    (stage,) = yaml.safe_load(recipe_path(name).read_text()).values()
    return stage["pruning_modifiers"]["CRePEModifier"]


def modifier(method: str, structure: str) -> CRePEModifier:
    """The modifier that prunes by a method."""
    fields, recipe = STRUCTURES[structure]
    if method == "CRePE":
        return CRePEModifier(**recipe_fields(recipe))
    return CRePEModifier(**fields, **(methods.WANDA if method == "Wanda" else methods.RIA))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=methods.MODELS, default=list(methods.MODELS))
    parser.add_argument("--structures", nargs="+", choices=STRUCTURES, default=list(STRUCTURES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--split", choices=["test", "valid"], default="test", help="articles to measure on")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of every window (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the model")
    parser.add_argument("--tokens", type=int, default=16384, help="measured on (%(default)s)")
    parser.add_argument("--results", type=Path, default=Path("quality.jsonl"), help="one JSON object a run")
    options = parser.parse_args()
    logger.remove()

    corpus = samples.wikipedia()
    records = (
        [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    )
    conditions = {name: getattr(options, name) for name in ("split", "windows", "length", "tokens", "dtype")}
    for model_name in options.models:
        folder = methods.MODELS[model_name]()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        test = token_windows(tokenizer, getattr(corpus, options.split), options.length, tokens=options.tokens)
        runs = [("dense", "", None)] if "dense" in options.methods else []
        for structure in options.structures:
            runs += [(m, structure, None) for m in options.methods if m == "magnitude"]
            calibrated = [m for m in options.methods if m not in ("dense", "magnitude")]
            runs += [(m, structure, seed) for seed in options.seeds for m in calibrated]
        for method, structure, seed in tqdm(runs, desc=model_name, unit=" runs"):
            key = {"model": model_name, "method": method, "structure": structure, "seed": seed, **conditions}
            if method == "CRePE":
                key["fields"] = recipe_fields(STRUCTURES[structure][1])
            if any(key.items() <= record.items() for record in records):
                continue
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype))
            started = time.perf_counter()
            if method == "magnitude":
                methods.prune_by_magnitude(model, structure)
            elif method != "dense":
                data = samples.calibration_windows(
                    tokenizer, corpus.train, windows=options.windows, length=options.length, seed=seed
                )
                oneshot(
                    model=model,
                    tokenizer=tokenizer,
                    recipe=[modifier(method, structure)],
                    dataset=data,
                    num_calibration_samples=options.windows,
                    shuffle_calibration_samples=False,
                )
            seconds = time.perf_counter() - started
            result = perplexity(model, test, corpus=corpus.name)
            records.append(key | {"perplexity": result.perplexity, "predicted": result.tokens, "seconds": seconds})
            with options.results.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
    records = [r for r in records if all(r[name] == value for name, value in conditions.items())]
    print(table(records, options))


def table(records: list[dict], options: argparse.Namespace) -> str:
    """Markdown: mean over seeds, and half the range between the best and the worst seed."""
    header = ["model", "dense", "sparsity", *(m for m in METHODS if m != "dense")]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for model in options.models:
        for structure in options.structures:
            cells = [model, "", structure]
            for method in METHODS:
                found = [
                    r["perplexity"]
                    for r in records
                    if (r["model"], r["method"]) == (model, method)
                    and r["structure"] in ("", structure)
                    and (r["seed"] is None or r["seed"] in options.seeds)
                ]
                cell = "-"
                if found:
                    cell = f"{statistics.mean(found):.2f}"
                    cell += f" ± {(max(found) - min(found)) / 2:.2f}" * (len(found) > 1)
                if method == "dense":
                    cells[1] = cell
                else:
                    cells.append(cell)
            lines.append(f"| {' | '.join(cells)} |")
    predicted = records[0]["predicted"]
    seeds = ", ".join(map(str, options.seeds))
    lines.append(
        f"\nPerplexity on Wikipedia {options.split} articles: {predicted} tokens predicted in windows of "
        f"{options.length}, {options.dtype}. Calibrated on {options.windows} windows of {options.length} tokens of "
        f"other articles, seeds {seeds}: mean ± half the range. Both dense models are dequantised from 4-bit."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
