"""Masks in two processes: DDP and FSDP2 through accelerate give the masks, and within rounding the training, of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from crepe_llm.training.masked import keep_masks
from masked_models import OPTIMIZERS, STEPS, ids, loss_of, pruned
from sparse_models import linears

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def alone():
    """What one process gives: model, losses and norms, masks."""
    model, masks = pruned()
    held = keep_masks(model)
    optimizer = OPTIMIZERS["AdamW"](list(model.parameters()))
    losses = []
    for seed in range(STEPS):
        loss = loss_of(model, ids(seed, batch=2))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item(), norm.item()])
    return model, losses, masks, sum(bits.numel() for bits in held.bits.values())


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp2-after", "fsdp2-no-reshard"])
def test_two_processes_train_as_one(mode, alone, tmp_path):
    model, losses, masks, bits = alone
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(SCRIPT), mode, str(tmp_path / "end.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    end = torch.load(tmp_path / "end.pt")
    torch.testing.assert_close(end["losses"], losses, rtol=1e-4, atol=1e-5)
    for name in linears(model):
        assert not end["state"][f"{name}.weight"][~masks[name]].any(), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(end["state"][name], parameter.detach(), rtol=1e-3, atol=1e-4)
    # FSDP2's processes each hold the masks of their own rows.
    assert end["bits"] == (bits if mode == "ddp" else bits // 2)
