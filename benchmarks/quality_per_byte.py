"""Perplexity beside the bytes of weights that a decoded token reads: dense and 2:4 models, of 16, 8 and 4 bits.

    python benchmarks/quality_per_byte.py                     # from the records of benchmarks/quantization.py
    python benchmarks/quality_per_byte.py --models SmolLM2-135M-Instruct

Nothing is measured. Bytes are those of the formats that vLLM and this package's kernels multiply by on a CPU: the
linear layers at so many bits a weight, and the output head in bf16 or, beside 8 and 4 bits, with --int8-head in INT8
with a scale a row, of which the perplexities know nothing (what that costs is in quantization.py's own rows). Lines
are in the order of bytes, so that a line is worth its bytes where its perplexity is below those above it.
"""

import argparse
import math
from pathlib import Path

from crepe_llm.checkpoints import read_folder
from method_recipes import MODELS
from quantization import OF_SPARSE, PROTOCOL, QUANTIZATIONS
from records import RESULTS, Row, read
from recover import mean_of
from recovered_models import CORPORA

# Bits a weight of a linear layer, the scales of groups of 64 columns among them. FP8 is held as bf16 where 2:4.
OF_LAYERS = [name for name in QUANTIZATIONS if name not in OF_SPARSE]
DENSE_BITS = dict(zip(OF_LAYERS, (16, 8, 8, 4.25, 4.25), strict=True))
SPARSE_BITS = dict(zip(OF_LAYERS, (9, 9, 5, 3.25, 3.25), strict=True))


def token_bytes(folder: Path, bits: float, head_bits: float) -> float:
    """The bytes of weights that a decoded token reads: linear layers and head; an untied embedding is looked up."""
    shapes = {name: math.prod(tensor.shape) for name, tensor in read_folder(folder).tensors.items()}
    layers = sum(size for name, size in shapes.items() if name.endswith("_proj.weight"))
    head = next(shapes[name] for name in ("lm_head.weight", "model.embed_tokens.weight") if name in shapes)
    return (layers * bits + head * head_bits) / 8


def table(rows: list[Row], folders: dict[str, Path], int8_head: bool) -> str:
    """Markdown: a line a model, start and quantization, means over seeds, in the order of bytes."""
    cells: dict[tuple[str, str, int, str], list[Row]] = {}
    for row in [row for row in rows if row["quantization"] not in OF_SPARSE]:
        cells.setdefault((row["model"], row["start"], row["tokens"], row["quantization"]), []).append(row)
    lines = []
    for (model, start, tokens, quantization), mine in cells.items():
        bits = (DENSE_BITS if start == "dense" else SPARSE_BITS)[quantization]
        head_bits = 8 if int8_head and quantization != "none" else 16
        read_bytes = token_bytes(folders[model], bits, head_bits)
        name = f"{start}, {tokens} tokens" if tokens else start
        figures = " | ".join(mean_of(mine, corpus) for corpus in CORPORA)
        line = f"| {model} | {name} | {quantization} | {bits:g} | {read_bytes / 1e6:.1f} | {figures} |"
        lines.append((model, read_bytes, line))
    headings = f"| model | start | quantization | bits a weight | MB a token | {' | '.join(CORPORA)} |"
    return "\n".join([headings, f"|{'---|' * (5 + len(CORPORA))}", *(line for *_, line in sorted(lines))])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--int8-head", action="store_true", help="count the head in INT8 beside quantized layers")
    parser.add_argument("--results", type=Path, default=RESULTS / "quantization.jsonl", help="records to read")
    options = parser.parse_args()
    rows = [row for row in read(options.results) if row["protocol"] == PROTOCOL and row["model"] in options.models]
    print(table(rows, {model: MODELS[model]() for model in options.models}, options.int8_head))


if __name__ == "__main__":
    main()
