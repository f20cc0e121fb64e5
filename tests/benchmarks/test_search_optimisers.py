"""The surfaces that search_optimisers.py simulates on, and the methods' budgets."""

import math

import numpy as np
import pytest

import search_optimisers
from crepe_llm.search.space import RIA
from records import RESULTS, read_old
from search_optimisers import CANDIDATES, METHODS, SPACE, WINDOWS


def test_a_surface_goes_through_what_was_measured():
    found = search_optimisers.surface("gemma3", "0.6:matrix")
    ria = np.array([SPACE.point(RIA)])
    assert found(ria)[0] == pytest.approx(0, abs=1e-6)
    rows = [row for row in read_old(RESULTS / "proxy_study.jsonl") if row["model"] == "gemma3" and not row["seed"]]
    rows = [row for row in rows if row["mask"] == "0.6:matrix"]
    row, own = rows[7], search_optimisers.Coefficients(**rows[7]["coefficients"])
    base = next(each["perplexity"] for each in rows if each["coefficients"] == rows[0]["coefficients"])
    assert found(np.array([SPACE.point(own)]))[0] == pytest.approx(math.log(row["perplexity"] / base), abs=1e-6)


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
