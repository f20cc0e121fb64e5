import json

import llmcompressor  # noqa: F401  its log must not be bound to a single test's captured stderr
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.cli.main import main
from crepe_llm.recipe_files import recipe_path


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


def test_a_failing_prune_leaves_no_folder(dense, text, tmp_path, refusal):
    output = tmp_path / "pruned"
    common = ["--text", text, "--output", output, "--length", 32]
    error = refusal(["prune", dense, "--recipe", "crepe_2of4", *common, "--samples", 1000])
    assert "1000 calibration windows" in error
    broken = tmp_path / "broken.yaml"
    start = "a_stage:\n  pruning_modifiers:\n    CRePEModifier:\n"
    broken.write_text(f'{start}      mask_structure: "4:2"\n')
    assert "mask_structure" in refusal(["prune", dense, "--recipe", broken, *common, "--samples", 4])
    broken.write_text(f'{start}      mask_structure: "2:4"\n      targets: [Nothing]\n')
    assert "match no layer" in refusal(["prune", dense, "--recipe", broken, *common, "--samples", 4])
    broken.write_text('stage:\n  modifiers:\n    CRePEModifier:\n      mask_structure: "2:4"\n')
    assert "names no modifiers" in refusal(["prune", dense, "--recipe", broken, *common, "--samples", 4])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


def test_prune_never_writes_over_a_folder(dense, text, tmp_path, refusal):
    (tmp_path / "notes.txt").write_text("precious")
    arguments = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--output"]
    assert "exists already" in refusal([*arguments, tmp_path])
    assert "does not exist" in refusal([*arguments, tmp_path / "a" / "b"])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
