"""Ways to quantize a 2:4 layer to INT4, their output error relative to rounding to nearest (docs/results.md).

    python benchmarks/masked_gptq.py

Each call appends a row to --results.
"""

import argparse
from pathlib import Path

import torch

from crepe_llm.functional.masked_gptq import masked_gptq
from records import RESULTS, append

# Raised by every change of a default or of how something is measured.
PROTOCOL = 1
ROWS, COLUMNS, TOKENS, BITS, DAMPENING = 256, 512, 4000, 4, 0.01


def feedback_dropped(weight, gram, keep, quantize):
    """GPTQ whose feedback to pruned positions is thrown away as it arrives."""
    hessian = gram + DAMPENING * gram.diagonal().mean() * torch.eye(COLUMNS)
    order = gram.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    work, kept = weight[:, order].clone(), keep[:, order]
    for position in range(COLUMNS):
        column = work[:, position].clone()
        rounded = quantize(column, int(order[position])) * kept[:, position]
        work[:, position:] -= ((column - rounded) / factor[position, position])[:, None] * factor[position, position:]
        work *= kept
        work[:, position] = rounded
    return work[:, order.argsort()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "masked_gptq.jsonl", help="a row a call")
    options = parser.parse_args()
    torch.manual_seed(0)
    inputs = torch.randn(TOKENS, COLUMNS) @ torch.randn(COLUMNS, COLUMNS) / COLUMNS**0.5
    inputs += 0.3 * torch.randn(TOKENS, 1)
    gram = inputs.T @ inputs / TOKENS
    weight = torch.randn(ROWS, COLUMNS)
    groups = (weight.abs() * gram.diagonal().sqrt()).view(ROWS, -1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, -1).indices, True).view_as(weight)
    weight *= keep
    scale = weight.abs().amax(1) / (2 ** (BITS - 1) - 0.5)

    def quantize(column: torch.Tensor, index: int) -> torch.Tensor:
        return (column / scale).round().clamp(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1) * scale

    def error(quantized: torch.Tensor) -> float:
        return (((quantized - weight) @ gram) * (quantized - weight)).sum().item()

    nearest = error(torch.stack([quantize(weight[:, index], index) for index in range(COLUMNS)], dim=1))
    results = {
        "feedback to pruned positions dropped": feedback_dropped(weight, gram, keep, quantize),
        "feedback handed on (masked GPTQ)": masked_gptq(weight, gram, keep, quantize)[0],
        "no mask, its zeros lost": masked_gptq(weight, gram, torch.ones_like(keep), quantize)[0],
    }
    print(f"2:4 layer {ROWS} x {COLUMNS}, INT{BITS}, {TOKENS} correlated inputs; output error relative to nearest")
    errors = {name: error(quantized) / nearest for name, quantized in results.items()}
    for name, relative in errors.items():
        print(f"{name:<38} {relative:.2f}")
    conditions = {"rows": ROWS, "columns": COLUMNS, "tokens": TOKENS, "bits": BITS, "dampening": DAMPENING}
    append(options.results, PROTOCOL, {**conditions, "errors": errors})


if __name__ == "__main__":
    main()
