"""Time and memory of pruning, beside llm-compressor's own Wanda and SparseGPT.

    python benchmarks/prune.py

First whole `oneshot` runs on SmolLM2 to 2:4, one process each, alternating; then score + mask alone on a
4096 x 14336 layer, beside llm-compressor's `sparsify_weight`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ONESHOT = ("crepe", "wanda", "upstream-wanda", "upstream-sparsegpt")
LABELS = {
    "crepe": "our CRePE recipe",
    "wanda": "our Wanda recipe",
    "upstream-wanda": "llm-compressor WandaPruningModifier",
    "upstream-sparsegpt": "llm-compressor SparseGPTModifier",
}


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds, and bytes of memory at the peak above those before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = resident("VmRSS"), time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - started, "bytes": resident("VmHWM") - before}


def run_oneshot(method: str, windows: int, length: int) -> dict[str, float]:
    """One run of oneshot in this process."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from loguru import logger
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from crepe_llm import samples
    from crepe_llm.recipe_files import recipe_path

    logger.remove()
    upstream = {"sparsity": 0.5, "mask_structure": "2:4", "ignore": ["re:.*lm_head"]}
    recipe = {
        "crepe": lambda: str(recipe_path("crepe_2of4")),
        "wanda": lambda: str(recipe_path("wanda_2of4")),
        "upstream-wanda": lambda: [WandaPruningModifier(**upstream)],
        "upstream-sparsegpt": lambda: [SparseGPTModifier(**upstream)],
    }[method]()
    folder = samples.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    train = samples.wikipedia().train
    data = samples.calibration_windows(tokenizer, train, windows=windows, length=length, seed=0)
    options = {"num_calibration_samples": windows, "shuffle_calibration_samples": False}
    return measured(lambda: oneshot(model=model, tokenizer=tokenizer, recipe=recipe, dataset=data, **options))


def layer_cases(rows: int, columns: int) -> dict[str, Callable[[], object]]:
    """Score + mask + zeroing of one layer: ours and llm-compressor's."""
    import torch
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight

    from crepe_llm.functional.masks import keep_mask
    from crepe_llm.functional.scores import crepe_scores

    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows, bias=False)
    square_sum = torch.rand(columns)

    def ours(structure: str, kernel_size: int, group: str = "row") -> torch.Tensor:
        with torch.no_grad():
            scores = crepe_scores(layer.weight, square_sum.sqrt(), kernel_size=kernel_size)
            return layer.weight.masked_fill(~keep_mask(scores, 0.5, structure, group), 0)

    def upstream(n: int, m: int) -> torch.Tensor:
        with torch.no_grad():
            return sparsify_weight(layer, {layer: square_sum}, 0.5, n, m)

    return {
        "CRePE 2:4, K = 3": lambda: ours("2:4", 3),
        "CRePE 2:4, K = 31": lambda: ours("2:4", 31),
        "llm-compressor Wanda 2:4": lambda: upstream(2, 4),
        "CRePE 50 % per row, K = 3": lambda: ours("0:0", 3),
        "CRePE 50 % per matrix, K = 3": lambda: ours("0:0", 3, "matrix"),
        "llm-compressor Wanda 50 % per row": lambda: upstream(0, 0),
    }


def table(rows: dict[str, list[dict[str, float]]], peers: dict[str, str]) -> str:
    """Markdown, medians, each row as a ratio to its peer's."""
    medians = {
        name: {field: statistics.median(run[field] for run in runs) for field in ("seconds", "bytes")}
        for name, runs in rows.items()
    }
    lines = ["| | seconds | peak memory, MB | time / peer | memory / peer |", "|---|---|---|---|---|"]
    for name, median in medians.items():
        peer = medians[peers[name]]
        lines.append(
            f"| {name} | {median['seconds']:.2f} | {median['bytes'] / 1e6:.0f} "
            f"| {median['seconds'] / peer['seconds']:.2f} | {median['bytes'] / max(peer['bytes'], 1):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, medians count (%(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (%(default)s)")
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], help="of the single layer")
    parser.add_argument("--only", choices=["oneshot", "layer"], help="one half of the benchmark")
    parser.add_argument("--one", choices=ONESHOT, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_oneshot(options.one, options.windows, options.length)))
        return

    if options.only != "layer":
        runs: dict[str, list[dict[str, float]]] = {LABELS[method]: [] for method in ONESHOT}
        for repeat in range(options.repeats):
            for method in ONESHOT:
                print(f"run {repeat + 1} of {options.repeats}: {LABELS[method]}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--one", method]
                command += ["--windows", str(options.windows), "--length", str(options.length)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs[LABELS[method]].append(json.loads(output.splitlines()[-1]))
        print(f"SmolLM2-135M, fp32, 2:4, {options.windows} x {options.length} calibration tokens:\n")
        print(table(runs, dict.fromkeys(runs, LABELS["upstream-wanda"])), "\n")
    if options.only != "oneshot":
        cases = layer_cases(*options.shape)
        timings: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
        for case in cases.values():
            case()  # first touches
        for _ in range(options.repeats):
            for name, case in cases.items():
                timings[name].append(measured(case))
        peers = {name: "llm-compressor Wanda " + ("2:4" if "2:4" in name else "50 % per row") for name in cases}
        print(f"Score, mask and zeroing of one {options.shape[0]} x {options.shape[1]} fp32 layer:\n")
        print(table(timings, peers))


if __name__ == "__main__":
    main()
