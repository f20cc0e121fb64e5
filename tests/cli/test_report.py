"""`crepe report` and `crepe compare`: figures against naive counts, and the page in a real browser."""

import importlib.util
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from crepe_llm.cli.main import main
from crepe_llm.evaluation import page as page_module
from crepe_llm.evaluation import throughput
from sparse_models import prune_2of4
from tiny_models import letters_tokenizer


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    """The small model, 2:4, with a card and the losses of a recovery."""
    folder = tmp_path_factory.mktemp("pruned") / "sparse"
    model = AutoModelForCausalLM.from_pretrained(dense)
    prune_2of4(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(dense).save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: x\n---\n\n# x, pruned\n")
    curve = {"losses": [2.0, 1.5, 1.0], "held_out": [[0, 2.1], [3, 1.1]], "best_step": 3, "tokens": 96, "seconds": 4.0}
    (folder / "recovery.json").write_text(json.dumps(curve))
    return folder


def report(pruned, text, *more):
    measured = ["--text", text, "--window", 32, "--tokens", 128]
    return [str(argument) for argument in ["report", pruned, *measured, *more]]


@pytest.fixture(scope="module")
def page(dense, pruned, text, tmp_path_factory):
    """The page of the small model beside its dense one; the command ran twice, as a user may run it."""
    figures = tmp_path_factory.mktemp("figures") / "figures.json"
    for _ in range(2):
        assert main(report(pruned, text, "--dense", dense, "--json", figures)) == 0
    return pruned / "report.html", json.loads(figures.read_text())


def test_the_page_says_what_was_measured(page, dense, pruned, text, tmp_path):
    path, figures = page
    html = path.read_text()
    for which, model in (("dense", dense), ("pruned", pruned)):
        measured = ["--text", text, "--window", 32, "--tokens", 128, "--json", tmp_path / "ppl.json"]
        assert main([*map(str, ["evaluate", model, *measured])]) == 0
        value = json.loads((tmp_path / "ppl.json").read_text())["perplexity"]
        assert figures["perplexity"][which] == pytest.approx(value)
        assert f">{value:.2f}</td>" in html
    assert "tokens predicted in 4 windows of 32" in html and "Trained on 96 tokens in 0.1 minutes" in html
    assert html.count(">50.00 %</td>") == 14 and ">50.00%</td>" in html
    assert f">{(pruned / 'model.safetensors').stat().st_size / 1e6:.1f} MB</td>" in html
    assert html.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", html)  # needs no other file
    assert html.count("<td>Once upon a time") == 1


def test_output_errors_are_those_of_inner_products(page, dense, pruned, text):
    _, figures = page
    assert len(figures["output_errors"]) == 14
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, pruned)]
    ids = AutoTokenizer.from_pretrained(pruned)(text.read_text(), return_tensors="pt").input_ids[:, :32]
    grams = []
    for model in models:
        layer, seen = model.model.layers[1].mlp.down_proj, []
        layer.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output[0].detach()))
        model(ids)
        rows = seen[0]
        grams.append(torch.tensor([[float(a @ b) for b in rows] for a in rows]))
    error = ((grams[1] - grams[0]) ** 2).sum().sqrt() / (grams[0] ** 2).sum().sqrt()
    assert figures["output_errors"]["model.layers.1.mlp.down_proj"] == pytest.approx(float(error), rel=1e-3)


def test_the_card_gets_one_section_with_the_plots(page, pruned):
    card = (pruned / "README.md").read_text()
    assert card.startswith("---\nbase_model: x\n---\n\n# x, pruned\n") and card.count("## Report") == 1
    plots = re.findall(r"!\[[^\]]+\]\((\S+\.png)\)", card)
    assert plots == ["sparsity.png", "blocks.png", "errors.png", "losses.png"]
    for plot in plots:
        assert (pruned / plot).read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is missing (Debian: chromium)")
def test_a_browser_shows_the_page_without_a_complaint(page, tmp_path):
    shot = tmp_path / "page.png"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--hide-scrollbars"]
    target = [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", "--window-size=900,1600"]
    done = subprocess.run(["chromium", *flags, *target, page[0].as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and shot.read_bytes().startswith(b"\x89PNG"), done.stderr
    assert shot.stat().st_size > 20_000  # an empty page has less
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stderr


def test_another_model_is_not_the_dense_one(pruned, dense, text, tmp_path, refusal):
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    config = json.loads((other / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (other / "config.json").write_text(json.dumps(config))
    page = tmp_path / "page.html"
    said = refusal(report(pruned, text, "--dense", other, "--output", page))
    assert f"--dense {other} is not the parent of {pruned}: its num_hidden_layers is" in said
    assert not page.exists()


def test_mistakes_are_told_in_one_line(pruned, text, tmp_path, refusal):
    assert "is not a folder" in refusal(report(tmp_path / "absent", text))
    assert "does not exist" in refusal(report(pruned, text, "--output", tmp_path / "no" / "page.html"))
    broken = tmp_path / "broken"
    shutil.copytree(pruned, broken)
    (broken / "recovery.json").write_text("{}")
    assert "recovery.json is damaged" in refusal(report(broken, text))


def test_a_folder_that_takes_no_files_is_reported_elsewhere(pruned, text, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "shared"
    shutil.copytree(pruned, folder)
    for path in folder.glob("*.png"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: folder not in (path, path.parent) and access(path, mode))
    page = tmp_path / "page.html"
    assert main(report(folder, text, "--output", page)) == 0
    assert f"{folder} takes no plots" in capsys.readouterr().out
    assert page.read_text().count("data:image/png;base64,") == 3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "shared"]


def test_prune_reports_when_asked_to(dense, text, tmp_path):
    output = tmp_path / "out"
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--length", 32]
    assert main([*map(str, command), "--output", str(output), "--report"]) == 0
    html = (output / "report.html").read_text()
    assert "the calibration text itself" in html and f"<th>{dense.name}</th>" in html
    assert "![zeros of each linear layer" in (output / "README.md").read_text()


@pytest.fixture(scope="module")
def quantized(text, tmp_path_factory):
    """A small model as wide as a group of INT4 weights, and what `crepe prune` made of it: folders and figures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quantized")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=96, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "dense")
    letters_tokenizer(True).save_pretrained(folder / "dense")
    command = ["prune", folder / "dense", "--recipe", "crepe_2of4_w4a16", "--text", text, "--samples", 4]
    more = ["--length", 32, "--output", folder / "int4", "--report", "--json", folder / "figures.json"]
    assert main([*map(str, command + more)]) == 0
    return folder


def test_int4_models_are_reported(quantized, text, tmp_path):
    zeros = re.findall(r">([\d.]+) %</td>", (quantized / "int4" / "report.html").read_text())
    assert len(zeros) == 7 and all(50 <= float(percent) < 70 for percent in zeros)  # some more are rounded to zero
    assert json.loads((quantized / "figures.json").read_text())["layers_pruned"] == 7
    command = report(quantized / "int4", text, "--dense", quantized / "dense", "--json", tmp_path / "figures.json")
    assert main(command) == 0
    errors = json.loads((tmp_path / "figures.json").read_text())["output_errors"]
    assert len(errors) == 7 and min(errors.values()) > 0


def test_a_report_that_fails_takes_nothing_from_the_result(dense, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page_module, "plot_report", lambda *arguments: 1 // 0)
    command = ["prune", dense, "--recipe", "magnitude_2of4", "--text", text, "--samples", 4, "--length", 32, "--report"]
    figures = tmp_path / "figures.json"
    assert main([*map(str, command), "--output", str(tmp_path / "out"), "--json", str(figures)]) == 2
    printed, said = capsys.readouterr()
    assert "50.00% of the weights of 14 linear layers are zero" in printed and "crepe: error: ZeroDivision" in said
    assert json.loads(figures.read_text())["sparsity"] == 0.5


def test_compare_tabulates_models(dense, pruned, text, tmp_path, capsys):
    command = ["compare", dense, pruned, "--text", text, "--window", 32, "--tokens", 128, "--no-speed"]
    assert main([*map(str, command), "--json", str(tmp_path / "table.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "table.json").read_text())["models"]
    assert [row["model"] for row in rows] == [str(dense), str(pruned)]
    for line, row in zip(lines[1:3], rows, strict=True):
        size = sum(path.stat().st_size for path in (dense if "dense" in line else pruned).glob("*.safetensors"))
        assert row["bytes"] == size
        assert line.split() == [row["model"], f"{row['perplexity']:.2f}", f"{row['sparsity']:.2%}", f"{size / 1e6:.1f}"]
    assert rows[1]["sparsity"] == pytest.approx(0.5) and "4 windows of 32" in lines[3]


def test_compare_measures_all_models_in_the_same_windows(dense, text, tmp_path, capsys):
    short = tmp_path / "short"
    shutil.copytree(dense, short)
    config = json.loads((dense / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 24}))
    assert main([*map(str, ["compare", dense, short, "--text", text, "--no-speed"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = (line.split()[1] for line in lines[1:3])
    assert first == second and "windows of 24" in lines[3] and "perplexity on" in lines[3]


def fails(*arguments, **options):
    raise RuntimeError("x: y was not served:\nTraceback\nValueError: max_model_len is too large\n")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_compare_keeps_its_table_where_vllm_fails(dense, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "run", fails)
    command = [*map(str, ["compare", dense, "--text", text, "--window", 32, "--tokens", 128])]
    assert main([*command, "--json", str(tmp_path / "table.json")]) == 0
    printed, said = capsys.readouterr()
    assert str(dense) in printed.splitlines()[1] and "tokens/s" not in printed
    assert f"no speed of {dense}: vLLM has not served it (ValueError: max_model_len is too large)" in said
    (row,) = json.loads((tmp_path / "table.json").read_text())["models"]
    assert row["perplexity"] > 0 and row["tokens_per_s"] is None
    assert main([*command, "--speed"]) == 2  # which asks for it


def test_sizes_are_those_of_the_files_that_are_read(dense, text, tmp_path):
    twice, old = tmp_path / "twice", tmp_path / "old"
    for folder in (twice, old):
        shutil.copytree(dense, folder)
    shutil.copy(dense / "model.safetensors", twice / "consolidated.safetensors")
    torch.save(load_file(dense / "model.safetensors"), old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    command = ["compare", twice, old, "--text", text, "--window", 32, "--tokens", 64, "--no-speed"]
    assert main([*map(str, command), "--json", str(tmp_path / "table.json")]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["models"]
    assert [row["bytes"] for row in rows] == [(dense / "model.safetensors").stat().st_size, None]
    assert main(report(old, text)) == 0
    page = (old / "report.html").read_text()
    assert " MB</td>" not in page and '<td class="number"></td>' in page
