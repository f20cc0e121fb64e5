"""CFSP's structured pruning: perplexity by importance and allocation, recovery fine-tuning, speed in vLLM.

    python benchmarks/structured.py quality                  # both models, 10, 20, 30 %, seeds 0 1 2
    python benchmarks/structured.py recover --steps 200      # what LoRA wins back, by how ranks are shared out
    python benchmarks/structured.py speed                    # dense beside pruned in vLLM

Runs are appended to --results as they finish and not repeated; the table is printed from what is there. `quality`
calibrates once a seed, on the dense model: no score depends on what is pruned. Every cell cuts the FFNs of that model
for real, measures it and puts the dense matrices back.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm.evaluation import samples
from crepe_llm.evaluation.perplexity import perplexity, token_windows
from crepe_llm.ffn import FFN, cut, find_blocks, find_ffns
from crepe_llm.statistics import InputStatistics
from crepe_llm.structured import BlockImportance, channel_importance, keep_ratios, kept_channels, kept_widths

MODELS = {"SmolLM2-135M-Instruct": samples.smollm2, "Gemma-3-270M": samples.gemma3}
METHODS = ("random", "magnitude", "wanda", "activation", "relative")
ALLOCATIONS = ("uniform", "coarse")
DTYPE = torch.bfloat16


class Calibration:
    """What one pass over the calibration windows shows of a dense model: each block's importance, each channel's norm.

    The same hooks and formulas as CFSPModifier's, outside of llm-compressor, whose pipeline runs every block twice.
    """

    def __init__(self, model: Any, ffns: list[FFN], windows: torch.Tensor) -> None:
        started = time.perf_counter()
        blocks = [BlockImportance() for _ in ffns]
        channels = [InputStatistics(ffn.width) for ffn in ffns]
        handles = []
        for block, ffn, turn, inputs in zip(find_blocks(model).values(), ffns, blocks, channels, strict=True):

            def see_block(module: Any, args: Any, output: Any, turn: BlockImportance = turn) -> None:
                turn.update(args[0], output[0] if isinstance(output, tuple) else output)

            def see_channels(module: Any, args: Any, inputs: InputStatistics = inputs) -> None:
                inputs.update(args[0])

            handles += [block.register_forward_hook(see_block), ffn.output.register_forward_pre_hook(see_channels)]
        with torch.no_grad():
            for window in tqdm(windows, desc="calibrating", unit=" windows", leave=False):
                model.base_model(input_ids=window[None], use_cache=False)
        for handle in handles:
            handle.remove()
        self.importance = [turn.mean for turn in blocks]
        self.norms = [inputs.norm for inputs in channels]
        self.seconds = time.perf_counter() - started


def scores(method: str, ffn: FFN, norm: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """[width]: one score a channel. Magnitude is the L2 norm of a channel's weights in all matrices."""
    if method == "random":
        return torch.rand(ffn.width, generator=generator)
    matrices = [module.weight.detach() for module in ffn.inputs]
    if method == "magnitude":
        every = [*matrices, ffn.output.weight.detach().T]
        return sum(matrix.float().square().sum(dim=1) for matrix in every).sqrt()
    return channel_importance(method, norm, ffn.output.weight.detach(), matrices)


@contextmanager
def pruned(
    ffns: list[FFN], method: str, allocation: str, sparsity: float, round_to: int, seen: Calibration | None, seed: int
) -> Iterator[float]:
    """Cut the FFNs of a model meanwhile; gives the seconds that it took without the calibration."""
    started = time.perf_counter()
    widths = [ffn.width for ffn in ffns]
    if allocation == "uniform":
        kept = kept_widths([1 - sparsity], widths[:1], round_to) * len(ffns)
    else:
        kept = kept_widths(keep_ratios(seen.importance, sparsity), widths, round_to)
    dense = [(module, module.weight) for ffn in ffns for module in (*ffn.inputs, ffn.output)]
    generator = torch.Generator().manual_seed(seed)
    try:
        for index, (ffn, count) in enumerate(zip(ffns, kept, strict=True)):
            norm = seen.norms[index] if seen is not None else None
            cut(ffn, kept_channels(scores(method, ffn, norm, generator), count))
        yield time.perf_counter() - started
    finally:
        for module, weight in dense:
            module.weight = weight


def quality(options: argparse.Namespace) -> None:
    """Perplexity of every cell that is not in the results yet, then the table."""
    conditions = {name: getattr(options, name) for name in ("windows", "length", "tokens", "round_to")}
    records = read(options.results)
    corpus = samples.wikipedia()
    for model_name in options.models:
        cells: list[dict[str, Any]] = [{"method": "dense", "allocation": "", "sparsity": 0.0, "seed": None}]
        for seed in options.seeds:
            for sparsity in options.sparsities:
                for allocation in options.allocations:
                    for method in options.methods:
                        # Without data and with the same widths everywhere, nothing depends on the seed.
                        fixed = method == "magnitude" and allocation == "uniform"
                        cell = {"method": method, "allocation": allocation, "sparsity": sparsity}
                        cell |= {"seed": None if fixed else seed}
                        if cell not in cells:
                            cells.append(cell)
        missing = [key for cell in cells if done(records, key := {"model": model_name, **cell, **conditions}) is None]
        if not missing:
            continue
        folder = MODELS[model_name]()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        test = token_windows(tokenizer, corpus.test, options.length, tokens=options.tokens)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval()
        ffns = find_ffns(model)
        calibrations: dict[int, Calibration] = {}
        for key in tqdm(missing, desc=model_name, unit=" cells"):
            method, allocation, seed = key["method"], key["allocation"], key["seed"]
            record = dict(key)
            if method == "dense":
                measure(record, model, test, corpus.name)
            else:
                if seed is not None and seed not in calibrations:
                    data = samples.calibration_windows(
                        tokenizer, corpus.train, windows=options.windows, length=options.length, seed=seed
                    )
                    calibrations = {seed: Calibration(model, ffns, torch.tensor(data["input_ids"]))}
                seen = None if seed is None else calibrations[seed]
                needs_data = allocation == "coarse" or method not in ("random", "magnitude")
                with pruned(ffns, method, allocation, key["sparsity"], options.round_to, seen, seed or 0) as seconds:
                    record["seconds"] = seconds + (seen.seconds if needs_data else 0.0)
                    measure(record, model, test, corpus.name)
            append(options.results, record)
            records.append(record)
    print(quality_table([r for r in records if all(r.get(k) == v for k, v in conditions.items())], options))


def measure(record: dict[str, Any], model: Any, test: torch.Tensor, corpus: str) -> None:
    """Add the perplexity, the time that it took and the size to a record."""
    result = perplexity(model, test, corpus=corpus, progress=False)
    ffns = find_ffns(model)
    record |= {
        "perplexity": result.perplexity,
        "predicted": result.tokens,
        "evaluation_s": result.seconds,
        "megabytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
        "widths": [ffn.width for ffn in ffns],
        "channels": sum(ffn.width for ffn in ffns),
    }


def quality_table(records: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: mean over seeds, and half the range between the best and the worst seed."""
    lines = [f"| model | dense | channels removed | allocation | {' | '.join(options.methods)} | MB | seconds |"]
    lines.append("|---" * (6 + len(options.methods)) + "|")
    for model in options.models:
        mine = [r for r in records if r["model"] == model]
        dense = next((r for r in mine if r["method"] == "dense"), None)
        if dense is None:
            continue
        for sparsity in options.sparsities:
            for allocation in options.allocations:
                here = [r for r in mine if (r["allocation"], r["sparsity"]) == (allocation, sparsity)]
                here = [r for r in here if r["seed"] is None or r["seed"] in options.seeds]
                if not here:
                    continue
                removed = 1 - here[0]["channels"] / dense["channels"]
                cells = [model, f"{dense['perplexity']:.2f}", f"{removed:.1%}", allocation]
                cells += [spread([r["perplexity"] for r in here if r["method"] == m]) for m in options.methods]
                calibrated = [r["seconds"] for r in here if r["method"] in ("wanda", "activation", "relative")]
                cells += [f"{here[0]['megabytes']:.0f}", f"{statistics.median(calibrated or [0.0]):.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    predicted = records[0]["predicted"] if records else 0
    lines.append(
        f"\nPerplexity on Wikipedia test articles: {predicted} tokens predicted in windows of {options.length}, "
        f"bfloat16. Calibrated on {options.windows} windows of {options.length} tokens of other articles, seeds "
        f"{', '.join(map(str, options.seeds))}: mean ± half the range. Widths are multiples of {options.round_to}. "
        "MB is the pruned model's; seconds are those of calibration and surgery."
    )
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The mean, and half the range if there are several."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + f" ± {(max(values) - min(values)) / 2:.2f}" * (len(values) > 1)


# What subcommands share


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def done(records: list[dict[str, Any]], key: dict[str, Any]) -> dict[str, Any] | None:
    return next((record for record in records if key.items() <= record.items()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    shared.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    shared.add_argument("--length", type=int, default=512, help="tokens of every window (%(default)s)")
    shared.add_argument("--tokens", type=int, default=8192, help="measured on (%(default)s)")

    command = subparsers.add_parser("quality", parents=[shared], help="perplexity of every method and allocation")
    command.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3])
    command.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    command.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of calibration and of random scores")
    command.add_argument("--round-to", type=int, default=8, help="widths are multiples of it (%(default)s)")
    command.add_argument("--results", type=Path, default=Path("structured.jsonl"), help="one JSON object a cell")
    command.set_defaults(run=quality)

    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
