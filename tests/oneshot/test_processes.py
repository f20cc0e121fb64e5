"""Recipes in two processes: the masks, and within rounding the weights, of one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.functional.bitmask import unpack_bits
from crepe_llm.recipe_files import shipped_recipes
from tiny_models import configs, save_model

SCRIPT = Path(__file__).with_name("two_processes.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NAMES = [name for name in shipped_recipes() if name != "crepe_2of4_pho"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process wrote, and what two did."""
    root = tmp_path_factory.mktemp("processes")
    for family in ("llama", "mixtral"):
        save_model(configs(64, 256)[family](), root / family)
        # Weights that mix tokens well: where Gram matrices are nearly singular, rounding decides what ADMM keeps.
        model = AutoModelForCausalLM.from_pretrained(root / family)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
        model.save_pretrained(root / family)
    made = []
    for name, start in (("one", []), ("two", TWO)):
        (root / name).mkdir()
        command = [sys.executable, *start, str(SCRIPT), str(root), str(root / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        made.append(root / name)
    return made


@pytest.mark.parametrize("name", [*NAMES, "experts", "all experts", "measured", "half", "shuffled"])
def test_two_processes_prune_as_one(name, folders):
    one, two = (torch.load(folder / f"{name}.pt") for folder in folders)
    assert bool(one["masks"]) == (name != "cfsp_20") and one["masks"].keys() == two["masks"].keys()
    differing = {layer: bits_differing(bits, two["masks"][layer]) for layer, bits in one["masks"].items()}
    # Where ADMM weighs any weight of a matrix against any other, rounding may decide between two, and the rest follows.
    allowed = 0.01 if "atp_admm" in name else 0
    assert max(differing.values(), default=0) <= allowed, differing
    assert one["weights"].keys() == two["weights"].keys()
    if not any(differing.values()):
        for key, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][key].float(), weight.float(), rtol=1e-3, atol=1e-4, msg=key)


def bits_differing(one, two):
    """The share of the bits of two packed masks that differ."""
    return unpack_bits(one ^ two, 8 * one.shape[1]).float().mean().item()


def test_the_tokens_of_all_processes_count(folders):
    """The first process's half of the data alone would give other masks."""
    half, two = (torch.load(folders[1] / f"{name}.pt")["masks"] for name in ("half", "crepe_2of4"))
    assert any(not torch.equal(bits, two[layer]) for layer, bits in half.items())


def test_what_looks_at_one_share_is_refused(folders):
    message = (folders[1] / "sparsegpt.txt").read_text()
    assert "works in one process, and this job has 2" in message


def test_what_smooths_shared_weights_in_each_process_is_refused(folders):
    message = (folders[1] / "smoothquant.txt").read_text()
    assert "SmoothQuantModifier works in one process, and this job has 2" in message and "share weights" in message


def test_the_first_process_saves(folders):
    model = AutoModelForCausalLM.from_pretrained(folders[1] / "saved")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert (module.weight.view(-1, 4).count_nonzero(dim=1) == 2).all()
    assert not list(folders[1].glob("saved-*"))
