import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from crepe_llm.search.fitness import PROXIES, evaluate
from crepe_llm.search.optimisers import OPTIMISERS
from crepe_llm.search.search import search
from crepe_llm.search.space import RIA, Mask, SearchSpace
from crepe_llm.search.study import Study, StudyError
from searches import KERNELS, TWO_OF_FOUR, bowl, sample, study


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_interrupted_searches_end_as_uninterrupted_ones(tmp_path, optimiser):
    whole = search(bowl(), study(optimiser), candidates=60)
    path = tmp_path / "study.json"
    calls = 0

    def interrupted(candidate):
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return bowl()(candidate)

    with pytest.raises(KeyboardInterrupt):
        search(interrupted, study(optimiser), candidates=60, path=path)
    kept = Study.load(path)
    assert not kept.finished
    assert 20 <= len(kept.candidates) < 30
    resumed = search(bowl(), study(optimiser), candidates=60, path=path)
    assert [(c.coefficients, c.value) for c in resumed.candidates] == [
        (c.coefficients, c.value) for c in whole.candidates
    ]
    assert Study.load(path).finished


def test_a_killed_search_ends_as_an_uninterrupted_one(tmp_path):
    """SIGKILL at moments that fall between and within generations."""
    script = tmp_path / "searching.py"
    script.write_text(
        "import sys, time\n"
        "from crepe_llm.search.search import search\n"
        "from crepe_llm.search.space import Mask, SearchSpace\n"
        "from crepe_llm.search.study import Study\n"
        "space = SearchSpace()\n"
        "def loss(candidate):\n"
        "    time.sleep(0.01)\n"
        "    return sum((a - b) ** 2 for a, b in zip(space.point(candidate), (0.7, 0.3, 0.6, 0.5)))\n"
        "search(loss, Study('m', Mask('2:4', 0.5), 'bowl', False), candidates=120, path=sys.argv[1])\n"
    )
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    uninterrupted = subprocess.Popen([sys.executable, script, whole], env=environment)
    for wanted in (20, 70):
        process = subprocess.Popen([sys.executable, script, killed], env=environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if killed.exists() and len(json.loads(killed.read_text())["candidates"]) > wanted:
                break
            assert process.poll() is None
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not Study.load(killed).finished
    subprocess.run([sys.executable, script, killed], env=environment, check=True)
    assert uninterrupted.wait() == 0
    first, second = Study.load(whole), Study.load(killed)
    assert [(c.coefficients, c.value) for c in first.candidates] == [
        (c.coefficients, c.value) for c in second.candidates
    ]
    assert first.best.coefficients == second.best.coefficients


def test_a_larger_budget_continues_and_a_smaller_one_loses_nothing(tmp_path):
    path = tmp_path / "study.json"
    search(bowl(), study(), candidates=24, path=path)
    longer = search(bowl(), study(), candidates=48, path=path)
    assert len(longer.candidates) == 49

    def never(candidate):
        raise AssertionError("everything is on record")

    assert len(search(never, study(), candidates=8, path=path).candidates) == 49
    assert len(Study.load(path).candidates) == 49


def test_minutes_end_a_search():
    def slow(candidate):
        time.sleep(0.01)
        return bowl()(candidate)

    result = search(slow, study(), minutes=0.3 / 60)
    assert result.seconds >= 0.3
    assert len(result.candidates) < 40


def test_progress_is_told_of_each_generation():
    seen = []
    search(bowl(), study(), candidates=18, progress=lambda s: seen.append(len(s.candidates)))
    assert seen == [9, 17, 25]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"proxy": "gini"},
        {"mask": Mask("4:8", 0.5)},
        {"model": "another"},
        {"sample": {"rows": 4}},
        {"space": SearchSpace(row=2.0)},
    ],
)
def test_another_search_does_not_continue_a_study(tmp_path, other):
    path = tmp_path / "study.json"
    search(bowl(), study(), candidates=8, path=path)
    [field] = other
    with pytest.raises(StudyError, match=f"was made with {field}="):
        search(bowl(), study(**other), candidates=16, path=path)


def test_a_study_that_does_not_replay_is_refused(tmp_path):
    path = tmp_path / "study.json"
    search(bowl(), study(), candidates=80, path=path)
    content = json.loads(path.read_text())
    content["candidates"][70]["value"] -= 10.0
    path.write_text(json.dumps(content))
    with pytest.raises(StudyError, match="does not replay"):
        search(bowl(), study(), candidates=24, path=path)


def test_constant_and_nan_proxies_are_refused():
    with pytest.raises(ValueError, match=r"bowl is 1\.0 for each of \d+ candidates"):
        search(lambda c: 1.0, study(), candidates=50)
    with pytest.raises(ValueError, match="bowl is nan for row"):
        search(lambda c: math.nan if c != RIA else 1.0, study(), candidates=50)


def test_bad_budgets_and_names_are_refused():
    with pytest.raises(ValueError, match="needs a budget"):
        search(bowl(), study())
    with pytest.raises(ValueError, match="candidates=0"):
        search(bowl(), study(), candidates=0)
    with pytest.raises(ValueError, match="minutes=-1"):
        search(bowl(), study(), minutes=-1)
    with pytest.raises(ValueError, match="optimiser=annealing must be one of cma"):
        search(bowl(), study("annealing"), candidates=1)
    with pytest.raises(StudyError, match="no candidates"):
        _ = study().best


def test_no_better_than_ria_is_said():
    result = search(lambda c: 0.0 if c == RIA else 1.0 + bowl()(c), study(), candidates=20)
    assert not result.beats_reference
    assert result.best.coefficients == RIA


def test_a_real_search_lowers_the_error_it_searches_for():
    parts = [sample(seed=seed, d_out=40, d_in=64) for seed in range(3)]
    proxy = PROXIES["reconstruction"]
    result = search(
        lambda c: evaluate(parts, c, TWO_OF_FOUR, proxy),
        study(proxy="reconstruction", space=SearchSpace(kernel_sizes=KERNELS)),
        candidates=80,
    )
    assert result.beats_reference
