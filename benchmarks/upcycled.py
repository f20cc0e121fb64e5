"""Experts pruned by the statistics of their own tokens, of all tokens, or between: on a model made of a dense one.

    python benchmarks/upcycled.py                                  # makes the model, then prunes it in each way
    python benchmarks/upcycled.py --folder made --steps 30         # and keeps it, or takes it from there
    python benchmarks/upcycled.py --report

No trained mixture of experts of a size for these machines is in the package registries, so one is made of
SmolLM2-135M-Instruct. The feed-forward part of each block is copied into --experts experts, of which a router picks two
for each token. The router's directions are the centres of a k-means of its inputs. Routers and experts are then trained
for --steps steps on the training articles, so that the experts differ. That is far less than a mixture is trained for:
figures compare ways to prune this model, and say nothing of its quality.

2:4 masks are those of the recipe crepe_2of4. What differs is which tokens count in an expert's input norms:
routed: those that the router sends to it; all: every token, as llm-compressor calibrates by default; shrunk: both, each
token a quarter and those of the expert one more, which is a weight of n_e / (n_e + n / 4) on its own mean square;
default: routed, and others a thousandth, as this package does it.
Every run is a row of --results, with the loss of each window of the test: ways are compared window by window.
"""

import argparse
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from crepe_llm import samples
from crepe_llm.evaluation.perplexity import perplexity
from crepe_llm.modifiers import routing
from records import RESULTS, Row, append, is_done, read

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1
RECIPE = "crepe_2of4"
CHOSEN = 2
# How much a token counts for an expert that it is not routed to, beside 1 for the expert's own.
WAYS = {"routed": 0.0, "all": 1.0, "shrunk": 0.2, "default": routing.UNROUTED}


@torch.no_grad()
def upcycled(dense: Any, windows: torch.Tensor, experts: int) -> Any:
    """A Mixtral that gives what a dense Llama gives: its feed-forward part in every expert, and routers.

    Args:
        dense: the Llama, in fp32.
        windows: int64 [windows, length], the text whose hidden states the routers are made of.
        experts: how many experts a block has.
    """
    source = dense.config.to_dict()
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    same += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "hidden_act")
    same += ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "initializer_range")
    config = MixtralConfig(
        **{name: source[name] for name in same if name in source},
        head_dim=dense.model.layers[0].self_attn.head_dim,
        num_local_experts=experts,
        num_experts_per_tok=CHOSEN,
        sliding_window=None,
    )
    mixture = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    mixture.load_state_dict({n: t for n, t in dense.state_dict().items() if ".mlp." not in n}, strict=False)
    for block, given, inputs in zip(mixture.model.layers, dense.model.layers, _inputs_of(dense, windows), strict=True):
        block.mlp.experts.gate_up_proj.copy_(torch.cat([given.mlp.gate_proj.weight, given.mlp.up_proj.weight]))
        block.mlp.experts.down_proj.copy_(given.mlp.down_proj.weight)
        block.mlp.gate.weight.copy_(router(inputs, experts))
    return mixture


def router(inputs: torch.Tensor, experts: int) -> torch.Tensor:
    """Directions [experts, d] towards the centres of a k-means of unit vectors; logits have a deviation of one.

    Args:
        inputs: fp32 [tokens, d].
        experts: how many centres.
    """
    units = torch.nn.functional.normalize(inputs - inputs.mean(0), dim=-1)
    centres = units[torch.linspace(0, len(units) - 1, experts).long()]
    for _ in range(20):
        nearest = (units @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, units)
        centres = torch.where(sums.norm(dim=-1, keepdim=True) > 0, torch.nn.functional.normalize(sums, dim=-1), centres)
    directions = centres - centres.mean(0)
    return directions / (inputs @ directions.T).std()


def _inputs_of(dense: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """The inputs [tokens, d] of each block's feed-forward part."""
    found: list[list[torch.Tensor]] = [[] for _ in dense.model.layers]
    handles = [
        block.mlp.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0].flatten(0, -2)))
        for block, kept in zip(dense.model.layers, found, strict=True)
    ]
    for window in windows:
        dense(window[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(kept) for kept in found]


def train(mixture: Any, windows: torch.Tensor, batch: int, rate: float) -> list[float]:
    """Train routers and experts on windows int64 [windows, length], one after the other; the loss of each step.

    Args:
        mixture: in fp32; changed in place.
        windows: each is used once.
        batch: windows a step.
        rate: Adafactor's learning rate, relative to the size of a parameter.
    """
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    optimiser = torch.optim.Adafactor([p for p in mixture.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step, ids in enumerate(windows.split(batch)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = mixture(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}", flush=True)
    return losses


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write the upcycled and trained model to a folder."""
    source = samples.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    windows = _windows(tokenizer, options.steps * options.batch, options.length, seed=1000)
    mixture = upcycled(dense, windows[: options.batch * 4], options.experts)
    del dense
    losses = train(mixture, windows, options.batch, options.rate)
    key = {"model": "SmolLM2-135M-Instruct upcycled", "made": made_of(options)}
    apart = [_apart(block.mlp.experts.gate_up_proj) for block in mixture.model.layers]
    row = {"loss_first": losses[0], "loss_last": losses[-1], "experts_apart": statistics.mean(apart)}
    append(options.results, PROTOCOL, key | row)
    mixture.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def made_of(options: argparse.Namespace) -> Row:
    """How the model is made."""
    return {name: getattr(options, name) for name in ("experts", "steps", "batch", "length", "rate")}


def _apart(experts: torch.Tensor) -> float:
    """How far experts [experts, rows, columns] are from their mean, relative to its norm."""
    mean = experts.detach().mean(0)
    return float((experts.detach() - mean).norm() / (math.sqrt(len(experts)) * mean.norm()))


def _windows(tokenizer: Any, count: int, length: int, seed: int) -> torch.Tensor:
    data = samples.calibration_windows(tokenizer, samples.wikipedia().train, windows=count, length=length, seed=seed)
    return torch.tensor(data["input_ids"])


def prune(folder: Path, way: str, data: Any) -> Any:
    """The model of a folder, pruned by the recipe with tokens that count in one of the WAYS."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    reset_session()
    with patch_attr(routing, "UNROUTED", WAYS[way]):
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            recipe=RECIPE,
            dataset=data,
            num_calibration_samples=len(data),
            shuffle_calibration_samples=False,
            moe_calibrate_all_experts=True,
        )
    return model


def run(folder: Path, options: argparse.Namespace) -> None:
    """Append a row for the dense model and one for each way and seed, where there is none yet."""
    tokenizer, corpus = AutoTokenizer.from_pretrained(folder), samples.wikipedia()
    test = samples.token_windows(tokenizer, corpus.test, options.window, tokens=options.tokens)
    key = {"model": "SmolLM2-135M-Instruct upcycled", "made": made_of(options), "corpus": corpus.name}
    key |= {"tokens": options.tokens, "window": options.window}
    calibration = {"recipe": RECIPE, "windows": options.windows}
    keys = [key | {"way": "dense"}]
    keys += [key | calibration | {"way": way, "seed": seed} for seed in options.seeds for way in options.ways]
    for one in keys:
        if is_done(one, read(options.results), PROTOCOL):
            continue
        if one["way"] == "dense":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        else:
            data = samples.calibration_windows(
                tokenizer, corpus.train, windows=options.windows, length=options.length, seed=one["seed"]
            )
            model = prune(folder, one["way"], data)
        losses = [perplexity(model, window[None], corpus=corpus.name, progress=False).nll for window in test]
        found = math.exp(statistics.mean(losses))
        append(options.results, PROTOCOL, one | {"perplexity": found, "losses": losses})
        print(f"{one['way']}, seed {one.get('seed')}: perplexity {found:.3f}", flush=True)


def report(rows: list[Row]) -> str:
    """Tables of the newest protocol's perplexities, one for each set of conditions, and what the ways differ by."""
    rows = [row for row in rows if row["protocol"] == PROTOCOL and "perplexity" in row]
    dense = [row for row in rows if row["way"] == "dense"]
    pruned = [row for row in rows if row["way"] != "dense"]
    tables = []
    for windows, tokens in sorted({(row["windows"], row["tokens"]) for row in pruned}):
        mine = [row for row in pruned if (row["windows"], row["tokens"]) == (windows, tokens)]
        same = [row for row in dense if row["tokens"] == tokens]
        said = f"{windows} calibration windows, {tokens} tokens of the test:"
        tables.append("\n".join([said, "", *_table(mine, same), "", *_differences(mine)]))
    return "\n\n".join(tables)


def _table(pruned: list[Row], dense: list[Row]) -> list[str]:
    """A row for each way, a column for each seed."""
    seeds = sorted({row["seed"] for row in pruned})
    lines = [f"| tokens that count | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (1 + len(seeds)) + "|"]
    for row in dense:
        lines.append("| dense " + len(seeds) * f"| {row['perplexity']:.2f} " + "|")
    for way in WAYS:
        mine = {row["seed"]: f"{row['perplexity']:.2f}" for row in pruned if row["way"] == way}
        lines.append(f"| {way} | {' | '.join(mine.get(seed, '') for seed in seeds)} |")
    return lines


def _differences(pruned: list[Row]) -> list[str]:
    """For each way and seed, how much higher the loss is than with routed tokens: mean and standard error over the
    test's windows; and the same over the seeds' means."""
    losses = {(row["way"], row["seed"]): row["losses"] for row in pruned if "losses" in row}
    lines = []
    for way in (way for way in WAYS if way != "routed"):
        seeds = sorted(seed for other, seed in losses if other == way and ("routed", seed) in losses)
        means = []
        for seed in seeds:
            apart = [one - other for one, other in zip(losses[way, seed], losses["routed", seed], strict=True)]
            means.append(statistics.mean(apart))
            lines.append(f"- {way} less routed, seed {seed}: {_with_error(apart)} nats over {len(apart)} windows")
        if len(means) > 1:
            lines.append(f"- {way} less routed, {len(means)} seeds: {_with_error(means)} nats")
    return lines


def _with_error(values: list[float]) -> str:
    """The mean and its standard error."""
    return f"{statistics.mean(values):+.4f} +- {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the upcycled model; made if it is not there")
    parser.add_argument("--experts", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="windows a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=5e-3, help="Adafactor's learning rate (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens a window, also of calibration (%(default)s)")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows (%(default)s)")
    parser.add_argument("--window", type=int, default=512, help="tokens a window of the test (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the test text (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the calibration windows")
    parser.add_argument("--results", type=Path, default=RESULTS / "upcycled.jsonl")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.manual_seed(0)
    logger.remove()
    if not options.report:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.folder or Path(scratch) / "model"
            if not (folder / "config.json").is_file():
                make(folder, options)
            run(folder, options)
    print(report(read(options.results)))


if __name__ == "__main__":
    main()
