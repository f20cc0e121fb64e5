"""Searches in the processes that torchrun starts, or in one: MODEL_FOLDER OUTPUT_FOLDER, for test_pho_processes.py.

Each run writes the study of its search, and the model that is pruned with what it found. An OUTPUT_FOLDER/cut.json that
is there already is a search that goes on.
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

from crepe_llm import processes
from crepe_llm.modifiers import CRePEModifier, PHOSearchModifier, WeightCorrectionModifier
from leaving import leave
from tiny_models import VOCABULARY


def data():
    """Windows of tokens, the first of them padded."""
    drawn = torch.randint(3, VOCABULARY, (13, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(drawn)
    mask[0, 10:] = 0
    return Dataset.from_dict({"input_ids": drawn.tolist(), "attention_mask": mask.tolist()})


def run(folder, record, text=None, **fields):
    """The model after a search and what follows it; blocks are run in turn, beside the dense ones."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= 10  # so that predictions are far from even
    fields = {"candidates": 20, "tokens": 1500, "rows": 16, "layers_per_kind": 1, "record": str(record)} | fields
    recipe = [PHOSearchModifier(**fields), CRePEModifier(mask_structure="2:4"), WeightCorrectionModifier()]
    oneshot(
        model=model,
        recipe=recipe,
        dataset=text or data(),
        num_calibration_samples=13,
        shuffle_calibration_samples=False,
        batch_size=2,
    )
    return model


def main(folder, output):
    output = Path(output)
    model = run(folder, output / "study.json")
    if processes.is_first():
        torch.save(model.state_dict(), output / "weights.pt")
    run(folder, output / "lent.json", study=str(output / "study.json"))
    if (output / "cut.json").exists():
        run(folder, output / "cut.json")


def refused(work):
    """The error that a function raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def fail(item):
    if item:
        raise ValueError(f"item {item} is bad")


def refusals(folder, output):
    """What goes wrong in several processes, told in each."""
    number = processes.rank()
    other = data().select([*range(number, 13), *range(number)])  # the rows turned by one
    told = [
        refused(lambda: processes.spread((0, 1), fail)),
        refused(lambda: run(folder, Path(output) / "other.json", other)),
    ]
    Path(output, f"refused{number}.txt").write_text("\n".join(told))


if __name__ == "__main__":
    processes.start()
    main(*sys.argv[1:])
    refusals(*sys.argv[1:])
    leave()
