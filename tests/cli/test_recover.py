"""`crepe recover --teacher`: the folder, its card and plot, and which options go together."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from crepe_llm.checkpoints import folders
from crepe_llm.checkpoints.converting import pack_folder
from crepe_llm.checkpoints.reading import read_folder
from crepe_llm.cli.main import main
from crepe_llm.cli.quiet import quiet
from crepe_llm.evaluation import model_card
from sparse_models import prune_2of4


@pytest.fixture(scope="module")
def dense(dense, tmp_path_factory):
    """The small model of the other tests, with weights so large that it predicts something."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    model = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The same model, 2:4, with a card of its own."""
    folder = tmp_path_factory.mktemp("packed") / "sparse"
    model = AutoModelForCausalLM.from_pretrained(dense)
    prune_2of4(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    pack_folder(folder, {})
    (folder / "README.md").write_text("---\nbase_model: x\n---\n\n# x, pruned\n\nBy a recipe.\n")
    return folder


def arguments(packed, dense, text, output, *more):
    options = ("--length", 32, "--tokens", 1280, "--learning-rate", 5e-3, "--warmup", 2)
    command = ("recover", packed, "--teacher", dense, "--text", text, "--output", output, *options, *more)
    return [str(argument) for argument in command]


def test_recover_writes_a_folder_with_a_card_and_a_plot(dense, packed, text, tmp_path, capsys):
    output, figures = tmp_path / "recovered", tmp_path / "figures.json"
    assert main(arguments(packed, dense, text, output, "--json", figures)) == 0
    out = capsys.readouterr().out
    assert "training: " in out and "10 steps, 1,280 tokens, about" in out
    assert f"{output}: held-out loss " in out and "of 10 steps, 1,280 tokens" in out
    written = json.loads(figures.read_text())
    assert (written["steps"], written["tokens"], len(written["losses"])) == (10, 1280, 10)
    assert f"held-out loss {written['held_out'][0][1]:.4f} became" in out
    assert sorted(tmp_path.iterdir()) == [figures, output]
    before, after = read_folder(packed), read_folder(output)
    assert before.layers.keys() == after.layers.keys()
    for name in before.layers:
        assert torch.equal(before.load(f"{name}.bitmask"), after.load(f"{name}.bitmask")), name
    card = (output / "README.md").read_text()
    assert f"Teacher: {dense}. Text: fox.txt. 1,280 tokens, repetitions included, in 10 steps" in card
    assert "| learning_rate | 0.005 |" in card and "| 0 | " in card and f"crepe recover {packed}" in card
    assert card.count("---\n") == 2 and card.rstrip().endswith("# x, pruned\n\nBy a recipe.")
    assert "(loss.png)" in card and (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert main(["evaluate", str(output), "--text", str(text), "--window", "32", "--tokens", "64"]) == 0


def test_a_run_shows_a_plan_one_line_and_a_table(dense, packed, text, tmp_path):
    output = tmp_path / "recovered"
    command = [sys.executable, "-m", "crepe_llm", *arguments(packed, dense, text, output, "--report")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert list(rows) == [
        "model",
        "teacher",
        "device",
        "output",
        "text",
        "training",
        str(output),
        "size",
        "log",
        "report",
    ]
    assert rows["teacher"].strip() == str(dense) and rows["text"].strip() == "fox.txt"
    assert "10 steps, 1,280 tokens, about" in rows["training"] and "held-out loss" in rows[str(output)]
    lines = [line for line in done.stderr.splitlines() if line]  # bars begin with a carriage return
    assert lines and all(line.startswith(("recovering:", "measuring:")) for line in lines), done.stderr
    assert "100%" in lines[-1] and len(lines) < 6
    assert "recovering: 100%" in Path(rows["log"].strip()).read_text()
    assert "loss by step" in (output / "report.html").read_text()


def test_processes_but_the_first_say_nothing(dense, packed, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with quiet("recover", False, own=("training", "recovering")) as progress:
        progress.tell("model", "smollm2")
        progress.say("a warning")
        sys.stderr.write("\rrecovering: 100%|")
    assert capsys.readouterr() == ("", "") and "100%" in progress.log.read_text()


def test_the_teacher_may_write_the_text(dense, packed, tmp_path):
    output = tmp_path / "recovered"
    command = ["recover", packed, "--teacher", dense, "--self-generated", 640, "--length", 32, "--output", output]
    assert main([*map(str, command), "--learning-rate", "5e-3", "--warmup", "0", "--method", "lora"]) == 0
    assert "Text: 640 tokens that the teacher wrote." in (output / "README.md").read_text()


def test_what_cannot_be_had_is_said(dense, packed, text, tmp_path, capsys):
    """More windows than the text has, and a learning rate that never gets to its value."""
    more = ("--windows", 100000, "--warmup", 10, "--evaluations", 1)
    assert main(arguments(packed, dense, text, tmp_path / "recovered", *more)) == 0
    out = capsys.readouterr().out
    found = re.search(r"windows: +(\d+), all that the text holds; --windows asks for 100000\n", out)
    assert found and 40 <= int(found[1]) < 100000
    assert "; that ends within the warm-up of 10 steps, at 91% of the learning rate: train on more tokens" in out


def test_nothing_may_be_held_out(dense, packed, text, tmp_path, capsys):
    assert main(arguments(packed, dense, text, tmp_path / "recovered", "--held-out", 0)) == 0
    assert "training loss " in capsys.readouterr().out
    assert "The state is that of step 10." in (tmp_path / "recovered" / "README.md").read_text()


def test_a_divergence_leaves_the_best_state_or_nothing(dense, packed, text, tmp_path, refusal):
    output = tmp_path / "recovered"
    error = refusal(arguments(packed, dense, text, output, "--learning-rate", 90, "--warmup", 0))
    assert "diverges at a learning rate of 90" in error and "none is written" in error
    assert not list(tmp_path.iterdir())


def test_a_card_that_is_not_utf8_is_quoted_all_the_same(dense, packed, text, tmp_path):
    source, output = shutil.copytree(packed, tmp_path / "sparse"), tmp_path / "recovered"
    (source / "README.md").write_bytes("# modèle élagué".encode("latin-1"))
    assert main(arguments(source, dense, text, output)) == 0
    assert "# mod\ufffdle \ufffdlagu\ufffd" in (output / "README.md").read_text(encoding="utf-8")
    assert sorted(tmp_path.iterdir()) == [output, source]


def failing_once(monkeypatch, module, name):
    """Make a function fail when it is called first."""
    function, calls = getattr(module, name), []

    def failing(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.EIO, "the disk hiccups")
        return function(*args)

    monkeypatch.setattr(module, name, failing)


@pytest.mark.parametrize(("module", "name"), [(model_card, "write_recovery_card"), (folders, "_flush_all")])
def test_what_fails_after_the_training_loses_nothing(module, name, dense, packed, text, tmp_path, capsys, monkeypatch):
    failing_once(monkeypatch, module, name)
    step, steps = Trainer.training_step, []
    monkeypatch.setattr(Trainer, "training_step", lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs))
    output = tmp_path / "recovered"
    command = arguments(packed, dense, text, output)
    assert main(command) == 2
    work = tmp_path / ".recovered-recovery"
    said = capsys.readouterr().err
    assert "the disk hiccups" in said and f"{work} keeps what was trained: the same command goes on from there" in said
    assert list(tmp_path.iterdir()) == [work]
    assert main([*command, "--seed", "5"]) == 2
    said = capsys.readouterr().err
    assert "with other settings" in said and "keeps what was trained" not in said
    assert main(command) == 0
    assert list(tmp_path.iterdir()) == [output] and (output / "README.md").is_file()
    assert len(steps) < 15  # not 20, from the start again


def test_code_of_a_model_runs_if_it_is_trusted(dense, packed, text, tmp_path, refusal):
    def with_code(folder, name):
        copy = shutil.copytree(folder, tmp_path / name)
        config = json.loads((copy / "config.json").read_text()) | {"model_type": "mine", "architectures": ["Mine"]}
        config["auto_map"] = {"AutoConfig": "mine_config.MineConfig", "AutoModelForCausalLM": "mine_model.Mine"}
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "mine_config.py").write_text(
            "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        )
        (copy / "mine_model.py").write_text(
            "from transformers import LlamaForCausalLM\nfrom .mine_config import MineConfig\n"
            "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
        )
        return copy

    teacher, pruned, output = with_code(dense, "teacher"), with_code(packed, "pruned"), tmp_path / "recovered"
    cure = "brings code of its own, which has to run to load it: read that code, then give --trust-remote-code"
    assert f"{teacher} {cure}" in refusal(arguments(pruned, teacher, text, output))
    assert f"{pruned} {cure}" in refusal(arguments(pruned, dense, text, output))
    assert not list(tmp_path.glob("*recover*"))
    assert main(arguments(pruned, teacher, text, output, "--trust-remote-code")) == 0
    saved = ["evaluate", output, "--text", text, "--window", 32, "--tokens", 64, "--trust-remote-code"]
    assert main([str(argument) for argument in saved]) == 0


def test_options_that_do_not_go_together_are_refused(dense, packed, text, tmp_path, refusal):
    output = tmp_path / "recovered"
    assert "--epochs goes without --teacher" in refusal(arguments(packed, dense, text, output, "--epochs", 2))
    without = ["recover", packed, "--text", text, "--output", output]
    assert "--self-generated goes with --teacher" in refusal([*without, "--self-generated", 100])
    assert "sparse or quantized" in refusal(without) and "give --teacher" in refusal(without)
    nothing = ["recover", packed, "--teacher", dense, "--output", output]
    assert "give --text, --dataset, --sample or --self-generated" in refusal(nothing)
    assert "tokens=1280 and minutes=1.0 are two budgets" in refusal(
        arguments(packed, dense, text, output, "--minutes", 1)
    )
    assert "is not pruned" in refusal(arguments(dense, dense, text, output))
    assert "there is no folder" in refusal(arguments(packed, tmp_path / "no", text, output))
    assert not list(tmp_path.iterdir())
