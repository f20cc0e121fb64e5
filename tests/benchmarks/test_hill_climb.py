import importlib
from pathlib import Path

import pytest

from crepe_llm.search.optimisers import OPTIMISERS
from crepe_llm.search.search import search
from searches import bowl, study

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def hill_climb(monkeypatch):
    """The optimiser of the benchmarks, known to searches."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(OPTIMISERS, "hill_climb", importlib.import_module("hill_climb").hill_climb)


def test_hill_climb_approaches_a_known_minimum():
    result = search(bowl(), study("hill_climb"), candidates=250)
    assert result.loss(result.best) < 0.02 < result.loss(result.reference)
    assert result.finished
    assert result.beats_reference


def test_hill_climb_ends_by_itself_in_a_minimum():
    calls = 0

    def loss(candidate):
        nonlocal calls
        calls += 1
        return bowl()(candidate)

    result = search(loss, study("hill_climb"), candidates=10_000)
    assert result.finished
    assert calls == len(result.candidates) < 500
    assert result.loss(result.best) < 0.01
