"""How long a run is expected to take, against times that were measured."""

import json
from pathlib import Path

import pytest
from llmcompressor.recipe import Recipe

from crepe_llm.cli.plan import expected_seconds, multiply_rate, time_in_words
from crepe_llm.oneshot.recipes import read_recipe
from crepe_llm.recipe_files import recipe_path

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "methods.jsonl"
PCG = 'a_stage: {a_modifiers: {CRePEModifier: {mask_structure: "2:4"}, WeightCorrectionModifier: {method: pcg}}}'
# [d_out, d_in] of the layers of a block, and how many blocks there are.
BLOCKS = {
    "SmolLM2-135M-Instruct": (
        30,
        (576, 576),
        (192, 576),
        (192, 576),
        (576, 576),
        (1536, 576),
        (1536, 576),
        (576, 1536),
    ),
    "Gemma-3-270M": (18, (1024, 640), *[(256, 640)] * 2, (640, 1024), *[(2048, 640)] * 2, (640, 2048)),
}


def modifiers(method):
    names = {"Wanda": "wanda_2of4", "CRePE": "crepe_2of4", "CRePE + permutation + admm": "crepe_2of4_best"}
    if method == "CRePE + pcg":
        return Recipe.create_instance(PCG).modifiers
    return read_recipe(recipe_path(names[method])).modifiers


@pytest.mark.parametrize("method", ["Wanda", "CRePE", "CRePE + pcg", "CRePE + permutation + admm"])
def test_runs_took_about_what_is_expected(method):
    """By the fastest recorded run of two models, on two cores that multiply about 300 GFLOP/s in fp32: other work on
    the machine only makes a run longer."""
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    runs = [row for row in records if (row["method"], row["structure"]) == (method, "2:4")]
    for model, (count, *block) in BLOCKS.items():
        seconds = min(row["seconds"] for row in runs if row["model"] == model)
        expected = expected_seconds(modifiers(method), block * count, 16 * 512, 300e9)
        assert 1 / 3 < seconds / expected < 3, (model, seconds, expected)


def test_what_is_asked_of_more_text_takes_longer():
    block = [(576, 576)] * 30
    few, many = (expected_seconds(modifiers("CRePE"), block, tokens, 300e9) for tokens in (1000, 4000))
    assert many == pytest.approx(4 * few)
    searched = expected_seconds(read_recipe(recipe_path("crepe_2of4_pho")).modifiers, block, 1000, 300e9)
    assert searched > 100 * few


def test_this_machine_multiplies():
    assert 1e8 < multiply_rate() < 1e16


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 1 s"),
        (7.6, "about 8 s"),
        (44, "about 40 s"),
        (89, "about 90 s"),
        (150, "about 2.5 minutes"),
        (1800, "about 30 minutes"),
        (5400, "about 1.5 hours"),
        (90000, "about 25 hours"),
    ],
)
def test_times_are_said_roughly(seconds, words):
    assert time_in_words(seconds) == words
