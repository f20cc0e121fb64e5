"""CFSP's structured pruning: perplexity by importance and allocation, recovery fine-tuning, speed in vLLM.

    python benchmarks/structured.py quality                  # both models, 10, 20, 30 %, seeds 0 1 2
    python benchmarks/structured.py recover                  # what LoRA wins back, by how ranks are shared out
    python benchmarks/structured.py speed                    # dense beside pruned in vLLM

Runs are appended to --results as they finish and not repeated; the table is printed from what is there. `quality`
calibrates once a seed, on the dense model: no score depends on what is pruned. Every cell cuts the FFNs of that model
for real, measures it and puts the dense matrices back.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.evaluation.throughput import Case, Engine, median, run
from crepe_llm.functional.statistics import InputStatistics
from crepe_llm.functional.structured import BlockImportance, channel_importance, keep_ratios, kept_channels, kept_widths
from crepe_llm.models import per_block
from crepe_llm.models.blocks import find_blocks
from crepe_llm.models.ffn import FFN, cut, find_ffns
from crepe_llm.training.recovery import RecoverySettings, recover
from records import LEGEND, RESULTS, Row, append, dagger, is_done, newest, read, read_old, with_old

# Raised by every change of a default or of how something is measured. 1: rows without provenance. 3: recovery trains in
# the loop of all trainings, whose order of windows is its own.
PROTOCOL = 3

MODELS = {"SmolLM2-135M-Instruct": samples.smollm2, "Gemma-3-270M": samples.gemma3}
METHODS = ("random", "magnitude", "wanda", "activation", "relative")
ALLOCATIONS = ("uniform", "coarse")
RANKS = ("important", "unimportant", "uniform")
CASES = [Case(prompt, streams) for prompt in (32, 512) for streams in (1, 8)]
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


def widths_of(ffns: list[FFN], allocation: str, sparsity: float, round_to: int, seen: Calibration | None) -> list[int]:
    """How many channels each block keeps."""
    widths = [ffn.width for ffn in ffns]
    if allocation == "uniform":
        return kept_widths([1 - sparsity], widths[:1], round_to) * len(ffns)
    return kept_widths(keep_ratios(seen.importance, sparsity), widths, round_to)


@contextmanager
def pruned(ffns: list[FFN], key: Row, seen: Calibration | None) -> Iterator[float]:
    """Cut the FFNs of a model as a cell's key says, meanwhile; gives the seconds that it took without calibration."""
    started = time.perf_counter()
    kept = widths_of(ffns, key["allocation"], key["sparsity"], key["round_to"], seen)
    dense = [(module, module.weight) for ffn in ffns for module in (*ffn.inputs, ffn.output)]
    generator = torch.Generator().manual_seed(key["seed"] or 0)
    try:
        for index, (ffn, count) in enumerate(zip(ffns, kept, strict=True)):
            norm = seen.norms[index] if seen is not None else None
            cut(ffn, kept_channels(scores(key["method"], ffn, norm, generator), count))
        yield time.perf_counter() - started
    finally:
        for module, weight in dense:
            module.weight = weight


def quality_keys(options: argparse.Namespace) -> list[Row]:
    """The conditions of every cell that the options ask for."""
    conditions = {name: getattr(options, name) for name in ("windows", "length", "tokens", "round_to")}
    cells: list[Row] = [{"method": "dense", "allocation": "", "sparsity": 0.0, "seed": None}]
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
    return [{"model": model, **cell, **conditions} for model in options.models for cell in cells]


def quality(options: argparse.Namespace) -> None:
    """Perplexity of every cell that is not in the results yet, then the table."""
    keys, records = quality_keys(options), read(options.results)
    for model in options.models:
        missing = [key for key in keys if key["model"] == model and not is_done(key, records, PROTOCOL)]
        if missing:
            records += quality_rows(model, missing, options)
    print(quality_table(newest(keys, records, read_old(options.results), PROTOCOL), options))


def quality_rows(model_name: str, keys: list[Row], options: argparse.Namespace) -> list[Row]:
    """Measure cells of one model, each recorded as soon as it is done."""
    corpus, folder = samples.wikipedia(), MODELS[model_name]()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test = samples.token_windows(tokenizer, corpus.test, options.length, tokens=options.tokens)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval()
    ffns = find_ffns(model)
    calibrations: dict[int, Calibration] = {}
    rows = []
    for key in tqdm(keys, desc=model_name, unit=" cells"):
        method, seed = key["method"], key["seed"]
        row = dict(key)
        if method == "dense":
            measure(row, model, test, corpus.name)
        else:
            if seed is not None and seed not in calibrations:
                data = samples.calibration_windows(
                    tokenizer, corpus.train, windows=options.windows, length=options.length, seed=seed
                )
                calibrations = {seed: Calibration(model, ffns, torch.tensor(data["input_ids"]))}
            seen = None if seed is None else calibrations[seed]
            needs_data = key["allocation"] == "coarse" or method not in ("random", "magnitude")
            with pruned(ffns, key, seen) as seconds:
                row["seconds"] = seconds + (seen.seconds if needs_data else 0.0)
                measure(row, model, test, corpus.name)
        rows.append(append(options.results, PROTOCOL, row))
    return rows


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
                if not here:
                    continue
                removed = 1 - here[0]["channels"] / dense["channels"]
                cells = [model, spread([dense]), f"{removed:.1%}", allocation]
                cells += [spread([r for r in here if r["method"] == m]) for m in options.methods]
                calibrated = [r["seconds"] for r in here if r["method"] in ("wanda", "activation", "relative")]
                cells += [f"{here[0]['megabytes']:.0f}", f"{statistics.median(calibrated or [0.0]):.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    predicted = records[0]["predicted"] if records else 0
    lines.append(
        f"\nPerplexity on Wikipedia test articles: {predicted} tokens predicted in windows of {options.length}, "
        f"bfloat16. Calibrated on {options.windows} windows of {options.length} tokens of other articles, seeds "
        f"{', '.join(map(str, options.seeds))}: mean ± half the range. Widths are multiples of {options.round_to}. "
        "MB is the pruned model's; seconds are those of calibration and surgery." + f" {LEGEND}" * bool(dagger(records))
    )
    return "\n".join(lines)


def spread(rows: list[Row]) -> str:
    """The mean perplexity, and half the range if there are several rows."""
    if not rows:
        return "-"
    values = [row["perplexity"] for row in rows]
    mean = f"{statistics.mean(values):.2f}{dagger(rows)}"
    return mean + f" ± {(max(values) - min(values)) / 2:.2f}" * (len(values) > 1)


# Recovery


def write_pruned(folder: Path, model_name: str, sparsity: float, allocation: str, options: argparse.Namespace) -> Path:
    """A checkpoint cut by `activation`, if it is not there yet, calibrated with seed 0; `dense` cuts nothing."""
    seen_by = f"{options.windows}x{options.length}"
    made = folder / f"{model_name}-{allocation}-{sparsity:g}-{options.round_to}-{seen_by}"
    if (made / "config.json").is_file():
        return made
    source = MODELS[model_name]()
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE).eval()
    if allocation != "dense":
        train = samples.wikipedia().train
        data = samples.calibration_windows(tokenizer, train, windows=options.windows, length=options.length, seed=0)
        ffns = find_ffns(model)
        seen = Calibration(model, ffns, torch.tensor(data["input_ids"]))
        kept = widths_of(ffns, allocation, sparsity, options.round_to, seen)
        for ffn, count, norm in zip(ffns, kept, seen.norms, strict=True):
            cut(ffn, kept_channels(norm, count))
        model.config.block_importance = seen.importance
        if len(set(kept)) == 1:
            per_block.set_width(model, kept[0])
        else:
            per_block.convert(model, kept)
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def recovery(options: argparse.Namespace) -> None:
    """Perplexity before and after recovery for every way to share out the ranks, then the table."""
    fields = ("windows", "length", "tokens", "round_to", "train", "rank", "batch", "learning_rate")
    conditions = {name: getattr(options, name) for name in fields}
    conditions |= {"sparsity": options.sparsity, "allocation": options.allocation}
    runs = [("", None), *((ranks, seed) for seed in options.seeds for ranks in options.ranks)]
    keys = [
        {"model": model, "ranks": ranks, "seed": seed, **conditions} for model in options.models for ranks, seed in runs
    ]
    records = read(options.results)
    for key in keys:
        if not is_done(key, records, PROTOCOL):
            what = f"{key['ranks']}, seed {key['seed']}" if key["ranks"] else "before recovery"
            print(f"{key['model']}: {what}", file=sys.stderr, flush=True)
            records.append(append(options.results, PROTOCOL, recovered(key, options)))
    print(recovery_table(newest(keys, records, read_old(options.results), PROTOCOL), options))


def recovered(key: Row, options: argparse.Namespace) -> Row:
    """One row: a pruned checkpoint, recovered where the key names ranks, and its perplexity."""
    corpus, row = samples.wikipedia(), dict(key)
    folder = write_pruned(options.folder, key["model"], options.sparsity, options.allocation, options)
    if key["ranks"]:
        target = options.folder / f"{folder.name}-{key['ranks']}-{key['seed']}"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        made = recover(
            folder,
            target,
            options.folder / f"{target.name}-work",
            lambda tokenizer: samples.token_windows(
                tokenizer, corpus.train, options.length, tokens=options.train * options.length
            ),
            RecoverySettings(
                rank=options.rank,
                allocation=key["ranks"],
                batch=options.batch,
                learning_rate=options.learning_rate,
                seed=key["seed"],
            ),
        )
        row |= {"seconds": made.seconds, "steps": made.steps, "ranks_of_blocks": made.ranks}
        folder = target
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).eval()
    test = samples.token_windows(tokenizer, corpus.test, options.length, tokens=options.tokens)
    measure(row, model, test, corpus.name)
    return row


def recovery_table(records: list[Row], options: argparse.Namespace) -> str:
    """Markdown: a row a model, a column for each way to share out the ranks."""
    columns = ["", *options.ranks]
    lines = [f"| model | {' | '.join(name or 'before recovery' for name in columns)} | seconds |"]
    lines.append("|---" * (2 + len(columns)) + "|")
    for model in options.models:
        mine = [record for record in records if record["model"] == model]
        seconds = [record["seconds"] for record in mine if "seconds" in record]
        cells = [spread([record for record in mine if record["ranks"] == ranks]) for ranks in columns]
        lines.append(f"| {model} | {' | '.join(cells)} | {statistics.median(seconds or [0.0]):.0f} |")
    lines.append(
        f"\nPerplexity as above of models with {options.sparsity:.0%} of the FFN channels removed (`activation`, "
        f"{options.allocation}), after LoRA of mean rank {options.rank} on {options.train} windows of {options.length} "
        f"tokens of the calibration articles, {options.batch} a step, at {options.learning_rate}; by where ranks go: "
        f"mean ± half the range over seeds {', '.join(map(str, options.seeds))} of the training."
        + f" {LEGEND}"
        * bool(dagger(records))
    )
    return "\n".join(lines)


# Speed


def speed(options: argparse.Namespace) -> None:
    """vLLM's speed on dense and pruned checkpoints in turns, then the table."""
    conditions = {"tokens": options.generate, "dtype": options.dtype, "threads": torch.get_num_threads()}
    conditions |= {"round_to": options.round_to}
    kinds = [("dense", 0.0), *((kind, sparsity) for sparsity in options.sparsities for kind in options.allocations)]
    for model_name in options.models:
        for turn in range(options.turns):
            for kind, sparsity in kinds:
                print(f"{model_name}, turn {turn + 1}: {kind} {sparsity:g}", file=sys.stderr, flush=True)
                folder = write_pruned(options.folder, model_name, sparsity, kind, options)
                measured = run(Engine(kind, str(folder), options.dtype), CASES, tokens=options.generate)
                key = {"model": model_name, "kind": kind, "sparsity": sparsity, **conditions}
                append(options.results, PROTOCOL, {**key, **measured})
    cell = ("model", "kind", "sparsity", *conditions)
    records = with_old(read(options.results), read_old(options.results), PROTOCOL, cell)
    records = [row for row in records if conditions.items() <= row.items()]
    found = {
        (model, *kind): [row for row in records if (row["model"], row["kind"], row["sparsity"]) == (model, *kind)]
        for model in options.models
        for kind in kinds
    }
    print(speed_table({key: rows for key, rows in found.items() if rows}, conditions))


def speed_table(found: dict[tuple[str, str, float], list[Row]], conditions: Row) -> str:
    """Markdown: a row for each model, kind and sparsity, of the medians of its runs."""
    titles = [f"{case.prompt} + {case.streams}: {what}" for case in CASES for what in ("tokens/s", "first token, s")]
    lines = [f"| model | FFN channels removed | {' | '.join(titles)} | weights, MB |"]
    lines.append("|---" * (3 + len(titles)) + "|")
    medians = {key: median(rows) for key, rows in found.items()}
    for (model, kind, sparsity), one in medians.items():
        dense = medians.get((model, "dense", 0.0))
        cells = []
        for index, case in enumerate(one["cases"]):
            for figure, form in (("tokens_per_s", ".1f"), ("first_token_s", ".3f")):
                cell = f"{case[figure]:{form}}"
                if dense and kind != "dense":
                    ratio = case[figure] / dense["cases"][index][figure]
                    cell += f" ({ratio if figure == 'tokens_per_s' else 1 / ratio:.2f}x)"
                cells.append(cell)
        name = (kind if kind == "dense" else f"{sparsity:.0%} {kind}") + dagger(found[model, kind, sparsity])
        lines.append(f"| {model} | {name} | {' | '.join(cells)} | {one['weight_bytes'] / 1e6:.0f} |")
    counts = sorted({len(rows) for rows in found.values()})
    lines.append(
        f"\nvLLM, eager, {conditions['dtype']}, {conditions['threads']} threads; prompt tokens + streams; medians of "
        f"{' or '.join(map(str, counts))} starts of each engine, in turns; in brackets the speed-up against dense."
        + f" {LEGEND}"
        * any(dagger(rows) for rows in found.values())
    )
    return "\n".join(lines)


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
    command.add_argument("--results", type=Path, default=RESULTS / "structured.jsonl", help="a row a cell")
    command.set_defaults(run=quality)

    command = subparsers.add_parser("recover", parents=[shared], help="perplexity after recovery fine-tuning")
    command.add_argument("--sparsity", type=float, default=0.2)
    command.add_argument("--allocation", choices=ALLOCATIONS, default="coarse")
    command.add_argument("--ranks", nargs="+", choices=RANKS, default=list(RANKS), help="which blocks get more")
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the training")
    command.add_argument("--train", type=int, default=64, help="windows to train on (%(default)s)")
    command.add_argument("--rank", type=int, default=8, help="mean LoRA rank (%(default)s)")
    command.add_argument("--batch", type=int, default=4, help="windows a step (%(default)s)")
    command.add_argument("--learning-rate", type=float, default=2e-4)
    command.add_argument("--round-to", type=int, default=8, help="widths are multiples of it (%(default)s)")
    command.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are kept")
    command.add_argument("--results", type=Path, default=RESULTS / "structured_recovery.jsonl", help="a row a run")
    command.set_defaults(run=recovery)

    command = subparsers.add_parser("speed", parents=[shared], help="vLLM on dense and pruned checkpoints")
    command.add_argument("--sparsities", nargs="+", type=float, default=[0.2, 0.3])
    command.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    command.add_argument("--turns", type=int, default=3, help="starts of every engine; 0: only the table (%(default)s)")
    command.add_argument("--generate", type=int, default=32, help="tokens a stream (%(default)s)")
    command.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="served (%(default)s)")
    command.add_argument("--round-to", type=int, default=128, help="widths are multiples of it (%(default)s)")
    command.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are kept")
    command.add_argument("--results", type=Path, default=RESULTS / "structured_speed.jsonl", help="a row a run")
    command.set_defaults(run=speed)

    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
