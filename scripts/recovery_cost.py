"""Print what `crepe recover` needs on one GPU for models of 1, 8 and 70 billion parameters. Nothing here is measured.

Memory is the sum of what is stored. Tokens an hour are multiply-adds at a stated share of a GPU's peak.

python scripts/recovery_cost.py [--peak TFLOPS] [--share SHARE]
"""

import argparse
from dataclasses import dataclass

GIB = 1 << 30
# Windows of 2,048 tokens, one at once: the activations between blocks in bf16 with gradient checkpointing, and those of
# one block, about 34 hidden states (Korthikanti et al., arXiv 2205.05198, equation 2 without attention scores).
TOKENS = 2048
OF_A_BLOCK = 34
# A chunk of logits of student and teacher, and fp32 numbers as it is compared.
LOGITS = 4 * (1 << 25) * 4


@dataclass(frozen=True)
class Model:
    """Sizes of a published model: parameters without embeddings and head, of those together, and of the head."""

    name: str
    blocks: int
    hidden: int
    inner: float
    tables: float
    head: float

    @property
    def parameters(self) -> float:
        return self.inner + self.tables


MODELS = (
    Model("1B (Llama 3.2)", 16, 2048, 0.973e9, 0.263e9, 0.263e9),
    Model("8B (Llama 3.1)", 32, 4096, 6.98e9, 1.05e9, 0.525e9),
    Model("70B (Llama 3.1)", 80, 8192, 68.5e9, 2.10e9, 1.05e9),
)
# Bytes for each parameter that trains: fp32 weight, gradient, AdamW's two moments.
FULL, FULL_8BIT = 4 + 4 + 8, 4 + 4 + 2
RANK = 16


def activations(model: Model) -> float:
    return 2 * TOKENS * model.hidden * (model.blocks + OF_A_BLOCK) + LOGITS


def full(model: Model, bytes_each: int) -> float:
    """Student with frozen fp32 tables, teacher in bf16."""
    return model.inner * bytes_each + 4 * model.tables + 2 * model.parameters + activations(model)


def lora(model: Model) -> float:
    """Student and teacher, the weights of the first in fp32 and frozen; updates of about seven matrices a block."""
    updates = model.blocks * RANK * 20 * model.hidden
    return 4 * model.parameters + 16 * updates + 2 * model.parameters + activations(model)


def tokens_an_hour(model: Model, peak: float, share: float) -> float:
    """By multiply-adds. Matrices in blocks: forward, again (checkpointing), backward twice, and the teacher's forward.

    The frozen head: forward, backward once, and the teacher's.
    """
    return peak * share * 3600 / (2 * (5 * model.inner + 3 * model.head))


def table(peak: float, share: float) -> str:
    """The table in Markdown."""
    lines = [
        "| model | full, fp32 state | full, 8-bit state | LoRA, rank 16 | tokens an hour |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        memory = [full(model, FULL), full(model, FULL_8BIT), lora(model)]
        cells = " | ".join(f"{value / GIB:,.0f} GiB" for value in memory)
        lines.append(f"| {model.name} | {cells} | {tokens_an_hour(model, peak, share) / 1e6:.1f} million |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0, help="bf16 TFLOPS (an H100's, dense: %(default)s)")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak that is reached (%(default)s)")
    options = parser.parse_args()
    print(table(options.peak * 1e12, options.share))


if __name__ == "__main__":
    main()
