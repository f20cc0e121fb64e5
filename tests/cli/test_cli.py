import json
import os
import subprocess
import sys
from pathlib import Path

import llmcompressor  # noqa: F401  its log must not be bound to a single test's captured stderr
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from crepe_llm.checkpoints.folders import new_folder
from crepe_llm.cli.main import main
from crepe_llm.recipe_files import recipe_path, shipped_recipes
from tiny_models import letters_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A small random model with its tokenizer, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "dense"
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters_tokenizer(True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "fox.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return path


def refusal(arguments, capsys):
    """The error of a command that must fail as a user's mistake: one line, no traceback, status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("crepe: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_help_is_cheap_and_teaches():
    code = (
        "import sys; from crepe_llm.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'llmcompressor'} & set(sys.modules)"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "crepe prune smollm2 --recipe crepe_2of4" in done.stdout


def test_recipes_are_listed_and_printed(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in ("crepe_2of4", "crepe_4of8", "crepe_unstructured_50", "ria_2of4", "wanda_2of4"):
        assert name in listed
        assert main(["recipes", name]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(recipe_path(name).read_text())
    assert "'crepe_3of4'" in refusal(["recipes", "crepe_3of4"], capsys)


def test_a_file_goes_before_a_shipped_name(tmp_path, monkeypatch):
    assert recipe_path("crepe_2of4") == recipe_path("crepe_2of4.yaml") == shipped_recipes()["crepe_2of4"]
    monkeypatch.chdir(tmp_path)
    Path("crepe_2of4.yaml").write_text("mine: {}\n")
    assert recipe_path("crepe_2of4.yaml") == Path("crepe_2of4.yaml")


def test_the_package_carries_the_recipes(tmp_path):
    # The step of building a wheel that gathers its files; the extensions are of no interest here.
    code = "from setuptools import setup; setup()"
    command = [sys.executable, "-c", code, "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    carried = {path.name: path.read_text() for path in (tmp_path / "crepe_llm" / "recipes").iterdir()}
    assert carried == {path.name: path.read_text() for path in (ROOT / "recipes").glob("*.yaml")}
    assert (tmp_path / "crepe_llm" / "py.typed").is_file()


def test_evaluate_prints_and_writes_the_conditions(dense, text, tmp_path, capsys):
    result = tmp_path / "result.json"
    command = ["evaluate", dense, "--text", text, "--window", 32, "--tokens", 256, "--dtype", "bfloat16"]
    assert main([*map(str, command), "--json", str(result)]) == 0
    fields = json.loads(result.read_text())
    assert (fields["window"], fields["windows"], fields["tokens"]) == (32, 8, 8 * 31)
    assert (fields["corpus"], fields["dtype"]) == ("fox.txt", "bfloat16")
    printed = capsys.readouterr().out
    assert f"perplexity {fields['perplexity']:.4f} on fox.txt: 248 tokens" in printed


def test_evaluate_refuses_in_one_line(dense, text, tmp_path, capsys):
    assert "context of 64" in refusal(["evaluate", dense, "--text", text, "--window", 65], capsys)
    assert "absent.txt" in refusal(["evaluate", dense, "--text", tmp_path / "absent.txt"], capsys)
    assert "absent" in refusal(["evaluate", tmp_path / "absent", "--text", text], capsys)
    (tmp_path / "empty.txt").write_text("\n")
    assert "the text is empty" in refusal(["evaluate", dense, "--text", tmp_path / "empty.txt"], capsys)


def test_wikitext2_without_a_network_is_one_line(dense, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "crepe_llm", "evaluate", str(dense), "--wikitext2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "crepe: error: WikiText-2 could not be loaded from the Hugging Face hub" in done.stderr


def test_prune_writes_a_model_that_loads_and_a_card(dense, text, tmp_path, capsys):
    output = tmp_path / "pruned"
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--output", output]
    assert main([*map(str, command), "--samples", "4", "--length", "32", "--seed", "7"]) == 0
    assert "50.00% of the weights of 14 linear layers are zero" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [output]

    model = AutoModelForCausalLM.from_pretrained(output)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert layers.pop("lm_head").weight.count_nonzero() > 0.9 * model.lm_head.weight.numel()
    for layer in layers.values():
        groups = layer.weight.view(-1, 4)
        assert (groups.count_nonzero(dim=1) == 2).all()

    card = (output / "README.md").read_text()
    assert recipe_path("crepe_2of4").read_text().rstrip() in card
    for name, layer in layers.items():
        assert f"| {name} | {layer.weight.shape[0]} x {layer.weight.shape[1]} | 50.00% | 0.00% |" in card
    assert "4 windows of 32 tokens of fox.txt, seed 7" in card
    assert f"| torch | {torch.__version__} |" in card and "| llmcompressor | 0.14" in card
    assert f"crepe prune {dense} --recipe crepe_2of4" in card
    assert "CRePEModifier" in (output / "recipe.yaml").read_text()
    assert main(["evaluate", str(output), "--text", str(text), "--window", "32", "--tokens", "64"]) == 0


def test_prune_reports_matrices_that_became_smaller(dense, text, tmp_path, capsys):
    recipe, output = tmp_path / "cut.yaml", tmp_path / "cut"
    fields = "{sparsity: 0.25, uniform: true, round_to: 8}"
    recipe.write_text(f"a_stage:\n  pruning_modifiers:\n    CFSPModifier: {fields}\n")
    command = ["prune", dense, "--recipe", recipe, "--text", text, "--samples", 4, "--length", 32, "--output", output]
    assert main([str(argument) for argument in command]) == 0
    # A block has 3 x 32 x 64 weights in its FFN, and 32 x (32 + 16 + 16 + 32) in its attention.
    fewer = f"{0.25 * 6144 / (6144 + 3072):.2%}"
    assert f"{fewer} of the linear layers' weights are removed; 0.00% of the weights" in capsys.readouterr().out
    card = (output / "README.md").read_text()
    assert "6 of 14 linear layers were pruned" in card and f"hold {fewer} fewer weights" in card
    assert "| model.layers.0.mlp.up_proj | 48 x 32 | 0.00% | 0.00% |" in card


def test_prune_calibrates_on_a_data_set(dense, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    row = json.dumps({"text": "the quick brown fox jumps over the lazy dog"})
    (data / "train.jsonl").write_text(f"{row}\n" * 40)
    output = tmp_path / "pruned"
    command = ["prune", dense, "--recipe", "wanda_2of4", "--dataset", data, "--output", output]
    assert main([*map(str, command), "--samples", "2", "--length", "32"]) == 0
    assert f"2 windows of 32 tokens of {data}, train, seed 0" in (output / "README.md").read_text()


def test_a_failing_prune_leaves_no_folder(dense, text, tmp_path, capsys):
    output = tmp_path / "pruned"
    common = ["--text", text, "--output", output, "--length", 32]
    error = refusal(["prune", dense, "--recipe", "crepe_2of4", *common, "--samples", 1000], capsys)
    assert "1000 calibration windows" in error
    broken = tmp_path / "broken.yaml"
    start = "a_stage:\n  pruning_modifiers:\n    CRePEModifier:\n"
    broken.write_text(f'{start}      mask_structure: "4:2"\n')
    assert "mask_structure" in refusal(["prune", dense, "--recipe", broken, *common, "--samples", 4], capsys)
    broken.write_text(f'{start}      mask_structure: "2:4"\n      targets: [Nothing]\n')
    assert "match no layer" in refusal(["prune", dense, "--recipe", broken, *common, "--samples", 4], capsys)
    broken.write_text('stage:\n  modifiers:\n    CRePEModifier:\n      mask_structure: "2:4"\n')
    assert "names no modifiers" in refusal(["prune", dense, "--recipe", broken, *common, "--samples", 4], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


def test_prune_never_writes_over_a_folder(dense, text, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("precious")
    arguments = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--output"]
    assert "exists already" in refusal([*arguments, tmp_path], capsys)
    assert "does not exist" in refusal([*arguments, tmp_path / "a" / "b"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_new_folder_takes_an_empty_place(tmp_path):
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("content")
        assert list((tmp_path / "empty").iterdir()) == []
    assert (tmp_path / "empty" / "file").read_text() == "content"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
