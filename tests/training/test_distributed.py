"""Masks in two processes: DDP and FSDP2 through accelerate give the masks, and within rounding the training, of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.training.masked import keep_masks
from masked_models import OPTIMIZERS, STEPS, ids, loss_of, pruned
from sparse_models import linears, prune_2of4
from tiny_models import configs, letters_tokenizer
from training import two_distillations

SCRIPT = Path(__file__).with_name("two_processes.py")


def start(*arguments):
    """Run a script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


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
    start(str(SCRIPT), mode, str(tmp_path / "end.pt"))
    end = torch.load(tmp_path / "end.pt")
    torch.testing.assert_close(end["losses"], losses, rtol=1e-4, atol=1e-5)
    for name in linears(model):
        assert not end["state"][f"{name}.weight"][~masks[name]].any(), name
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(end["state"][name], parameter.detach(), rtol=1e-3, atol=1e-4)
    # FSDP2's processes each hold the masks of their own rows.
    assert end["bits"] == (bits if mode == "ddp" else bits // 2)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_distil_as_one(mode, tmp_path):
    """The same windows a step, whoever takes them: the masks, and within rounding the losses, of one process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs()["llama"]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    for name in ("dense", "sparse"):
        if name == "sparse":
            masks = prune_2of4(model)
        model.save_pretrained(tmp_path / name)
        letters_tokenizer(True).save_pretrained(tmp_path / name)
    folders = [str(tmp_path / "sparse"), str(tmp_path / "dense")]
    alone = two_distillations.run(*folders, tmp_path / "one")
    script = str(SCRIPT.with_name("two_distillations.py"))
    start(script, mode, *folders, str(tmp_path / "two"))
    together = json.loads((tmp_path / "two.json").read_text())
    assert together["held_out"][0][1] == pytest.approx(alone["held_out"][0][1], rel=1e-4)
    assert [step for step, _ in together["held_out"]] == [step for step, _ in alone["held_out"]]
    torch.testing.assert_close(together["losses"], alone["losses"], rtol=1e-3, atol=1e-4)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, module), other in zip(linears(one).items(), linears(two).values(), strict=True):
        assert torch.equal(module.weight != 0, masks[name]) and torch.equal(other.weight != 0, masks[name]), name
        torch.testing.assert_close(module.weight, other.weight, rtol=1e-2, atol=1e-3)
    assert not list(tmp_path.glob("*-work"))
