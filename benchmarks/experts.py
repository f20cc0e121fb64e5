"""Times the grouped 2:4 product of a layer of experts against vLLM's dense fused experts of the same shape, on a CPU.

    python benchmarks/experts.py                     # all shapes, 1 and 8 tokens
    python benchmarks/experts.py --dtype int8        # INT8 2:4 weights; the dense ones stay bf16
    python benchmarks/experts.py --shape 4x2x128x64 --tokens 1 --seconds 0.1

A call is the whole of what comes after the router, as vLLM's plugin does it: tokens sorted by expert, gate and up, the
activation, down and the weighted sum. Ours and vLLM's alternate call by call on the same masked weights and the same
random routings, one in turn of many; the table has medians (--fastest: minima). Outputs are compared first. "vLLM" is
the fastest of its kernels that run here (vec; amx where the processor has it), from its prepacked weights.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from crepe_llm import kernels
from crepe_llm.kernels import cpu
from crepe_llm.kernels.experts import mixture, pack_experts
from crepe_llm.kernels.packed import PackedExperts, PackedWeight
from kernel import time_alternating
from records import RESULTS, append

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1
ROUTINGS = 32


class Shape(NamedTuple):
    """Experts, how many of them a token has, the channels of the model and those of an expert."""

    experts: int
    chosen: int
    hidden: int
    inner: int


SHAPES = {
    "Mixtral-8x7B, half as wide": Shape(8, 2, 2048, 7168),
    "Qwen3-30B-A3B, a quarter of its experts": Shape(32, 8, 2048, 768),
    "Granite-3.1-1B-A400M": Shape(32, 8, 1024, 512),
}


def masked(rows: int, columns: int) -> torch.Tensor:
    """A random 2:4 weight in bf16."""
    keep = torch.rand(rows, columns // 4, 4).argsort(-1) < 2
    return (torch.randn(rows, columns) * columns**-0.5 * keep.view(rows, columns)).bfloat16()


def packed(weights: torch.Tensor, dtype: str) -> PackedExperts:
    """The weights [experts, N, K] packed in bf16, or rounded to INT8 with a scale a row."""

    def one(weight: torch.Tensor) -> PackedWeight:
        if dtype == "bf16":
            made = kernels.pack(weight)
        else:
            scale = weight.float().abs().amax(-1) / 127
            made = kernels.pack((weight.float() / scale[:, None]).round().to(torch.int8), scale)
        assert isinstance(made, PackedWeight)
        return made

    return pack_experts(map(one, weights), len(weights))


def calls_of(shape: Shape, tokens: int, dtype: str) -> dict[str, Callable[[int], torch.Tensor]]:
    """Ours and vLLM's, by name: the output of routing number ``i``."""
    from vllm import _custom_ops as ops

    both = torch.stack([masked(2 * shape.inner, shape.hidden) for _ in range(shape.experts)])
    down = torch.stack([masked(shape.hidden, shape.inner) for _ in range(shape.experts)])
    layers = packed(both, dtype), packed(down, dtype)
    x = torch.randn(tokens, shape.hidden).bfloat16()
    ids = [torch.rand(tokens, shape.experts).topk(shape.chosen).indices.int() for _ in range(ROUTINGS)]
    shares = torch.rand(tokens, shape.chosen).softmax(-1)

    def ours(i: int) -> torch.Tensor:
        return mixture(x, ids[i % ROUTINGS], shares, layers, "silu")

    def dense(isa: str) -> Callable[[int], torch.Tensor]:
        ready = [ops.cpu_prepack_moe_weight(weight, isa) for weight in (both, down)]

        def call(i: int) -> torch.Tensor:
            out = torch.empty_like(x)
            ops.cpu_fused_moe(out, x, *ready, None, None, shares, ids[i % ROUTINGS], "silu", isa)
            return out

        return call

    kinds = ["vec"] + ["amx"] * torch.cpu._is_amx_tile_supported()
    return {"ours": ours} | {isa: dense(isa) for isa in kinds}


def compare(calls: dict[str, Callable[[int], torch.Tensor]], tolerance: float) -> None:
    """Raise ValueError where a call's output differs from ours by more than ``tolerance`` of the largest output."""
    wanted = calls["ours"](0).float()
    for name, call in calls.items():
        apart = float((call(0).float() - wanted).abs().max() / wanted.abs().max())
        if not apart <= tolerance:
            raise ValueError(f"outputs of {name} differ from ours by {apart:.3f} of the largest")


def measure(name: str, shape: Shape, tokens: int, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one shape and number of tokens."""
    calls = calls_of(shape, tokens, options.dtype)
    compare(calls, 0.02 if options.dtype == "bf16" else 0.06)
    summary = min if options.fastest else statistics.median
    times = time_alternating(dict(calls), options.seconds, summary)
    ours = times.pop("ours")
    return {"shape": name, **shape._asdict(), "tokens": tokens, "ours": ours, "dense": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bf16", "int8"), default="bf16", help="2:4 weights")
    parser.add_argument("--shape", action="append", help="EXPERTSxCHOSENxHIDDENxINNER; may be repeated")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8], help="token counts")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each row of the table")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--fastest", action="store_true", help="fastest call, not the median: for a machine with other work"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "experts.jsonl", help="a row a line of the table")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    shapes = {s: Shape(*map(int, s.split("x"))) for s in options.shape} if options.shape else SHAPES
    conditions = {
        **{"dtype": options.dtype, "seconds": options.seconds},
        **{"summary": "fastest calls" if options.fastest else "medians", "threads": torch.get_num_threads()},
        "instruction_set": cpu.default_instruction_set(),
    }
    print("| experts | tokens | ours, ms | vLLM dense, ms | which | ours is faster |")
    print("|---|---|---|---|---|---|")
    for name, shape in shapes.items():
        for tokens in options.tokens:
            row = measure(name, shape, tokens, options)
            append(options.results, PROTOCOL, conditions | row)
            which = min(row["dense"], key=row["dense"].__getitem__)
            ours, other = row["ours"], row["dense"][which]
            print(
                f"| {name} | {tokens} | {1e3 * ours:.3f} | {1e3 * other:.3f} | {which} | {other / ours:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
