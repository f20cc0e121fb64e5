"""The cells of recover.py and their table."""

import argparse

import recover

MODEL, OTHER = "SmolLM2-135M-Instruct", "Gemma-3-270M"


def options(**fields):
    values = {"models": [MODEL, OTHER], "structures": ["2:4"], "starts": ["CRePE", "CRePE + pcg"], "seeds": [0, 1]}
    values |= {"methods": ["full", "lora"], "tokens": [1000, 2000], "self_generated": 0, "learning_rate": 4e-4}
    values |= {"relative_rate": None, "batch": 4, "warmup": 10, "rank": 16, "windows": 16, "length": 512}
    values |= {"measured": 64, "dtype": "bfloat16"}
    return argparse.Namespace(**values | fields)


def test_every_start_is_measured_as_it_is_and_after_each_training():
    keys = recover.keys_of(options())
    assert len({str(sorted(key.items(), key=str)) for key in keys}) == len(keys) == 2 * (1 + 2 * 2 * (1 + 2 * 2))
    dense = [key for key in keys if key["start"] == "dense"]
    assert [(key["model"], key["method"], key["tokens"], key["seed"]) for key in dense] == [
        (MODEL, "", 0, None),
        (OTHER, "", 0, None),
    ]
    trained = [key for key in keys if key["method"]]
    assert all(
        {"learning_rate", "batch", "warmup", "self_generated", "recipe", "measured"} <= key.keys() for key in trained
    )
    assert all(("rank" in key) == (key["method"] == "lora") for key in trained)
    relative = [key for key in recover.keys_of(options(relative_rate=1e-3)) if key["method"]]
    assert all(key["relative_rate"] == 1e-3 and "learning_rate" not in key for key in relative)
    # Another learning rate is another run of a training, and the same start.
    faster = recover.keys_of(options(learning_rate=1e-3))
    assert [key for key in faster if not key["method"]] == [key for key in keys if not key["method"]]
    assert not [key for key in faster if key["method"] and key in keys]


def test_the_table_has_means_over_seeds():
    asked = options(models=[MODEL], starts=["CRePE"], methods=["full"], tokens=[1000])
    rows = []
    for key in recover.keys_of(asked):
        level = 10.0 if key["start"] == "dense" else 40.0 - 10 * bool(key["method"]) + 2 * key["seed"]
        row = key | {"perplexity": {"test": level, "valid": level + 1, "news": level + 2}}
        rows.append(row | {"training_s": 120.0} if key["method"] else row)
    table = recover.table(rows, asked)
    assert f"| {MODEL} |  | dense |  |  |  | 10.00 | 11.00 | 12.00 |  |" in table
    assert f"| {MODEL} | 2:4 | CRePE |  |  |  | 41.00 ± 1.00 | 42.00 ± 1.00 | 43.00 ± 1.00 |  |" in table
    assert f"| {MODEL} | 2:4 | CRePE | full | 0.0004 | 1000 | 31.00 ± 1.00 | 32.00 ± 1.00 | 33.00 ± 1.00 | 2 |" in table
    assert "news" in recover.CORPORA and "seeds 0, 1 of" in table


def test_the_plot_is_drawn(tmp_path):
    asked = options(models=[MODEL])
    rows = [key | {"perplexity": {"test": 20.0 - key["tokens"] / 1000}} for key in recover.keys_of(asked)]
    recover.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
