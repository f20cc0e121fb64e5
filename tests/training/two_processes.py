"""Trains a small 2:4 model in two processes that torch.distributed.run starts, for test_distributed.py: MODE FILE."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from crepe_llm.training.masked import keep_masks
from leaving import leave
from masked_models import OPTIMIZERS, STEPS, ids, loss_of, pruned


def accelerator_of(mode):
    if not mode.startswith("fsdp2"):
        return Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=mode != "fsdp2-no-reshard",
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate shards on GPUs only; all that it then does works on CPUs, too.
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def main(mode, folder):
    accelerator = accelerator_of(mode)
    model, _ = pruned()
    before = mode != "fsdp2-after"
    held = keep_masks(model) if before else None
    optimizer = OPTIMIZERS["AdamW"](list(model.parameters()))
    model, optimizer = accelerator.prepare(model, optimizer)
    held = held or keep_masks(model)
    held.attach()
    sharded = mode.startswith("fsdp2")
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters()) == sharded
    losses = []
    for seed in range(STEPS):
        batch = ids(seed, batch=2)[dist.get_rank()][None]
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
        mean = accelerator.reduce(loss.detach(), reduction="mean")
        losses.append([float(mean), float(norm.full_tensor() if isinstance(norm, DTensor) else norm)])
    held.check()
    state = {
        name.removeprefix("module."): parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    bits = sum(part.numel() for part in held.bits.values())
    if dist.get_rank() == 0:
        torch.save({"state": state, "losses": losses, "bits": bits}, folder)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
