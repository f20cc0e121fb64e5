"""Memory and time of pruning blocks of Llama-3-8B's and Llama-3.2-1B's shapes, by this revision or by others.

    python benchmarks/memory.py --shape 1b --rev a2f28ac worktree     # before and after
    python benchmarks/memory.py --shape 8b --recipe crepe_2of4 --layers 1

A Llama of random weights (bf16, two blocks, a small vocabulary) is pruned by each revision, once for each number of
calibration tokens, each time in a process of its own. Memory is anonymous memory, sampled every 10 ms, above what the
process holds with the model loaded. Bytes a calibration token are the slope of its peak over the numbers of tokens.
The recipes are the shipped ones without channel permutation: of crepe_2of4_best, CRePE and ADMM are left; "pcg" is
crepe_2of4 and weight correction. With --short, ADMM and pcg make two iterations: they hold as much memory, and their
seconds say nothing. Every run is a row of --results.
"""

import argparse
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from revisions import ROOT, check_package, output_of, sources, start

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, **HEADS},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, **HEADS},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2},
}
RECIPES = ("crepe_2of4", "crepe_2of4_best")
CORRECTED = "pcg"
WORKTREE = "worktree"
VOCABULARY = 512
# Fields of a short run.
SHORT = {
    "ADMMModifier": {"rounds": 2, "iterations": 2, "refinement": 1},
    "WeightCorrectionModifier": {"iterations": 2},
}


def recipe_text(name: str, short: bool = False) -> str:
    """A shipped recipe of the working tree without channel permutation, or with weight correction, as YAML."""
    import yaml

    shipped = "crepe_2of4" if name == CORRECTED else name
    stages = yaml.safe_load((ROOT / "recipes" / f"{shipped}.yaml").read_text())
    for stage in stages.values():
        for modifiers in stage.values():
            modifiers.pop("ChannelPermutationModifier", None)
            if name == CORRECTED:
                modifiers["WeightCorrectionModifier"] = {"method": "pcg"}
            for modifier, fields in modifiers.items():
                fields |= SHORT.get(modifier, {}) if short else {}
    return yaml.safe_dump(stages, sort_keys=False)


class PeakMemory:
    """The largest anonymous memory of this process within a `with` block, in bytes above that at its start."""

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self.before = self.largest = self._now()
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._sampler.join()

    @property
    def growth(self) -> int:
        return self.largest - self.before

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            self.largest = max(self.largest, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def prune(job: dict[str, Any]) -> dict[str, float]:
    """One oneshot in this process, of whatever revision's package it imports."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from loguru import logger
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    logger.remove()
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[job["shape"]], vocab_size=VOCABULARY, num_hidden_layers=job["layers"])
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    config.save_pretrained("model")  # llm-compressor reads it again from where the model says that it came from
    model.config._name_or_path = "model"
    windows = job["tokens"] // job["length"]
    ids = torch.randint(VOCABULARY, (windows, job["length"]))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    options = {"num_calibration_samples": windows, "shuffle_calibration_samples": False}
    started = time.perf_counter()
    with PeakMemory() as memory:
        oneshot(model=model, tokenizer=tokenizer, recipe=job["recipe_text"], dataset=data, **options)
    return {
        "bytes": memory.growth,
        "process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": time.perf_counter() - started,
    }


def measured(job: dict[str, Any], source: Path) -> dict[str, float]:
    """One run of `prune` in a process of its own, with the package of `source` and a thread for each core."""
    with tempfile.TemporaryDirectory() as folder:
        worker = ["--worker", str(source), json.dumps(job)]
        process = start(Path(__file__), worker, source, Path(folder), threads=os.cpu_count() or 1)
        return json.loads(output_of(process).splitlines()[-1])


def commit_of(revision: str) -> str:
    """The full name of a revision's commit.

    Raises:
        subprocess.CalledProcessError: git knows no such revision.
    """
    command = ["git", "-C", str(ROOT), "rev-parse", f"{revision}^{{commit}}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def compare(options: argparse.Namespace, shape: str, recipe: str) -> None:
    """Measure, record and print one shape and recipe by every revision."""
    from records import append

    for revision in options.rev:
        measured_commit = None if revision == WORKTREE else commit_of(revision)
        rows = []
        with sources(measured_commit) as source:
            for tokens in sorted(options.tokens):
                job = {"shape": shape, "layers": options.layers, "tokens": tokens, "length": options.length}
                job |= {"recipe": recipe, "recipe_text": recipe_text(recipe, options.short)}
                row = {**job, "measured_commit": measured_commit, **measured(job, source)}
                rows.append(append(options.results, PROTOCOL, row))
        peaks = [row["bytes"] for row in rows]
        several = len(rows) > 1
        slope = f"{statistics.linear_regression(sorted(options.tokens), peaks).slope:.0f}" if several else ""
        last = rows[-1]
        print(
            f"| {shape} x {options.layers} | {recipe} | {revision} | {last['tokens']} | {last['bytes'] / 1e6:.0f} "
            f"| {last['process_bytes'] / 1e6:.0f} | {slope} | {last['seconds']:.1f} |",
            flush=True,
        )


def main() -> None:
    from records import RESULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b", "8b"], help="of a block (1b 8b)")
    parser.add_argument("--recipe", nargs="+", choices=(*RECIPES, CORRECTED), default=list(RECIPES))
    parser.add_argument("--rev", nargs="+", default=[WORKTREE], help="git revisions; %(default)s: files as they are")
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192], help="of calibration (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model (%(default)s)")
    parser.add_argument("--short", action="store_true", help="two iterations, for memory alone")
    parser.add_argument("--results", type=Path, default=RESULTS / "memory.jsonl", help="a row a run")
    options = parser.parse_args()
    print("| blocks | recipe | revision | tokens | above the model, MB | process, MB | bytes a token | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in options.shape:
        for recipe in options.recipe:
            compare(options, shape, recipe)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        check_package(Path(sys.argv[2]))
        print(json.dumps(prune(json.loads(sys.argv[3]))))
    else:
        main()
