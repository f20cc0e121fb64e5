"""`crepe search`: what it shows; tests/modifiers/test_pho.py has what it finds."""

import json
import subprocess
import sys

import pytest

from crepe_llm.cli.main import main
from crepe_llm.cli.search import state_in_words
from crepe_llm.search.space import RIA, WANDA, Mask
from crepe_llm.search.study import Candidate, Study
from crepe_llm.search.trials import Plan, Round, Stage, Trial


def trials(count, seconds):
    return [Trial(RIA, (1.0,), (10,), seconds) for _ in range(count)]


def test_the_state_of_a_study_and_the_time_that_is_left():
    study = Study("m", Mask("2:4", 0.5), "balanced_reconstruction", False)
    study.candidates = [Candidate(RIA, 1.0, 0.1, -1), Candidate(WANDA, 1.0, 0.1, 0)]
    assert state_in_words(study, None, 65) == "1 of 200 candidates by proxy, 01:05 so far"
    first, last = Stage("first stage: masks alone"), Stage("last stage: what the recipe makes")
    study.stages, last.trials = [last], trials(1, 30.0)
    assert state_in_words(study, 50, 65) == "the model is pruned with the recipe's own coefficients, 01:05 so far"
    # 40 candidates in 200 s, and three of the last four in 90 s, of which the recipe's own are measured already.
    study.plan = Plan("", (Round(40, 2), Round(4, 8)), 290.0)
    assert state_in_words(study, 50, 65) == "0 of 40 candidates by masks alone, 01:05 so far, 04:50 left"
    study.stages, first.trials = [last, first], trials(10, 8.0)  # slower than planned
    assert state_in_words(study, 50, 3700) == "10 of 40 candidates by masks alone, 1:01:40 so far, 05:30 left"
    first.trials, last.trials = trials(40, 8.0), trials(3, 30.0)
    assert state_in_words(study, 50, 0) == "3 of 4 candidates pruned as the recipe prunes, 00:00 so far, 00:30 left"
    # The times of two processes, which share the work.
    assert state_in_words(study, 50, 0, 2).endswith("00:15 left")


def test_a_run_shows_a_plan_one_line_and_a_table(dense, text, tmp_path, capsys):
    study = tmp_path / "study.json"
    options = ["--samples", "4", "--length", "16", "--candidates", "8", "--tokens", "1000"]
    command = ["search", str(dense), "--text", str(text), "--study", str(study), *options]
    assert main(command) == 0
    shown = capsys.readouterr()
    rows = [line.partition(":")[0] for line in shown.out.splitlines() if line[:1].isalpha()]
    assert rows[:6] == ["model", "masks", "budget", "calibration", "device", "study"]
    assert rows[-4:] == ["searched", "chosen", "CRePEModifier", "log"]
    assert len(shown.out.splitlines()) < 24
    assert "candidates by proxy" in shown.out and f"all of it is in {study}" in shown.out
    lines = shown.err.splitlines()
    assert lines and all(line.startswith("searching: ") for line in lines), shown.err
    assert "pruned as the recipe prunes" in lines[-1] and lines[-1].rstrip().endswith(" left")
    assert json.loads(study.read_text())["finished"]


def test_two_processes_find_what_one_finds(dense, text, tmp_path, capsys):
    options = ["--samples", "4", "--length", "16", "--candidates", "8", "--tokens", "1000"]
    command = ["search", str(dense), "--text", str(text), *options, "--study"]
    assert main([*command, str(tmp_path / "one.json")]) == 0
    told = capsys.readouterr().out
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "crepe_llm"]
    done = subprocess.run(
        [sys.executable, *torchrun, *command, str(tmp_path / "two.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(told.splitlines()) and ", 2 processes" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
    one, two = (Study.load(tmp_path / name) for name in ("one.json", "two.json"))
    assert two.finished and two.sample == one.sample and two.recommended == one.recommended
    losses = [[trial.losses for stage in study.stages for trial in stage.trials] for study in (one, two)]
    assert losses[0] == [pytest.approx(each, rel=1e-6) for each in losses[1]]


def test_the_default_budget_is_said_as_it_is():
    from crepe_llm.cli.main import parser
    from crepe_llm.cli.search import _budget

    options = parser().parse_args(["search", "MODEL", "--study", "FILE", "--sample"])
    said = "then 32 candidates on 8192 tokens each, the best 4 on 16384, as far as there is text"
    assert _budget(options).endswith(said)


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_search(dense, text, tmp_path, refusal):
    study = tmp_path / "study.json"
    command = ["search", dense, "--text", text, "--study", study, "--plot", tmp_path / "plot.exotic"]
    assert ".exotic is no format of a plot; take one of" in refusal([*map(str, command)])
    assert not study.exists()
