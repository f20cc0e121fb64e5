"""The benchmark of two processes: every stage runs in them, prunes, and its table divides one by two."""

import argparse

import torch

import speedup
from crepe_llm.checkpoints import is_2of4


def test_every_stage_runs_in_two_processes():
    found = speedup.apart(2, argparse.Namespace(model="tiny", tokens=64))
    assert found.keys() == set(speedup.STAGES) and min(found.values()) > 0


@torch.no_grad()
def test_layers_are_pruned():
    block, (mask, refit) = speedup.Block("tiny", 64), speedup.steps()
    block.prune(list(block.modules), [mask, refit])
    assert all(is_2of4(module.weight) for module in block.modules.values())
    assert all(before > after for before, after in refit.errors.values())


def test_the_table_divides_medians():
    rows = [
        {"processes": count, "seconds": dict.fromkeys(speedup.STAGES, seconds)}
        for count, seconds in ((1, 3.0), (2, 2.0), (1, 3.0), (2, 2.0))
    ]
    assert "| Gram | 3.00 | 2.00 | 1.50 |" in speedup.table(rows)
