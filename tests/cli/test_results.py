"""`--json`: the figures in a file, whole or not at all."""

import json
import os
from argparse import Namespace

import pytest
from transformers import AutoModelForCausalLM

from crepe_llm.cli.main import main, parser
from crepe_llm.cli.results import write_json
from sparse_models import prune_2of4


def test_every_command_that_has_figures_writes_them():
    (commands,) = [each for each in parser()._actions if isinstance(each.choices, dict)]
    without = [name for name, command in commands.choices.items() if "--json" not in command._option_string_actions]
    assert without == ["serve", "completion"]  # vLLM's options, and a script of the shell


def test_an_older_file_is_replaced_and_keeps_its_mode(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    path.chmod(0o600)
    (tmp_path / "link.json").symlink_to(path)
    write_json(
        Namespace(json=tmp_path / "link.json"), {"loss": float("inf"), "losses": [1.5, float("nan")], "at": path}
    )
    assert json.loads(path.read_text()) == {"loss": None, "losses": [1.5, None], "at": str(path)}
    assert path.stat().st_mode & 0o777 == 0o600 and (tmp_path / "link.json").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", "link.json"]


def test_what_a_command_reads_is_not_written_over(dense, text, tmp_path, refusal):
    (tmp_path / "link.json").symlink_to(text)
    before = text.read_text()
    for path in (text, tmp_path / "link.json"):
        assert "is a file that this command reads" in refusal(["evaluate", dense, "--text", text, "--json", path])
    assert text.read_text() == before
    command = ["prune", dense, "--recipe", "magnitude_2of4", "--output", tmp_path / "out"]
    assert "is what --output names, too: name another file" in refusal([*command, "--json", tmp_path / "out"])
    assert not (tmp_path / "out").exists()
    packing = ["compress", dense, tmp_path / "out", "--json", tmp_path / "out"]
    assert "--json" in (said := refusal(packing)) and "is what OUT names, too" in said
    (tmp_path / "weights").write_text("")
    several = ["compare", dense, tmp_path / "weights", "--text", text, "--json", tmp_path / "weights"]
    assert "is a file that this command reads" in refusal(several)
    report = ["report", dense, "--text", text]
    assert "is what --output names, too" in refusal([*report, "--json", dense / "report.html"])
    assert "--output" in refusal([*report, "--output", text]) and text.read_text() == before


def test_two_files_of_one_command_are_two(dense, text, tmp_path, refusal):
    search = ["search", dense, "--text", text, "--study", tmp_path / "study.json"]
    (tmp_path / "link.json").symlink_to(tmp_path / "study.json")
    assert "is what --study names, too: name another file" in refusal([*search, "--json", tmp_path / "link.json"])
    assert "is what --plot names, too" in refusal([*search, "--plot", tmp_path / "study.json"])
    assert "is a file that this command reads" in refusal([*search, "--plot", text])
    assert not (tmp_path / "study.json").exists()


def test_a_failure_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *names: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        write_json(Namespace(json=path), {"loss": 1})
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(Namespace(json=pipe), {"loss": 1})
    assert json.loads(os.read(reader, 100)) == {"loss": 1}
    os.close(reader)


@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_conversions_of_what_is_not_there_are_refused(command, tmp_path, refusal):
    assert "absent is not a folder: name a folder" in refusal([command, tmp_path / "absent", tmp_path / "out"])


def test_conversions_write_their_figures(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense)
    prune_2of4(model)
    model.save_pretrained(tmp_path / "pruned")
    command = ["compress", tmp_path / "pruned", tmp_path / "packed", "--json", tmp_path / "figures.json"]
    assert main([*map(str, command)]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    size = (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert (figures["layers"], figures["bytes"]) == (14, size) and figures["bytes_before"] > size
    command = ["decompress", tmp_path / "packed", tmp_path / "plain", "--json", tmp_path / "figures.json"]
    assert main([*map(str, command)]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["output"] == str(tmp_path / "plain")
