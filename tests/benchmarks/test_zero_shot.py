"""The runs of zero_shot.py and their lines."""

import argparse
from pathlib import Path

import zero_shot

MODEL = "SmolLM2-135M-Instruct"


def test_methods_are_scored_once_and_recovered_models_besides():
    options = argparse.Namespace(
        models=[MODEL], methods=["dense", "Wanda"], recovered=[1000, 2000], questions=5, folder=Path("made"), seeds=[1]
    )
    keys = zero_shot.keys_of(options)
    assert [(key.get("method"), key.get("start"), key.get("tokens")) for key in keys] == [
        ("dense", None, 0),
        ("Wanda", None, 0),
        ("full", zero_shot.BEST, 1000),
        ("full", zero_shot.BEST, 2000),
    ]
    assert all(key["asked"] == 5 for key in keys) and all(key["seed"] == 1 for key in keys[1:])
    scores = {task: {"acc": 0.5, "acc_stderr": 0.02} for task in ("piqa", "siqa")}
    assert zero_shot.line_of(keys[-1] | {"scores": scores, "provenance": {}}) == (
        f"| {MODEL} | {zero_shot.BEST}, 2000 tokens | 50.0 ± 2.0 | 50.0 ± 2.0 | 50.0 |"
    )
