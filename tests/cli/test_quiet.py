"""What a run shows on the terminal, and what it keeps in its log file."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from loguru import logger

from crepe_llm.cli.quiet import log_folder, quiet


def test_libraries_speak_to_the_log_and_this_package_to_the_terminal(capsys):
    with quiet("prune", False) as progress:
        print("a library prints")
        sys.stderr.write("\rbar:  50%|\rbar: ")
        sys.stderr.write("\rbar: 100%|\r")
        warnings.warn("a library warns", stacklevel=1)
        logger.patch(lambda record: record.update(name="llmcompressor.x")).warning("the toolkit warns")
        for _ in range(2):
            logger.patch(lambda record: record.update(name="crepe_llm.x")).warning("layers are left dense")
        logging.getLogger("crepe_llm.x").warning("%s was not copied", "a link")
        progress.tell("model", "smollm2")
    shown = capsys.readouterr()
    assert shown.out.split() == ["model:", "smollm2"]
    assert shown.err.splitlines() == ["warning: layers are left dense", "warning: a link was not copied"]
    log = progress.log.read_text()
    for said in ("a library prints", "bar: 100%", "a library warns", "the toolkit warns", "left dense", "not copied"):
        assert said in log, said
    assert "bar:  50%" not in log and "\r" not in log
    print("afterwards")
    assert capsys.readouterr().out == "afterwards\n"


def test_an_error_names_the_log():
    with pytest.raises(ZeroDivisionError) as raised, quiet("prune", False) as progress:
        progress.tell("model", "smollm2")
        raise ZeroDivisionError
    assert raised.value.__notes__ == [f"the log of this run is {progress.log}"]


def test_a_run_that_is_refused_before_its_plan_leaves_no_log():
    with pytest.raises(ValueError, match="no such recipe") as raised, quiet("prune", False):
        raise ValueError("no such recipe")
    assert not hasattr(raised.value, "__notes__") and not list(log_folder().iterdir())


def test_the_last_logs_are_kept():
    for number in range(30):
        (log_folder() / f"crepe-prune-20200101-0000{number:02}-1.log").touch()
    with quiet("prune", False) as progress:
        pass
    kept = sorted(log_folder().iterdir())
    assert len(kept) == 20 and kept[-1] == progress.log and "000011" in kept[0].name


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with quiet("prune", False) as progress:
        pass
    assert progress.log.is_file()
    progress.log.unlink()


def prune(dense, text, tmp_path, *more):
    """The finished process of a prune run in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-m", "crepe_llm", "prune", dense, "--recipe", "crepe_2of4_best", "--text", text]
    options = ["--samples", "4", "--length", "32", "--output", tmp_path / "out", *more]
    return subprocess.run([*map(str, command + options)], cwd=work, capture_output=True, text=True, env=os.environ)


def test_a_run_shows_a_plan_one_line_and_a_table(dense, text, tmp_path):
    done = prune(dense, text, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert "ChannelPermutationModifier permutes channels, CRePEModifier prunes to 2:4, ADMM" in rows["recipe"]
    assert "are zero" in rows[str(tmp_path / "out")]
    assert rows["calibration"].strip() == "4 windows of 32 tokens of fox.txt, seed 0"
    assert "14 linear layers in 2 blocks" in rows["layers"] and str(tmp_path / "out") in rows["output"]
    assert rows["device"] and rows["model"] and rows["time"] and rows["size"]
    assert rows["expected"].strip().startswith("about ") and "perhaps half or twice that" in rows["expected"]
    assert rows["pruned"].strip() == "14 of 14 linear layers"
    assert not list((tmp_path / "work").iterdir())
    bar = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
    assert "pruning:   0%" in bar[0] and "6/6 steps" in bar[-1]  # two passes of two blocks and what follows them
    assert all("steps, " in line and line.endswith(" left") for line in bar), done.stderr
    log = Path(rows["log"].strip()).read_text()
    assert "Compression lifecycle" in log and "Realised sparsity" in log


def test_verbose_shows_it_all(dense, text, tmp_path):
    done = prune(dense, text, tmp_path, "--verbose")
    assert done.returncode == 0, done.stderr
    assert "Compression lifecycle" in done.stdout and "Calibrating" in done.stderr and "log:" not in done.stdout


def test_a_failure_in_the_middle_names_the_log(dense, text, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('a_stage: {a_modifiers: {CRePEModifier: {mask_structure: "2:4", targets: [Nothing]}}}')
    done = prune(dense, text, tmp_path, "--recipe", recipe)
    error, note = [line for line in done.stderr.splitlines() if line.startswith("crepe: ")]
    assert done.returncode == 2 and "match no layer" in error and not (tmp_path / "out").exists()
    assert "Compression lifecycle" in Path(note.removeprefix("crepe: the log of this run is ")).read_text()
