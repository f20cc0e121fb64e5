"""Times the kernels against torch's dense linears, on shapes of Llama-3.2-1B, Llama-3-8B and SmolLM2.

    python benchmarks/kernel.py                      # all shapes and token counts: several minutes
    python benchmarks/kernel.py --quick              # two shapes, four token counts
    python benchmarks/kernel.py --dense              # the dense kernel for few tokens (lm_head) instead
    python benchmarks/kernel.py --dense --dtype int8 # int8 rows, activations quantized as served
    python benchmarks/kernel.py --dtype bf16 int8_weight_only int4_g64   # several tables
    python benchmarks/kernel.py --shape 16x32 --tokens 1                 # what a call costs
    python benchmarks/kernel.py --dtype int8         # W8A8 2:4 weights
    python benchmarks/kernel.py --dtype int8_weight_only  # the same, activations not quantized
    python benchmarks/kernel.py --dtype int4_g64     # W4A16 2:4 weights, a scale for 64 columns
    python benchmarks/kernel.py --device cuda        # the GPU's products, whose plans are measured first

Ours and the dense products alternate call by call, each on its own copies of the weights, of which there are fewer for
fp32 and oneDNN's prepacked bf16: those of small shapes may stay in the caches, to dense's advantage. The table has
medians (--fastest: minima). "dense" is the fastest of torch's bf16 and fp32 linears (oneDNN and MKL) and oneDNN's
prepacked bf16 linear. Bytes per second count our packed weights once a call; the machine's read bandwidth is measured
in the same run.

The processors of the AVX2 generation are imitated by a run of its own (the variables act when libraries load):

    CREPE_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
        python benchmarks/kernel.py
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from crepe_llm import kernels
from crepe_llm.kernels import cpu
from crepe_llm.kernels.formats import COLUMN_CHUNK, FORMATS, ROW_BLOCK, Format
from crepe_llm.kernels.memory import on_huge_pages
from crepe_llm.kernels.packed import DenseWeight, PackedWeight, interleave, split
from records import RESULTS, append

# Raised by every change of a default or of how something is measured.
# 2: without gradients, as models are served; 3: dense "int8" quantizes activations, "int8_weight_only" does not.
PROTOCOL = 3

SHAPES = {  # N x K of the linears
    "square": (4096, 4096),
    "Llama-3-8B gate/up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
    "Llama-3.2-1B gate/up": (8192, 2048),
    "Llama-3.2-1B qkv": (3072, 2048),
    "SmolLM2-135M gate/up": (1536, 576),
}
DENSE_SHAPES = {"Llama-3.2-1B lm_head, a quarter": (32064, 2048), "SmolLM2-135M lm_head": (49152, 576)}
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "int8_weight_only": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
INT4 = [form.name for form in FORMATS.values() if form.bits == 4]
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
Shapes = dict[str, tuple[int, int]]


def random_packed(n: int, k: int, dtype: torch.dtype, inputs: str | None) -> PackedWeight:
    """A random 2:4 weight, packed a slice of rows at a time (a dense fp32 copy of a large one would not fit)."""
    parts = []
    step = max(ROW_BLOCK, (1 << 22) // k // ROW_BLOCK * ROW_BLOCK)
    for row in range(0, n, step):
        rows = min(step, n - row)
        weight = torch.randn(rows, k)
        weight *= (torch.rand(rows, k // 4, 4).argsort(-1) < 2).view(rows, k)
        parts.append(kernels.pack((weight * 30).to(dtype), inputs=inputs))
    scale = torch.full((n,), 0.01) if dtype == torch.int8 else None
    return PackedWeight(torch.cat([part.data for part in parts]), (n, k), parts[0].format, scale)


def random_int4(n: int, k: int, form: Format) -> PackedWeight:
    """A random 2:4 weight of 4-bit codes."""
    kept = split((torch.rand(n, k // 4, 4).argsort(-1) < 2).view(n, k).to(torch.float16))
    codes = torch.randint(0, 16, kept.values.shape, dtype=torch.uint8)
    dtype = torch.float32 if form.scale_group is None else torch.bfloat16
    scale = torch.full(form.packed_scale_shape(n, k), 0.01, dtype=dtype)
    return interleave(kept._replace(values=codes, format=form), scale)


def dense_weight(weight: torch.Tensor, dtype: str) -> DenseWeight:
    """A dense weight of a dtype of floats, or in int8 with a scale a row; "int8" quantizes activations, as served."""
    if dtype not in ("int8", "int8_weight_only"):
        return kernels.pack_dense(as_served(weight.to(DTYPES[dtype])))
    rows = as_served((weight * 30).clamp(-127, 127).to(torch.int8))
    return kernels.pack_dense(rows, torch.full((len(weight),), 0.03), "lanes" if dtype == "int8" else "exact")


def as_served(data: torch.Tensor) -> torch.Tensor:
    """A copy in memory as our vLLM plugin allocates it."""
    return on_huge_pages(torch.empty_like(data)).copy_(data)


def read_bandwidth(seconds: float) -> float:
    """Bytes per second of the fastest of several ways of reading memory once on all threads."""
    memory = torch.ones(1 << 26, dtype=torch.float32)
    vector = torch.ones(1, 1 << 13)
    matrix = memory.view(-1, 1 << 13)
    # Row blocks of ones, with fewer activations than rows: reading is all that the kernel has to do.
    form = FORMATS["bf16"]
    blocks = memory.nbytes // form.chunk_bytes // 256
    data = memory.view(torch.uint8)[: blocks * 256 * form.chunk_bytes]
    packed = PackedWeight(data, (blocks * ROW_BLOCK, 256 * COLUMN_CHUNK), form)
    ways: list[Callable[[], object]] = [
        memory.sum,
        lambda: torch.nn.functional.linear(vector, matrix),
        lambda: kernels.linear(vector, packed),
    ]
    best = 0.0
    for way in ways:
        end = time.perf_counter() + seconds / len(ways)
        while time.perf_counter() < end:
            start = time.perf_counter()
            way()
            best = max(best, packed.data.numel() / (time.perf_counter() - start))
    return best


def time_alternating(
    calls: dict[str, Callable[[int], object]], seconds: float, summary: Callable[[list[float]], float]
) -> dict[str, float]:
    """``summary`` of the seconds of each call; call ``i`` of each gets the number ``i``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    end, turn = time.perf_counter() + seconds, 0
    while turn < 5 or (time.perf_counter() < end and turn < 200):
        turn += 1
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn)
            times[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in times.items()}


def dense_calls(
    tokens: int, copies: list[torch.Tensor], wide: list[torch.Tensor]
) -> dict[str, Callable[[int], object]]:
    """torch's dense linears on rotating copies of a weight in bf16 (``copies``) and in fp32 (``wide``)."""
    k = copies[0].shape[1]
    x = {dtype: torch.randn(tokens, k).to(dtype) for dtype in (torch.bfloat16, torch.float32)}
    calls: dict[str, Callable[[int], object]] = {
        "torch bf16": lambda i: torch.nn.functional.linear(x[torch.bfloat16], copies[i % len(copies)]),
        "torch fp32": lambda i: torch.nn.functional.linear(x[torch.float32], wide[i % len(wide)]),
    }
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        ready = [torch.ops.mkldnn._reorder_linear_weight(w, tokens) for w in copies[:2]]
        calls["oneDNN bf16"] = lambda i: torch.ops.mkldnn._linear_pointwise(
            x[torch.bfloat16], ready[i % 2], None, "none", [], ""
        )
    return calls


def gpu_rows(shapes: Shapes, tokens: Sequence[int], options: argparse.Namespace) -> None:
    """The table for a GPU: what the plan chose, its time and dense bf16's, each call with an empty level-2 cache."""
    from triton.testing import do_bench

    from crepe_llm.kernels import cuda

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians\n")
    print("| shape N x K | tokens | product | ours, ms | GB/s | dense bf16, ms | ours is faster | memory |")
    print("|---|---|---|---|---|---|---|---|")
    dtype = DTYPES[options.dtype]
    activations = torch.bfloat16 if dtype.itemsize == 1 else dtype
    for name, (n, k) in shapes.items():
        weight = torch.randn(n, k, device="cuda")
        weight *= (torch.rand(n, k // 4, 4, device="cuda").argsort(-1) < 2).view(n, k)
        weight = weight.mul(30).clamp(-127, 127).to(dtype)
        packed = kernels.pack(weight, inputs="token" if dtype.itemsize == 1 else None)
        assert isinstance(packed, kernels.CudaWeight)
        dense, read = weight.to(torch.bfloat16), n * k // 2 * dtype.itemsize + n * k // 8
        for count in tokens:
            x = torch.randn(count, k, device="cuda", dtype=activations)
            half = x.to(torch.bfloat16)
            chosen = cuda.chosen(x.to(dtype), packed)
            ours = 1e-3 * do_bench(lambda x=x, w=packed: kernels.linear(x, w), return_mode="median")
            other = 1e-3 * do_bench(lambda x=half, w=dense: torch.nn.functional.linear(x, w), return_mode="median")
            row = {"shape": name, "n": n, "k": k, "tokens": count, "device": "cuda", "dtype": options.dtype}
            row |= {"product": f"{chosen.backend} {chosen.setting}", "ours": ours, "dense": {"torch bf16": other}}
            append(options.results, PROTOCOL, row | {"bytes_per_second": read / ours})
            print(
                f"| {name} {n} x {k} | {count} | {chosen.backend} {chosen.setting} | {1e3 * ours:.4f} "
                f"| {read / ours / 1e9:.0f} | {1e3 * other:.4f} | {other / ours:.2f} "
                f"| {packed.nbytes / dense.nbytes:.2f} of dense bf16 |",
                flush=True,
            )


def shape_rows(
    name: str, shape: tuple[int, int], tokens: Sequence[int], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The times of one shape on the CPU, a row for each token count."""
    n, k = shape
    if options.dtype in INT4:
        activations, packed = torch.bfloat16, random_int4(n, k, FORMATS[options.dtype])
    else:
        dtype = DTYPES[options.dtype]
        activations = torch.bfloat16 if dtype == torch.int8 else dtype
        packed = random_packed(n, k, dtype, "exact" if options.dtype == "int8_weight_only" else None)
    number = min(256, max(2, int(1.2e8 / packed.nbytes)))
    copies = [dataclasses.replace(packed, data=as_served(packed.data)) for _ in range(number)]
    dense = [torch.randn(n, k).bfloat16() for _ in range(min(256, max(2, int(1.2e8 / (2 * n * k)))))]
    wide = [dense[0].float(), dense[-1].float()]
    for count in tokens:
        x = torch.randn(count, k).to(activations)
        calls: dict[str, Callable[[int], object]] = dense_calls(count, dense, wide)
        if options.dense:
            wrapped = [dense_weight(w, options.dtype) for w in dense]
            calls["ours"] = lambda i, x=x, w=wrapped: cpu.multiply(x, w[i % len(w)], None)
        else:
            calls["ours"] = lambda i, x=x, w=copies: kernels.linear(x, w[i % len(w)])
        times = time_alternating(calls, options.seconds, min if options.fastest else statistics.median)
        ours = times.pop("ours")
        rate = (wrapped[0].nbytes if options.dense else packed.nbytes) / ours
        row = {"shape": name, "n": n, "k": k, "tokens": count, "ours": ours, "dense": times}
        yield row | {"bytes_per_second": rate}


def cpu_rows(shapes: Shapes, tokens: Sequence[int], options: argparse.Namespace) -> None:
    """The table for a CPU; every row is recorded as soon as it is measured."""
    bandwidth = read_bandwidth(2.0)
    instructions = cpu.default_instruction_set()
    settings = {v: os.environ[v] for v in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY") if v in os.environ}
    summary = "fastest calls" if options.fastest else "medians"
    print(f"{torch.get_num_threads()} threads, instruction set {instructions}, torch {torch.__version__}")
    print(f"{summary}, settings {settings or 'none'}, read bandwidth {bandwidth / 1e9:.1f} GB/s\n")
    print("| shape N x K | tokens | ours, ms | GB/s | share of bandwidth | best dense, ms | which | ours is faster |")
    print("|---|---|---|---|---|---|---|---|")
    conditions = {"device": "cpu", "dtype": options.dtype, "kernel": "dense" if options.dense else "2:4"}
    conditions |= {"summary": summary, "seconds": options.seconds, "read_bandwidth": bandwidth}
    conditions |= {"instruction_set": instructions, "settings": settings}
    for name, (n, k) in shapes.items():
        for row in shape_rows(name, (n, k), tokens, options):
            append(options.results, PROTOCOL, conditions | row)
            best = min(row["dense"], key=row["dense"].__getitem__)
            label = f"{n} x {k}" if name == f"{n}x{k}" else f"{name} {n} x {k}"
            ours, other, rate = row["ours"], row["dense"][best], row["bytes_per_second"]
            print(
                f"| {label} | {row['tokens']} | {1e3 * ours:.3f} | {rate / 1e9:.1f} | {rate / bandwidth:.0%} "
                f"| {1e3 * other:.3f} | {best} | {other / ours:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, token counts 1, 8, 64, 256")
    parser.add_argument("--dense", action="store_true", help="the dense kernel for few tokens instead of the 2:4 one")
    parser.add_argument(
        "--dtype", choices=[*DTYPES, *INT4], nargs="+", default=["bf16"], help="2:4 weights (fp8: cuda; int4: cpu)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", action="append", help="NxK instead of the built-in shapes; may be repeated")
    parser.add_argument("--tokens", type=int, nargs="+", help="token counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each row of the table")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument(
        "--fastest", action="store_true", help="fastest call, not the median: for a machine with other work"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "kernel.jsonl", help="a row a line of the table")
    arguments = parser.parse_args()
    unknown = set(arguments.dtype) & {*INT4, "fp8"} if arguments.dense else set()
    if arguments.device == "cuda":
        unknown |= set(arguments.dtype) & {*INT4, "int8_weight_only"}
    if unknown:
        parser.error(
            f"{'--dense' if arguments.dense else '--device cuda'} does not go with {', '.join(sorted(unknown))}"
        )

    torch.manual_seed(0)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = DENSE_SHAPES if arguments.dense else SHAPES
    if arguments.shape:
        shapes = {s: (int(s.split("x")[0]), int(s.split("x")[1])) for s in arguments.shape}
    elif arguments.quick:
        shapes = dict(list(shapes.items())[:2])
    tokens = arguments.tokens or ((1, 8, 64, 256) if arguments.quick else TOKENS[:6] if arguments.dense else TOKENS)
    rows = gpu_rows if arguments.device == "cuda" else cpu_rows
    for dtype in arguments.dtype:
        with torch.inference_mode():
            rows(shapes, tokens, argparse.Namespace(**{**vars(arguments), "dtype": dtype}))
        print()


if __name__ == "__main__":
    main()
