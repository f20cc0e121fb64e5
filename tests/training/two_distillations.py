"""A distillation in two processes that torch.distributed.run starts for a test: MODE SOURCE TEACHER OUT."""

import json
import sys
from pathlib import Path

import accelerate
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

sys.path.insert(0, str(Path(__file__).parents[1]))

from crepe_llm.samples.windows import token_windows
from crepe_llm.training import loop
from crepe_llm.training.distillation import DistillationSettings, distill
from leaving import leave

LENGTH, STEPS = 32, 8


def run(source, teacher, out):
    """The held-out losses."""
    out = Path(out)
    out.mkdir(exist_ok=True)
    text = "the quick brown fox jumps over the lazy dog. " * 60
    settings = DistillationSettings(
        relative_rate=2e-2, tokens=STEPS * 4 * LENGTH, warmup=2, precision="fp32", evaluations=4
    )
    work = out.with_name(f"{out.name}-work")
    made = distill(source, out, work, teacher, lambda tokenizer: token_windows(tokenizer, [text], LENGTH), settings)
    return {"held_out": made.trained.held_out, "losses": made.trained.losses}


def shard_on_cpus():
    """Make accelerate shard models, which it does on GPUs only; all that it then does works on CPUs, too."""
    start = accelerate.Accelerator.__init__

    def started(self, *arguments, **options):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        start(self, *arguments, **options | {"fsdp_plugin": plugin})
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

    accelerate.Accelerator.__init__ = started
    loop._CHECKPOINTS = 0  # transformers writes those of sharded models on GPUs only


if __name__ == "__main__":
    mode, *folders = sys.argv[1:]
    if mode == "fsdp2":
        shard_on_cpus()
    found = run(*folders)
    if dist.get_rank() == 0:
        Path(f"{folders[-1]}.json").write_text(json.dumps(found))
    leave()
