"""Reconstruction of sub-blocks: kept weights trained on the dense model's activations, a few parts at a time.

    python benchmarks/subblock.py --models SmolLM2-135M-Instruct --starts CRePE "CRePE + pcg" "CRePE + admm"
    python benchmarks/subblock.py --parts 1 2 4 --targets dense local --learning-rates 1e-4 --epochs 4
    python benchmarks/subblock.py --report

A start is a method of methods.py without a permutation of channels. Its parts (attention, feed-forward) are trained in
the order of the network, --parts at a time: kept weights, norms and biases, by AdamW under the mask, on windows of the
training articles. The target is what the dense parts give, on the dense model's own stream ("dense") or on the pruned
one ("local"); 0.5 of "mixed" lies half way. A token's squared error is divided by that of its target, so that the few
tokens with huge activations do not decide alone. Every eighth window is kept aside: the best epoch by those counts, and
parts that do not get better are left as they were.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from crepe_llm import samples
from crepe_llm.models.blocks import find_blocks
from crepe_llm.training.masked import keep_masks
from crepe_llm.training.models import load_pruned
from method_recipes import METHODS, MODELS
from records import RESULTS, Row, append, is_done, read
from recover import CORPORA, mean_of, measure, pruned, starts_of

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1

STARTS = ["CRePE", "CRePE + pcg", "CRePE + admm"]
# The share of the error that earlier parts have accumulated which the target makes up for.
TARGETS = {"local": 0.0, "mixed": 0.5, "dense": 1.0}
EVERY = 8


@dataclass
class Part:
    """Attention or feed-forward of one block, with its norms and the residual connection."""

    block: torch.nn.Module
    attention: bool
    arguments: dict[str, Any] = field(repr=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, tokens, d] after the part."""
        sandwich = hasattr(self.block, "pre_feedforward_layernorm")
        if self.attention:
            out = self.block.self_attn(hidden_states=self.block.input_layernorm(x), **self.arguments)[0]
            return x + (self.block.post_attention_layernorm(out) if sandwich else out)
        if sandwich:
            return x + self.block.post_feedforward_layernorm(self.block.mlp(self.block.pre_feedforward_layernorm(x)))
        return x + self.block.mlp(self.block.post_attention_layernorm(x))

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Those that the part alone uses."""
        first = ("self_attn", "input_layernorm")
        if hasattr(self.block, "pre_feedforward_layernorm"):
            first += ("post_attention_layernorm",)
        for name, parameter in self.block.named_parameters():
            if name.startswith(first) == self.attention:
                yield parameter


def parts_of(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[Part]]:
    """What the first block is given for windows of tokens, and the model's parts in order."""
    blocks, seen, inputs = list(find_blocks(model).values()), {}, []

    def see(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module is blocks[0]:
            inputs.append(args[0] if args else kwargs["hidden_states"])
        names = ("position_embeddings", "attention_mask", "position_ids")
        seen[module] = {name: kwargs[name] for name in names if name in kwargs}

    handles = [block.register_forward_pre_hook(see, with_kwargs=True) for block in blocks]
    with torch.no_grad():
        for row in ids:
            model(row[None], use_cache=False)
            if len(inputs) == 1:
                for handle in handles[1:]:
                    handle.remove()
    for handle in handles:
        handle.remove()
    return torch.cat(inputs), [Part(block, attention, seen[block]) for block in blocks for attention in (True, False)]


def run(parts: Sequence[Part], x: torch.Tensor) -> torch.Tensor:
    """Hidden states after parts."""
    for part in parts:
        x = part(x)
    return x


@torch.no_grad()
def stream(parts: Sequence[Part], x: torch.Tensor, batch: int) -> torch.Tensor:
    """Hidden states after parts, a batch at a time."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([run(parts, rows).float() for rows in x.split(batch)])


def error(given: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error relative to the target's squared norm."""
    return ((given - target).square().sum(-1) / target.square().sum(-1)).mean()


def train(parts: Sequence[Part], x: torch.Tensor, target: torch.Tensor, options: argparse.Namespace) -> float:
    """Train parts in place; the held-out error afterwards over that before, 1 where they are left as they were."""
    aside = torch.arange(len(x)) % EVERY == 0
    parameters = [parameter for part in parts for parameter in part.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)

    def held_out() -> float:
        return float(error(stream(parts, x[aside], options.batch), target[aside]))

    first = best = held_out()
    kept = [parameter.detach().clone() for parameter in parameters]
    given, wanted = x[~aside], target[~aside]
    steps = options.epochs * -(-len(given) // options.batch)
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(options.epochs):
        for rows in torch.randperm(len(given)).split(options.batch):
            with torch.autocast("cpu", torch.bfloat16):
                loss = error(run(parts, given[rows]).float(), wanted[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        now = held_out()
        if now < best:
            best, kept = now, [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value).requires_grad_(False)
    return best / first


def reconstruct(model: Any, dense: Any, ids: torch.Tensor, options: argparse.Namespace) -> Row:
    """Train all parts of a model in turn; how many got better, and by how much."""
    for parameter in [*model.parameters(), *dense.parameters()]:
        parameter.requires_grad_(False)
    masks = keep_masks(model)
    x, parts = parts_of(model, ids)
    dense_x, dense_parts = parts_of(dense, ids)
    ratios = []
    for start in tqdm(range(0, len(parts), options.parts), unit=" parts", leave=False):
        own, twins = parts[start : start + options.parts], dense_parts[start : start + options.parts]
        local = stream(twins, x, options.batch)
        dense_x = stream(twins, dense_x, options.batch)
        target = torch.lerp(local, dense_x, TARGETS[options.target])
        ratios.append(train(own, x, target, options))
        x = stream(own, x, options.batch)
    masks.check()
    masks.remove()
    return {
        "better": sum(ratio < 1 for ratio in ratios) / len(ratios),
        "held_out_ratio": statistics.geometric_mean(ratios),
    }


def keys_of(options: argparse.Namespace) -> list[tuple[Row, argparse.Namespace]]:
    """The conditions of every row, with the options of its training; none for the start itself."""
    keys = []
    for start in starts_of(options):
        if start["method"] == "dense":
            continue
        run = {name: value for name, value in start.items() if name not in ("method", "tokens")}
        run |= {"start": start["method"], "measured": start["tokens"]}
        keys.append((run | {"parts": 0}, argparse.Namespace()))
        for parts in options.parts:
            for target in options.targets:
                for rate in options.learning_rates:
                    fields = {"parts": parts, "target": target, "learning_rate": rate, "epochs": options.epochs}
                    fields |= {"text": options.text, "batch": options.batch}
                    keys.append((run | fields, argparse.Namespace(**fields)))
    return keys


def row_of(key: Row, options: argparse.Namespace, folder: Path) -> Row:
    """Prune, train the parts where the key names a way, and measure."""
    dense_folder = MODELS[key["model"]]()
    source, seconds = pruned({name: value for name, value in key.items() if name != "parts"}, folder)
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    model = load_pruned(source, torch.float32).eval()
    row = key | {"pruning_s": seconds}
    if key["parts"]:
        dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32).eval()
        windows = samples.token_windows(tokenizer, samples.wikipedia().train, key["length"])
        torch.manual_seed(key["seed"])
        ids = windows[torch.randperm(len(windows))[: key["text"]]]
        started = time.perf_counter()
        row |= reconstruct(model, dense, ids, options)
        row["training_s"] = round(time.perf_counter() - started, 1)
    return row | measure(model.to(getattr(torch, key["dtype"])), tokenizer, key["length"], key["measured"])


def table(rows: list[Row]) -> str:
    """Markdown: a line for each start and way of training; means over seeds."""
    lines = ["| model | start | parts | target | rate | test | validation | news | minutes |", "|---" * 9 + "|"]
    cells = ("model", "start", "parts", "target", "learning_rate", "epochs", "text")
    for cell in dict.fromkeys(tuple(row.get(name, "") for name in cells) for row in rows):
        mine = [row for row in rows if tuple(row.get(name, "") for name in cells) == cell]
        seconds = [row["training_s"] for row in mine if "training_s" in row]
        figures = " | ".join(mean_of(mine, corpus) for corpus in CORPORA)
        minutes = f"{statistics.mean(seconds) / 60:.0f}" if seconds else ""
        model, start, parts, target, rate = cell[:5]
        lines.append(f"| {model} | {start} | {parts or ''} | {target} | {rate} | {figures} | {minutes} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["SmolLM2-135M-Instruct"])
    parser.add_argument(
        "--starts", nargs="+", choices=METHODS, default=STARTS, metavar="METHOD", help="of: %(choices)s"
    )
    parser.add_argument("--parts", nargs="+", type=int, default=[1], help="trained together (%(default)s)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-4])
    parser.add_argument("--epochs", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--text", type=int, default=64, help="training windows (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="windows a step (%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of calibration and training")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of every window (%(default)s)")
    parser.add_argument("--measured", type=int, default=8192, help="tokens of each corpus (%(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of the folders")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-models"), help="where models are kept")
    parser.add_argument("--results", type=Path, default=RESULTS / "subblock.jsonl")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    options.structures = ["2:4"]
    keys, rows = keys_of(options), read(options.results)
    missing = [] if options.report else [pair for pair in keys if not is_done(pair[0], rows, PROTOCOL)]
    for key, fields in tqdm(missing, unit=" runs"):
        rows.append(append(options.results, PROTOCOL, row_of(key, fields, options.folder)))
    print(table([row for key, _ in keys for row in rows if is_done(key, [row], PROTOCOL)]))


if __name__ == "__main__":
    main()
