"""A sample of what scripts/support.py runs over all families, and its page."""

import json

import pytest

from script_modules import load_script


@pytest.fixture(scope="module")
def support():
    return load_script("support")


@pytest.fixture(scope="module")
def workers(support):
    with support.Workers(vllm=False) as started:
        yield started


@pytest.mark.parametrize(
    "family, recipe, packed",
    [
        ("qwen3", "crepe_2of4_best", 14),
        ("falcon", "crepe_2of4", 8),
        ("qwen2", "crepe_2of4_int8", 14),
        ("phi3", "crepe_2of4", 8),
    ],
)
def test_families(support, workers, family, recipe, packed):
    row = workers.run(family, recipe, vllm=False)
    assert "error" not in row, row
    assert support.verdict(row | {"family": family, "recipe": recipe}) == f"{packed} layers packed"


def test_what_died_says_so(support, workers):
    row = workers.run("llama", "no_such_recipe", vllm=False)
    assert "no recipe 'no_such_recipe'" in row["error"]
    assert support.verdict(row | {"recipe": "no_such_recipe"}).startswith("no: ")


def test_what_dies_in_vllm_keeps_what_transformers_gave(support):
    found = '{"packed": 14, "logits": 0.0}\n'
    assert support.row_of(1, found, "ValueError: /a/b: no x\n\n")["vllm"] == "no: b: no x"
    assert support.row_of(-4, found, "Loading") == {"packed": 14, "logits": 0.0, "vllm": "no: ended by signal 4"}
    assert support.row_of(support.TOO_LONG, "", "x") == {"error": "not done after 900 s"}


def test_the_page_is_made_of_the_newest_rows(support):
    key = {"family": "llama", "recipe": "crepe_2of4", "protocol": support.PROTOCOL, "provenance": {"commit": "a" * 40}}
    good = {"packed": 14, "odd_keys": 0, "logits": 0.0, "vllm": "tokens equal"}
    rows = [key | {"error": "old"}, key | good]
    assert "| llama | 14 layers packed | tokens equal |" in support.page(rows)
    assert "no: 0 tensors missing or too many, logits apart by 0.5" in support.page([key | good | {"logits": 0.5}])
    unserved = support.page([key | good | {"vllm": "no: not supported. Supported are dict_keys(['A|B"}])
    assert "| 14 layers packed | no: not supported |" in unserved
    assert "no: 2 tensors" in support.page([key | good | {"odd_keys": 2}])
    refused = support.page([key | {"error": 'it would quantize the experts: add "re:.*experts.*" to its `ignore`'}])
    assert "| no: it would quantize the experts |" in refused
    assert f"| no: {'long ' * 27}... |" in support.page([key | {"error": "long " * 40}])


def test_the_page_in_the_docs_is_that_of_the_rows(support):
    results = support.RESULTS / "support.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert support.PAGE.read_text() == support.page(rows)
