"""What judging.py says of rows."""

import dataclasses

import judging
from crepe_llm.search.space import RIA, WANDA

KEY = {"model": "smollm2", "structure": "2:4", "seed": 0, "windows": 16, "refit": ""}


def row(coefficients, perplexity, **losses):
    divergence = dict.fromkeys(judging.WAYS, perplexity / 100) | losses
    found = {"divergence": divergence, "perplexity": perplexity, "coefficients": coefficients.fields}
    return KEY | found


def test_all_sets_are_tried_once():
    found = judging.candidates(KEY)
    assert found[:2] == [RIA, WANDA] and len(set(found)) == len(found) > 8


def test_ways_of_judging_are_ranked_by_test_perplexity(capsys):
    third = dataclasses.replace(RIA, column=5.0)
    judging.report([row(RIA, 130.0), row(WANDA, 120.0, halves=9.0), row(third, 110.0, halves=8.0)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[-2].strip() for line in lines if line.startswith("| 1,")] == ["110.00", "120.00", "130.00"]
    told = next(line for line in lines if "rank correlation" in line).split("|")
    assert dict(zip(judging.WAYS, map(str.strip, told[2:8]), strict=True)) == {
        "itself": "+1.00",
        "halves": "-0.50",
        "alike": "+1.00",
        "valid": "+1.00",
        "test": "+1.00",
        "news": "+1.00",
    }
