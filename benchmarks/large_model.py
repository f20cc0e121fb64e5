"""Peak memory and time of pruning a model in Llama-3-8B's shape of which only a part is in memory.

    python benchmarks/large_model.py --memory 2                                # 32 blocks: 42 GB of disk
    python benchmarks/large_model.py --memory 2 --blocks 4 --recipe ADMM       # ADMM, without channel permutation

A checkpoint of random weights (bf16, an untied head of 128,256 words, shards of 2 GB) is written, and `crepe prune`
prunes it in a process of its own. Its memory is sampled every 50 ms: `anonymous` is what the process needs, `resident`
has the pages of weight files, too, that the system holds as long as there is room for them. Blocks are pruned one after
the other, so the number of blocks changes the time, the disk and the head's share, not what a block takes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from crepe_llm import samples
from crepe_llm.checkpoints import read_folder
from records import RESULTS, append
from revisions import ROOT

PROTOCOL = 1
SHAPES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 49152,
    },
}
SHARD_BYTES = 2 * 10**9
ADMM = "ADMM"


def write_model(folder: Path, shape: str, blocks: int) -> int:
    """Write a Llama of random weights, a shard at a time; its bytes."""
    config = LlamaConfig(
        **SHAPES[shape], num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(samples.smollm2()).save_pretrained(folder)
    hidden, ffn, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    keys = hidden // heads * config.num_key_value_heads
    layers = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden)}
    layers |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)}
    layers |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for block in range(blocks):
        sizes |= {f"model.layers.{block}.{name}.weight": size for name, size in layers.items()}
        sizes |= {
            f"model.layers.{block}.{name}.weight": (hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    sizes |= {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, size in sizes.items():
        weight = torch.empty(size, dtype=torch.bfloat16)
        shard[name] = weight.normal_(0, 0.02, generator=generator) if len(size) > 1 else weight.fill_(1)
        total += weight.nbytes
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def recipe_file(name: str, folder: Path) -> Path:
    """A shipped recipe, or crepe_2of4_best without channel permutation."""
    stages = yaml.safe_load((ROOT / "recipes" / f"{'crepe_2of4_best' if name == ADMM else name}.yaml").read_text())
    for stage in stages.values():
        for modifiers in stage.values():
            if name == ADMM:
                modifiers.pop("ChannelPermutationModifier", None)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(stages, sort_keys=False))
    return path


def prune(command: list[str]) -> tuple[dict[str, int], float]:
    """Run a command; its peaks of memory, anonymous and all that is resident, and its seconds."""
    started, peaks = time.perf_counter(), {"RssAnon": 0, "VmRSS": 0}
    process = subprocess.Popen(command)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for line in lines:
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return {"anonymous": peaks["RssAnon"], "resident": peaks["VmRSS"]}, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int, default=32, help="of the model (%(default)s)")
    parser.add_argument("--recipe", default="crepe_2of4", help=f"a shipped one, or {ADMM} (%(default)s)")
    parser.add_argument("--memory", type=float, required=True, metavar="GB", help="of weights that are held in memory")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path(), help="where the models are written, and removed")
    parser.add_argument("--results", type=Path, default=RESULTS / "large_model.jsonl", help="a row a run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="large-", dir=options.folder) as name:
        model, output = Path(name, "dense"), Path(name, "pruned")
        model.mkdir()
        dense = write_model(model, options.shape, options.blocks)
        command = [sys.executable, "-m", "crepe_llm", "prune", str(model), "--output", str(output), "--sample"]
        command += ["--recipe", str(recipe_file(options.recipe, Path(name))), "--memory", str(options.memory)]
        command += ["--samples", str(options.samples), "--length", str(options.length)]
        peaks, seconds = prune(command)
        written = read_folder(output)
        row = {name: getattr(options, name) for name in ("shape", "blocks", "recipe", "memory", "samples", "length")}
        row |= {"dense_bytes": dense, "packed_layers": len(written.layers), "shards": len(written.files)}
        row |= {"packed_bytes": sum(file.stat().st_size for file in written.files), **peaks, "seconds": seconds}
    append(options.results, PROTOCOL, row)
    print(
        f"{options.shape}, {options.blocks} blocks, {dense / 1e9:.1f} GB, {options.memory:g} GB of it in memory, "
        f"{options.recipe}: at most {peaks['anonymous'] / 1e9:.2f} GB anonymous, {peaks['resident'] / 1e9:.2f} GB with "
        f"mapped files; {seconds:.0f} s, {len(written.layers)} packed layers, {row['packed_bytes'] / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
