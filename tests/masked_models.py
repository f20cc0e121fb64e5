"""Small 2:4 models that train, and optimisers that train them."""

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from sparse_models import prune_2of4
from tiny_models import VOCABULARY, configs

STEPS = 3
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "Adam, L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.3),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2),
}


def model_of(family="llama", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs()[family](), dtype=dtype)


def pruned(family="llama", dtype=torch.float32):
    """A small 2:4 model and its masks by layer."""
    model = model_of(family, dtype)
    return model, prune_2of4(model)


def ids(seed=0, batch=2):
    return torch.randint(3, VOCABULARY, (batch, 16), generator=torch.Generator().manual_seed(seed))


def loss_of(model, batch):
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def step(model, optimizer, seed=0, micro_batches=1):
    for index in range(micro_batches):
        (loss_of(model, ids(100 * seed + index)) / micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()
