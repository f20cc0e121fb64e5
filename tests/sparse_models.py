"""2:4 tensors and small 2:4 models for the tests of checkpoints."""

import json

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from crepe_llm.checkpoints.formats.bitmask import DTYPES

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def random_2of4(rows, columns, dtype, seed=0, dropped=0.2):
    """A 2:4 weight of arbitrary bit patterns (NaN, infinities and negative zeros included), some kept values zero."""
    assert dtype in DTYPES
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGERS[dtype.itemsize]
    bits = torch.iinfo(integer)
    weight = torch.randint(bits.min, bits.max + 1, (rows, columns), generator=generator).to(integer)
    order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1).view(rows, columns)
    zero = (order >= 2) | (torch.rand(rows, columns, generator=generator) < dropped)
    return torch.where(zero, 0, weight).to(integer).view(dtype)


def prune_2of4(model):
    """Prune every linear layer but the head to 2:4 by magnitude, in place; returns the kept positions by name."""
    kept = {}
    for name, module in linears(model).items():
        weight = module.weight.data
        groups = weight.abs().float().view(weight.shape[0], -1, 4)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(2, dim=-1).indices, True)
        kept[name] = mask.view_as(weight)
        module.weight.data = weight * kept[name]
    return kept


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def bytes_of(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.element_size()])


def pruned(folder, dtype=torch.bfloat16):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    kept = prune_2of4(model)
    return model, kept


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def stored_tensors(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors
