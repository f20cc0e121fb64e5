"""The surfaces that search_optimisers.py simulates on, and the methods' budgets."""

import math

import numpy as np
import pytest

import search_optimisers
from crepe_llm.search.space import RIA, Coefficients
from records import RESULTS, read_old
from search_optimisers import CANDIDATES, METHODS, SPACE, WINDOWS


@pytest.mark.parametrize("model", ["smollm2", "gemma3"])
def test_a_surface_goes_along_what_was_measured(model):
    found = search_optimisers.surface(model, "2:4")
    rows = read_old(RESULTS / "proxy_study.jsonl")
    rows = [row for row in rows if (row["model"], row["seed"], row["mask"]) == (model, 0, "2:4")]
    measured = [(Coefficients(**row["coefficients"]), row["perplexity"]) for row in rows]
    assert measured[0][0] == RIA and not search_optimisers.is_inside(RIA)  # whose neighbourhood is 0
    inside = [(own, math.log(value / measured[0][1])) for own, value in measured if search_optimisers.is_inside(own)]
    assert len(inside) >= 28
    values = found(np.array([SPACE.point(own) for own, _ in inside]))
    assert values == pytest.approx([value for _, value in inside], abs=0.05)
    # Between the points it does not leave the range of what was measured by much.
    logs = [value for _, value in inside]
    everywhere = found(search_optimisers.sobol(1024, 1))
    assert min(logs) - 0.25 < everywhere.min() and everywhere.max() < max(logs) + 0.25


@pytest.mark.parametrize("name", METHODS)
def test_methods_spend_the_same_windows_and_find_a_low_place(name):
    spent, best = 0, np.array([0.3, 0.6, 0.5, 0.5])

    def bowl(points):
        return ((points - best) ** 2).sum(axis=1)

    def look(points, windows):
        nonlocal spent
        spent += len(points) * windows
        return bowl(points)

    ended = METHODS[name](look, 3)
    assert spent == CANDIDATES * WINDOWS
    assert bowl(ended[None])[0] < 0.12
