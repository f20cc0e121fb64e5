"""A distillation in two processes that torch.distributed.run starts, for test_distributed.py: SOURCE TEACHER OUT."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from crepe_llm.samples.windows import token_windows
from crepe_llm.training.distillation import DistillationSettings, distill

LENGTH, STEPS = 32, 8


def run(source, teacher, out):
    """The held-out losses."""
    out = Path(out)
    out.mkdir(exist_ok=True)
    text = "the quick brown fox jumps over the lazy dog. " * 60
    settings = DistillationSettings(
        learning_rate=5e-3, tokens=STEPS * 4 * LENGTH, warmup=2, precision="fp32", evaluations=4
    )
    work = out.with_name(f"{out.name}-work")
    made = distill(source, out, work, teacher, lambda tokenizer: token_windows(tokenizer, [text], LENGTH), settings)
    return {"held_out": made.trained.held_out, "losses": made.trained.losses}


if __name__ == "__main__":
    found = run(*sys.argv[1:])
    if dist.get_rank() == 0:
        Path(f"{sys.argv[3]}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
