"""The benchmark of growth: every stage runs, a row counts each layer of the model, and arithmetic is what it says."""

import argparse
import json

import pytest

import scale


@pytest.mark.parametrize("stage", scale.STAGES)
def test_every_stage_runs_on_a_small_layer(stage):
    found = scale.measure(stage, 32, 64, 256)
    assert found["seconds"] > 0 and found["bytes"] >= 0


def test_a_row_adds_up_the_layers_of_a_model():
    """A second a layer: 2 blocks of 7 layers take 14 s, and have so many weights."""
    options = argparse.Namespace(tokens=2048, tflops=1.0, bandwidth=1e9)
    measured = {kind: {"seconds": 1.0, "bytes": 5} for kind in scale.MODELS["tiny"].kinds}
    row = scale.row_of("tiny", "mask", measured, options)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 128 * 64 + 64 * 128)
    assert row["whole_model_seconds"] == 14 and row["peak_bytes"] == 5
    assert row["seconds_per_million_weights"] == pytest.approx(14 / (weights / 1e6))
    # 40 operations a weight at 1e12 a second; bandwidth is no limit.
    assert row["gpu_seconds_by_arithmetic"] == pytest.approx(40 * weights / 1e12)


def test_shapes_are_those_of_the_models():
    """Weights of all linear layers but the head: 0.97, 6.98 and 68.5 billion."""
    for name, billions in (("llama-3.2-1b", 0.973), ("llama-3-8b", 6.979), ("llama-3-70b", 68.45)):
        shape = scale.MODELS[name]
        total = shape.blocks * sum(rows * columns * count for rows, columns, count in shape.kinds.values())
        assert total / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_process_of_its_own_gives_the_figures(monkeypatch, capsys, tmp_path):
    results = tmp_path / "scale.jsonl"
    arguments = ["scale.py", "--model", "tiny", "--stage", "saving", "--tokens", "64", "--results", str(results)]
    monkeypatch.setattr("sys.argv", arguments)
    scale.main()
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["kinds"].keys() == scale.MODELS["tiny"].kinds.keys() and row["whole_model_seconds"] > 0
    assert "saving" in capsys.readouterr().out
