"""The runs of methods.py and the cells of its table."""

import argparse

import pytest

import method_recipes
import method_tables


def options(**changed):
    values = {"models": ["Gemma-3-270M"], "structures": ["2:4"], "seeds": [0, 1, 2], "methods": ["CRePE"]}
    values |= {"split": "test", "windows": 16, "length": 512, "tokens": 8192, "dtype": "bfloat16"}
    return argparse.Namespace(**values | changed)


def test_every_seed_and_structure_is_a_run_but_the_dense_model_is_one():
    methods = ["dense", "magnitude", "Wanda"]
    runs = method_recipes.runs_of(options(methods=methods, structures=["2:4", "50%"]))
    counts = {method: sum(run["method"] == method for run in runs) for method in methods}
    assert counts == {"dense": 1, "magnitude": 2, "Wanda": 6}
    assert all(("recipe" in run) == (run["method"] == "Wanda") for run in runs)


def test_methods_that_a_structure_has_no_use_for_are_left_out():
    runs = method_recipes.runs_of(options(methods=["CRePE + permutation", "CRePE + owl"], structures=["2:4", "50%"]))
    assert {(run["method"], run["structure"]) for run in runs} == {
        ("CRePE + permutation", "2:4"),
        ("CRePE + owl", "50%"),
    }


def test_the_other_models_study_is_named_without_a_folder_of_the_machine():
    (run,) = method_recipes.runs_of(options(methods=["CRePE + the other model's PHO"], seeds=[1]))
    fields = run["recipe"]["methods_stage"]["pruning_modifiers"]["PHOSearchModifier"]
    assert fields["study"] == "{studies}/methods/SmolLM2-135M-Instruct-2of4-seed1.json"


def row(perplexity, **fields):
    values = {"model": "Gemma-3-270M", "method": "CRePE", "structure": "2:4", "seconds": 4.0, "predicted": 8}
    return values | {"perplexity": perplexity, "provenance": {}} | fields


@pytest.mark.parametrize(
    ("perplexities", "text"),
    [
        ([], ""),
        ([20.0, 21.0, 22.0], "21.00 ± 1.00"),
        ([20.0, 22.0], "21.00 ± 1.00 (2)"),
        ([20.0], "20.00"),
        ([2000.0, 1000.0, 1500.0], "1500 ± 500"),
    ],
)
def test_a_cell_is_the_mean_and_half_the_range_and_says_how_many_seeds_are_missing(perplexities, text):
    assert method_tables.cell_text([row(value) for value in perplexities], 3) == text


def test_cells_with_rows_without_provenance_are_marked_and_explained():
    old = {name: value for name, value in row(22.0).items() if name != "provenance"}
    table = method_tables.table([row(20.0), old], options())
    assert "| CRePE | 21.00† ± 1.00 (2) | 4 |" in table and "† from before" in table
    assert "†" not in method_tables.table([row(20.0)], options())


def test_other_settings_have_a_table_of_their_own():
    asked = options(methods=["CRePE", "CRePE + pcg, by block"])
    rows = [row(20.0), row(21.0, method="CRePE + pcg, by block")]
    main, other = method_tables.table(rows, asked).split("Gemma-3-270M, other settings:")
    assert "| CRePE | 20.00" in main and "by block" not in main
    assert "| CRePE + pcg, by block | 21.00" in other and "| CRePE |" not in other
    assert "other settings" not in method_tables.table(rows[:1], asked)


def test_the_dense_model_stands_in_every_structure_of_its_own_model():
    rows = [row(15.0, method="dense", structure=""), row(16.0, method="dense", structure="", model="other")]
    assert [r["perplexity"] for r in method_tables.cell(rows, "Gemma-3-270M", "dense", "50%")] == [15.0]


def test_searches_from_ria_withhold_the_recipes_coefficients():
    runs = method_recipes.runs_of(options(methods=["RIA's coefficients + PHO in stages"], structures=["2:4", "60%"]))
    for run in runs:
        modifiers = run["recipe"]["methods_stage"]["pruning_modifiers"]
        assert list(modifiers) == ["PHOSearchModifier", "CRePEModifier"]
        fields = modifiers["CRePEModifier"]
        assert [fields[name] for name in ("row", "column", "neighbourhood", "activation_exponent")] == [1, 1, 0, 0.5]
        assert fields["kernel_size"] == 3 and fields["mask_structure"] in ("2:4", "0:0")
        assert modifiers["PHOSearchModifier"]["record"].endswith("-tried-ria.json")
        # Nor do the shipped coefficients come back among the starts, which were best on the other model.
        starts = modifiers["PHOSearchModifier"]["starts"]
        assert len(starts) == 4
        shipped = method_recipes.crepe(run["structure"])["CRePEModifier"]
        assert all(any(shipped[name] != start[name] for name in start) for start in starts)


def test_searches_of_earlier_revisions_are_told_from_todays():
    assert "CRePE + PHO" in method_recipes.EARLIER
    assert not any("stages" in name for name in method_recipes.EARLIER)
