"""The benchmark of growth: every stage runs, a row counts each layer of the model, and arithmetic is what it says."""

import argparse
import json

import pytest

import scale


@pytest.mark.parametrize("stage", scale.STAGES)
def test_every_stage_runs_on_a_small_layer(stage):
    found = scale.measure(stage, 32, 64, 256)
    assert found["seconds"] > 0 and found["bytes"] >= 0


def test_a_model_is_the_sum_of_its_layers():
    """A second a layer: 2 blocks of 7 layers take 14 s, and have so many weights; without down_proj they are 6."""
    options = argparse.Namespace(tflops=1.0, bandwidth=1e9)
    rows = {kind: {"seconds": 1.0, "bytes": 5, "tokens": 2048} for kind in scale.MODELS["tiny"].kinds}
    found = scale.whole(options, "tiny", "mask", rows)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 128 * 64 + 64 * 128)
    assert found["seconds"] == 14 and found["peak_bytes"] == 5 and not found["without"]
    assert found["seconds_per_million_weights"] == pytest.approx(14 / (weights / 1e6))
    # 40 operations a weight at 1e12 a second; bandwidth is no limit.
    assert found["gpu_seconds"] == pytest.approx(40 * weights / 1e12)
    # Inputs, for 128 times as many tokens: of q, k and v, of o, of gate and up, and of down.
    assert scale.whole(options, "tiny", "inputs", rows)["seconds"] == 2 * 4 * 128
    del rows["down_proj"]
    found = scale.whole(options, "tiny", "mask", rows)
    assert found["seconds"] == 12 and found["without"] == ["down_proj"]


def test_shapes_are_those_of_the_models():
    """Weights of all linear layers but the head: 0.97, 6.98 and 68.5 billion."""
    for name, billions in (("llama-3.2-1b", 0.973), ("llama-3-8b", 6.979), ("llama-3-70b", 68.45)):
        shape = scale.MODELS[name]
        total = shape.blocks * sum(rows * columns * count for rows, columns, count in shape.kinds.values())
        assert total / 1e9 == pytest.approx(billions, rel=1e-3)


def test_a_process_of_its_own_gives_the_figures_once(monkeypatch, capsys, tmp_path):
    results = tmp_path / "scale.jsonl"
    arguments = ["scale.py", "--model", "tiny", "--stage", "saving", "--kind", "down_proj", "--tokens", "64"]
    monkeypatch.setattr("sys.argv", [*arguments, "--results", str(results)])
    scale.main()
    scale.main()  # finds its row
    (row,) = map(json.loads, results.read_text().splitlines())
    assert row["kind"] == "down_proj" and row["seconds"] > 0
    text = capsys.readouterr().out
    assert f"| saving | {2 * row['seconds'] / 3600:.3g}* |" in text  # in two blocks
    assert "without q_proj, o_proj, k_proj, v_proj, gate_proj, up_proj" in text
