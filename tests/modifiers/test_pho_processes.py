"""PHOSearchModifier in two processes: the search of one, bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import two_searches
from crepe_llm.search.study import Study
from tiny_models import configs, save_model

SCRIPT = Path(two_searches.__file__)
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def cut(study, path):
    """The study as a kill leaves it: some candidates by proxy, and some trials of the first stage."""
    content = json.loads(study.read_text())
    first = content["stages"][0]
    first["trials"] = first["trials"][:7]
    path.write_text(json.dumps(content | {"stages": [first], "finished": False}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What one process wrote, and what two did; each went on with a search of the other."""
    root = tmp_path_factory.mktemp("searches")
    save_model(configs(64, 96)["llama"](), root / "model")
    one, two = root / "one", root / "two"
    one.mkdir()
    two.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        two_searches.main(root / "model", one)
        cut(one / "study.json", two / "cut.json")
        command = [sys.executable, *TWO, str(SCRIPT), str(root / "model"), str(two)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        cut(two / "study.json", one / "cut.json")
        two_searches.run(root / "model", one / "cut.json")
    finally:
        torch.set_num_threads(threads)
    return one, two


def seen(path):
    """What a study holds but times."""
    study = Study.load(path)
    stages = [(s.name, s.chosen, [(t.coefficients, t.losses, t.tokens) for t in s.trials]) for s in study.stages]
    rounds = None if study.plan is None else study.plan.rounds
    return study.sample, rounds, [(c.coefficients, c.value) for c in study.candidates], stages, study.recommended


def test_two_processes_search_as_one(folders):
    one, two = (seen(folder / "study.json") for folder in folders)
    assert one == two
    assert len(one[2]) > 20 and [len(trials) for _, _, trials in one[3]] == [15, 4]


def test_what_another_study_found_is_judged_alike(folders):
    one, two = (seen(folder / "lent.json") for folder in folders)
    assert one == two and len(one[3]) == 1


@pytest.mark.parametrize("number", [0, 1])
def test_a_search_goes_on_in_another_number_of_processes(folders, number):
    assert seen(folders[number] / "cut.json") == seen(folders[number] / "study.json")
    assert Study.load(folders[number] / "cut.json").finished


def test_the_model_is_pruned_with_what_was_found(folders):
    one, two = ({n: w for n, w in torch.load(f / "weights.pt").items() if "_proj" in n} for f in folders)
    for name, weight in one.items():
        assert weight.count_nonzero() == weight.numel() / 2
        # The recipe's own calibration is added up over processes, and rounding may decide between two weights.
        assert ((weight == 0) != (two[name] == 0)).float().mean() < 1e-3, name


def test_an_error_in_one_process_ends_all_and_other_text_in_each_is_refused(folders):
    (first, data), (second, again) = (
        (folders[1] / f"refused{number}.txt").read_text().splitlines() for number in (0, 1)
    )
    assert first == "process 1 of 2 has failed: item 1 is bad" and second == "item 1 is bad"
    assert data == again and "they were given different data" in data
    assert not (folders[1] / "other.json").exists()
