"""vLLM serving a model dense and 2:4 sparse: tokens a second, time to first token, memory.

    python benchmarks/serve.py                      # 1B shape and SmolLM2, dense bf16 and fp32 beside sparse
    python benchmarks/serve.py --quick              # the 1B shape, one turn
    python benchmarks/serve.py --models smollm2 --json serve.json
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 CREPE_CPU_ISA=avx2 python benchmarks/serve.py   # as if AVX2 only

`1b` is a model with random weights in the shape of Llama-3.2-1B; SmolLM2 is pruned by magnitude, and its figures are
speed, not quality. Every engine runs eagerly in a process of its own, in turns; figures are medians over the turns.
Runs are added to --results as they finish, and medians are over all runs there: a second call adds turns to the first.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from crepe_llm.checkpoints import compress_folder
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.evaluation.throughput import Case, Engine, median, run
from crepe_llm.functional.masks import keep_mask
from crepe_llm.functional.scores import magnitude_scores

CASES = [Case(prompt, streams) for prompt in (32, 512) for streams in (1, 8)]
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "CREPE_CPU_ISA", "OMP_NUM_THREADS")


def one_billion(folder: Path) -> tuple[Path, Path]:
    """Llama-3.2-1B's shape with random weights: dense and sparse folder."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    dense, sparse = folder / "1b-dense", folder / "1b-sparse"
    if not (dense / "config.json").is_file():
        write_random_model(config, dense, sparse=False)
    if not (sparse / "config.json").is_file():
        compress_folder(dense, sparse, progress=True)
    return dense, sparse


def smollm2(folder: Path) -> tuple[Path, Path]:
    """SmolLM2-135M pruned to 2:4 by magnitude, in bf16: dense and sparse folder."""
    from crepe_llm import samples

    dense, sparse = folder / "smollm2-dense", folder / "smollm2-sparse"
    if not (dense / "config.json").is_file():
        source = samples.smollm2()
        dense.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, weight in load_file(source / "model.safetensors").items():
            pruned = name.endswith("_proj.weight")
            tensors[name] = (weight * keep_mask(magnitude_scores(weight), 0.5, "2:4") if pruned else weight).bfloat16()
        save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
        for file in source.glob("*.json"):
            if file.name != "model.safetensors.index.json":
                shutil.copyfile(file, dense / file.name)
    if not (sparse / "config.json").is_file():
        compress_folder(dense, sparse)
    return dense, sparse


DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
ENGINES = ["dense bf16", "dense fp32", "sparse bf16", "sparse fp32"]
MODELS: dict[str, Callable[[Path], tuple[Path, Path]]] = {"1b": one_billion, "smollm2": smollm2}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each load and figure, a column for each engine, and sparse over the best dense."""
    names = list(results)
    dense = [name for name in names if name.startswith("dense")]
    sparse = [name for name in names if name.startswith("sparse")]

    def row(label: str, figure: Callable[[dict[str, Any]], float], form: str, *, more_is_better: bool) -> str:
        values = {name: figure(results[name]) for name in names}
        is_time = "first token" in label
        cells = [f"{values[name]:{form}}" for name in names]
        if dense and sparse:
            best = max if more_is_better else min
            ratio = best(values[name] for name in sparse) / best(values[name] for name in dense)
            cells.append(f"{1 / ratio if is_time else ratio:.2f}x")
        return f"| {label} | {' | '.join(cells)} |"

    header = [*names, *(["best sparse against best dense"] if dense and sparse else [])]
    lines = [f"| | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    for index, case in enumerate(results[names[0]]["cases"]):
        load = f"{case['prompt']}-token prompt, {case['streams']} stream{'s' * (case['streams'] > 1)}"
        for label, key, form, more in (
            ("decode, tokens/s", "tokens_per_s", ".1f", True),
            ("time to first token, s", "first_token_s", ".2f", False),
        ):
            lines.append(
                row(
                    f"{load}: {label}",
                    lambda result, i=index, k=key: result["cases"][i][k],  # type: ignore[misc]
                    form,
                    more_is_better=more,
                )
            )
    lines.append(
        row("weights in the served dtype, memory in MB", lambda r: r["weight_bytes"] / 1e6, ".0f", more_is_better=False)
    )
    lines.append(
        row(
            "growth of the process while loading, memory in MB",
            lambda r: r["anonymous_bytes"] / 1e6,
            ".0f",
            more_is_better=False,
        )
    )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are made and kept")
    parser.add_argument("--turns", type=int, default=3, help="starts of every engine; 0: only the table (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="how often a started engine runs a load (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="that each stream generates (%(default)s)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8], help="concurrent streams (1 8)")
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--quick", action="store_true", help="the first model, one turn, dense and sparse bf16")
    parser.add_argument("--results", metavar="FILE", type=Path, default=Path("serve.jsonl"), help="%(default)s")
    options = parser.parse_args()
    if options.quick:
        options.models, options.turns, options.repeats = options.models[:1], 1, 1
        options.engines = ["dense bf16", "sparse bf16"]
    isa = {name: os.environ[name] for name in ISA_VARIABLES if name in os.environ}
    conditions = {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "environment": isa,
        "tokens": options.tokens,
    }
    cases = [case for case in CASES if case.streams in options.streams]
    for model in options.models:
        folders = dict(zip(("dense", "sparse"), MODELS[model](options.folder), strict=True))
        for turn in range(options.turns):
            for name in options.engines:
                kind, dtype = name.split()
                engine = Engine(name, str(folders[kind]), DTYPES[dtype])
                print(f"{model}, turn {turn + 1}: {name}", file=sys.stderr, flush=True)
                measured = run(engine, cases, tokens=options.tokens, repeats=options.repeats)
                with options.results.open("a") as results:
                    results.write(json.dumps({"model": model, "engine": name, **conditions, **measured}) + "\n")
    runs = [json.loads(line) for line in options.results.read_text().splitlines()]
    same = [
        found
        for found in runs
        if all(found[key] == value for key, value in conditions.items())
        and [(case["prompt"], case["streams"]) for case in found["cases"]] == [(c.prompt, c.streams) for c in cases]
    ]
    print(json.dumps(conditions))
    for model in options.models:
        of_engine = {name: [r for r in same if (r["model"], r["engine"]) == (model, name)] for name in ENGINES}
        of_engine = {name: found for name, found in of_engine.items() if found}
        counts = sorted({len(found) for found in of_engine.values()})
        medians = {name: median(found) for name, found in of_engine.items()}
        print(f"\n{model}, medians of {' or '.join(map(str, counts))} runs\n\n{table(medians)}", flush=True)


if __name__ == "__main__":
    main()
