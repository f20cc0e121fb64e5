"""The cells of structured.py and their table."""

import argparse

import structured

MODEL = "Gemma-3-270M"


def options():
    values = {"models": [MODEL], "methods": ["magnitude", "activation"], "allocations": ["uniform", "coarse"]}
    values |= {"sparsities": [0.1], "seeds": [0, 1], "windows": 16, "length": 512, "tokens": 64, "round_to": 8}
    return argparse.Namespace(**values)


def test_cells_that_depend_on_no_seed_are_measured_once():
    keys = structured.quality_keys(options())
    found = [(key["method"], key["allocation"], key["seed"]) for key in keys]
    assert len(found) == len(set(found)) == 8
    assert ("magnitude", "uniform", None) in found and ("magnitude", "coarse", 1) in found
    assert all({"windows", "length", "tokens", "round_to", "model", "sparsity"} <= key.keys() for key in keys)


def test_the_table_has_means_over_seeds_and_marks_rows_without_provenance():
    measured = {"predicted": 60, "megabytes": 10.0, "seconds": 2.0}
    rows = [
        key | measured | {"perplexity": 10.0 + (key["seed"] or 0), "channels": 100 if key["method"] == "dense" else 90}
        for key in structured.quality_keys(options())
    ]
    for one in rows:
        if one["method"] != "activation":
            one["provenance"] = {}
    table = structured.quality_table(rows, options())
    assert f"| {MODEL} | 10.00 | 10.0% | uniform | 10.00 | 10.50† ± 0.50 | 10 | 2 |" in table
    assert "† from before" in table
