import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import llmcompressor  # its log must not be bound to a single test's captured stderr
import psutil
import pytest
import torch
from llmcompressor.core import LifecycleCallbacks
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    MixtralConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from crepe_llm.checkpoints import read_folder
from crepe_llm.checkpoints.leftovers import claimed
from crepe_llm.cli.main import main
from crepe_llm.modifiers import CRePEModifier
from crepe_llm.recipe_files import recipe_path
from tiny_models import letters_tokenizer


def test_prune_writes_a_model_that_loads_and_a_card(dense, text, tmp_path, capsys):
    output = tmp_path / "pruned"
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--output", output]
    more = ["--samples", "4", "--length", "32", "--seed", "7", "--json", str(tmp_path / "figures.json")]
    assert main([*map(str, command), *more]) == 0
    assert "50.00% of the weights of 14 linear layers are zero" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["sparsity"], figures["layers"], figures["layers_pruned"]) == (0.5, 14, 14)
    assert figures["bytes"] == (output / "model.safetensors").stat().st_size and figures["seconds"] > 0
    assert sorted(tmp_path.iterdir()) == [tmp_path / "figures.json", output]

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


def test_a_recipe_that_goes_while_it_runs_is_quoted_as_it_was(dense, text, tmp_path, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    content = recipe_path("magnitude_2of4").read_text(encoding="utf-8") + "# für später\n"
    recipe.write_text(content, encoding="utf-8")
    oneshot = llmcompressor.oneshot

    def removed(**options):
        recipe.unlink()
        return oneshot(**options)

    monkeypatch.setattr(llmcompressor, "oneshot", removed)
    assert main(prune(dense, text, tmp_path, recipe=recipe)) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"## Recipe (`mine.yaml`)\n\n```yaml\n{content}```" in card


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


def test_magnitude_needs_no_text(dense, tmp_path, capsys, refusal):
    output = tmp_path / "pruned"
    command = ["prune", dense, "--recipe", "magnitude_2of4", "--output", output]
    assert main([*map(str, command)]) == 0
    assert "50.00% of the weights of 14 linear layers are zero" in capsys.readouterr().out
    assert "Calibration data: none, as the recipe needs none." in (output / "README.md").read_text()
    wanted = "needs text: give --text FILE, --dataset NAME or --sample"
    command[-1] = tmp_path / "other"
    assert f"--report {wanted}" in refusal([*command, "--report"])
    command[3] = "crepe_2of4"
    assert f"CRePEModifier {wanted}" in refusal(command)


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def small(family, dense, folder):
    """The dense model, the same with its embedding as its head, a Gemma 3, a GPT-2 (Conv1D), or a
    Mixtral (experts)."""
    if family in ("llama", "tied"):
        model = AutoModelForCausalLM.from_pretrained(dense, tie_word_embeddings=family == "tied")
    elif family == "gemma3":
        config = Gemma3TextConfig(**SMALL, num_key_value_heads=1, head_dim=16, layer_types=None, sliding_window=32)
        model = AutoModelForCausalLM.from_config(config)
    elif family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=96, eos_token_id=1, bos_token_id=0, **sizes))
    else:
        config = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    letters_tokenizer(True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "crepe_2of4_best"),
        ("tied", "crepe_2of4_best"),
        ("tied", "crepe_2of4_int8_head"),
        ("gemma3", "crepe_2of4_int8_head"),
        ("gpt2", "crepe_2of4_admm"),
        ("gpt2", "crepe_2of4_int8_head"),
        ("mixtral", "crepe_2of4_fp8"),
    ],
)
def test_weights_that_wait_on_the_disk(family, recipe, dense, text, tmp_path, capsys):
    folder = small(family, dense, tmp_path / "model")
    arguments = ["prune", folder, "--recipe", recipe, "--text", text, "--samples", 4, "--length", 32]
    printed = []
    for name, more in (("whole", []), ("waiting", ["--memory", 1e-5])):
        assert main([str(argument) for argument in [*arguments, *more, "--output", tmp_path / name]]) == 0
        printed.append(capsys.readouterr().out)
    assert "memory:" not in printed[0] and "memory:      0.0 MB of weights, the others stay on the disk" in printed[1]
    layers = [next(line for line in lines.splitlines() if line.startswith("layers:")) for lines in printed]
    assert layers[0] == layers[1]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "waiting").iterdir()} == names
    for name in names - {"README.md"}:
        assert (tmp_path / "waiting" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_that_does_not_fit_waits_on_the_disk(dense, text, tmp_path, capsys, monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=5 * 10**9))
    output = tmp_path / "pruned"
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--length", 32]
    assert main([str(argument) for argument in [*command, "--output", output]]) == 0
    assert "of weights, the others stay on the disk" in capsys.readouterr().out
    assert read_folder(output).layers and not list(output.glob(".*"))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "much"])
def test_a_limit_that_is_none_is_refused(value, dense, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["prune", str(dense), "--recipe", "crepe_2of4", "--output", str(tmp_path / "x"), "--memory", value])
    assert f"--memory: {value} must be a positive number of GB" in capsys.readouterr().err


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
    assert "nothing reads CRePEModifier" in refusal(["prune", dense, "--recipe", broken, *common, "--samples", 4])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.yaml"]


def test_prune_never_writes_over_a_folder(dense, text, tmp_path, refusal):
    (tmp_path / "notes.txt").write_text("precious")
    arguments = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--output"]
    assert "exists already" in refusal([*arguments, tmp_path])
    assert "does not exist" in refusal([*arguments, tmp_path / "a" / "b"])
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert "is a link that leads to itself" in refusal([*arguments, loop])
    loop.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def copied(dense, tmp_path, **files):
    """The dense model with other or further files, None for one that is missing."""
    folder = tmp_path / "model"
    shutil.copytree(dense, folder)
    for name, content in files.items():
        path = next(
            (path for path in folder.iterdir() if path.stem == name), folder / (name if "." in name else f"{name}.json")
        )
        if content is None:
            path.unlink()
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def prune(model, text, tmp_path, *options, recipe="crepe_2of4"):
    fixed = ["--recipe", recipe, "--text", text, "--samples", 4, "--length", 32, "--output", tmp_path / "out"]
    return [str(argument) for argument in ["prune", model, *fixed, *options]]


def test_a_generation_config_that_cannot_be_saved_costs_no_work(dense, text, tmp_path):
    folder = copied(dense, tmp_path, generation_config={"do_sample": False, "temperature": 0.6, "top_p": 0.9})
    assert main(prune(folder, text, tmp_path)) == 0
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["temperature"], saved["top_p"]) == (True, 0.6, 0.9)


def test_files_of_processors_are_kept(dense, text, tmp_path):
    files = {"preprocessor_config": {"size": 28}, "processor_config": {"a": 1}, "video_preprocessor_config": {"b": 2}}
    folder = copied(dense, tmp_path, **files, unrelated={"c": 3})
    assert main(prune(folder, text, tmp_path)) == 0
    for name, content in files.items():
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == content
    assert not (tmp_path / "out" / "unrelated.json").exists()


def test_code_of_a_model_runs_if_it_is_trusted(dense, text, tmp_path, refusal):
    fields = {"model_type": "mine", "architectures": ["Mine"]}
    fields["auto_map"] = {"AutoConfig": "mine_config.MineConfig", "AutoModelForCausalLM": "mine_model.Mine"}
    folder = copied(dense, tmp_path, config=json.loads((dense / "config.json").read_text()) | fields)
    (folder / "mine_config.py").write_text(
        "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "mine_model.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .mine_config import MineConfig\n"
        "class Mine(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    assert "brings code of its own" in refusal(prune(folder, text, tmp_path))
    assert "--trust-remote-code" in refusal(["evaluate", folder, "--text", text])
    assert main(prune(folder, text, tmp_path, "--trust-remote-code")) == 0
    saved = ["evaluate", tmp_path / "out", "--text", text, "--window", 32, "--tokens", 64, "--trust-remote-code"]
    assert main([str(argument) for argument in saved]) == 0


def test_recipes_are_refused_in_one_line_before_the_model_is_loaded(dense, text, tmp_path, refusal):
    recipe = tmp_path / "mine.yaml"
    start = "s_stage:\n  p_modifiers:\n"
    for content, wanted in (
        (
            f"{start}    CRePEModifier:\n      mask_structure: 2:4\n",
            f"{recipe}: CRePEModifier: mask_structure is the number 124",
        ),
        (f"{start}   CRePEModifier:\n      row: 1\n     column: 3\n", f"{recipe}, line 5 is not YAML"),
        (f"{start}    CrepeModifier:\n      row: 1\n", "did you mean CRePEModifier?"),
        (f"{start}    CRePEModifier:\n    row: 1\n", "row stands beside CRePEModifier"),
        ("", "is empty: modifiers go under"),
    ):
        recipe.write_text(content)
        assert wanted in refusal(prune(tmp_path / "no" / "model", text, tmp_path, recipe=recipe))
    recipe.write_bytes(b"\xff")
    assert f"{recipe} is not UTF-8 text: byte 0 is 0xff" in refusal(prune(dense, text, tmp_path, recipe=recipe))
    assert "is a folder: name a YAML file in it" in refusal(prune(dense, text, tmp_path, recipe=tmp_path))


def test_models_that_cannot_be_pruned_are_refused_before_any_work(dense, text, tmp_path, refusal):
    config = json.loads((dense / "config.json").read_text())
    assert "there is no folder ./absent" in refusal(prune("./absent", text, tmp_path))
    assert "absent/model is not a folder here" in refusal(prune("absent/model", text, tmp_path))
    assert "the model's name is empty" in refusal(prune("", text, tmp_path))
    assert "has no config.json" in refusal(prune(tmp_path, text, tmp_path))
    assert "fox.txt is a file" in refusal(prune(text, text, tmp_path))
    for number, (files, wanted) in enumerate((
        ({"tokenizer": None, "tokenizer_config": None}, "has no tokenizer that transformers can load"),
        ({"config": config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}}, "is quantized (gptq)"),
        ({"config": config | {"quantization_config": 5}}, "quantization_config is 5, which is not an object"),
        ({"config": "{"}, "config.json is not JSON: Expecting property name"),
        ({"config": "[]"}, "config.json is not a JSON object"),
        ({"model": None, "model.safetensors.index.json": '{"weight_map": {"a": "b.safetensors"}}'}, "does not exist"),
        ({"config": config | {"hidden_size": 64}}, "have other shapes than its config.json says"),
        ({"config": config | {"hidden_size": "x"}}, "config.json is wrong: Validation error for field 'hidden_size'"),
        ({"config": config | {"num_attention_heads": 3}}, "config.json is wrong: "),
        ({"config": config | {"hidden_act": "sillu"}}, "is wrong: hidden_act is 'sillu', unknown here"),
        ({"config": config | {"dtype": "BFloat16"}}, "config.json: dtype is 'BFloat16': write bfloat16, float16 or fl"),
        ({"config": config | {"dtype": 16}}, "config.json: dtype is 16: write"),
        ({"config": config | {"model_type": "t5"}}, "a model of type t5 has an encoder and a decoder"),
        ({"config": config | {"text_config": {"quantization_config": {"quant_method": "awq"}}}}, "is quantized (awq)"),
        ({"adapter_config.json": "{}"}, "holds an adapter (PEFT) beside the model, which transformers would load into"),
        ({"config": None, "adapter_config.json": "{}"}, "has no config.json, it is an adapter (PEFT): merge it into"),
        ({"config": None, "model.gguf": "GGUF"}, "has no config.json but GGUF files, which are not read here"),
        ({"generation_config": "[]"}, "generation_config.json is not a JSON object but '[]'; mend or delete it"),
        ({"generation_config": "{"}, "generation_config.json is not JSON: "),
        ({"generation_config": {"num_return_sequences": 4}}, "generation_config.json is wrong: Greedy methods"),
        ({"model": None, "pytorch_model.bin": "abc"}, "cannot be read (IndexError: "),
    )):  # fmt: skip
        (tmp_path / str(number)).mkdir()
        assert wanted in refusal(prune(copied(dense, tmp_path / str(number), **files), text, tmp_path))
    (tmp_path / "cut").mkdir()
    folder = copied(dense, tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors: not a readable safetensors file" in refusal(prune(folder, text, tmp_path))
    tensors = load_file(dense / "model.safetensors")
    up = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lack model.layers.1.mlp.up_proj.weight, which would get random" in refusal(prune(folder, text, tmp_path))
    tensors |= {"model.layers.1.mlp.up_proj.weight": up, "model.norm.weight": tensors["model.norm.weight"].int()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "tensor model.norm.weight is I32 [32], not one of F64" in refusal(prune(folder, text, tmp_path))
    assert not (tmp_path / "out").exists()


def test_tensors_that_a_model_has_no_place_for_are_named(dense, text, tmp_path, capsys):
    folder = copied(dense, tmp_path)
    tensors = load_file(folder / "model.safetensors") | {"model.layers.2.mlp.up_proj.weight": torch.ones(4, 4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert main(prune(folder, text, tmp_path)) == 0
    assert "holds 1 tensors that LlamaForCausalLM has no place for, such as model.layers.2.m" in capsys.readouterr().err


def test_models_that_see_are_written_whole(text, tmp_path):
    """AutoModelForCausalLM has no class for a Qwen2-VL."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2VLConfig(text_config={**sizes, "rope_parameters": rope}, vision_config=vision)
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    letters_tokenizer(True).save_pretrained(tmp_path / "model")
    assert main(prune(tmp_path / "model", text, tmp_path)) == 0
    before, after = (
        {name.rpartition(".")[0] for name in read_folder(tmp_path / name).tensors} for name in ("model", "out")
    )
    assert before == after and any("visual" in name for name in after)
    measure = ["evaluate", tmp_path / "out", "--text", text, "--window", 32, "--tokens", 64]
    assert main([str(argument) for argument in measure]) == 0


def test_texts_are_refused_by_name(dense, tmp_path, refusal):
    path = tmp_path / "text.txt"
    path.write_bytes(b"words and \xff more words")
    assert f"{path} is not UTF-8 text: byte 10 is 0xff" in refusal(prune(dense, path, tmp_path))
    path.write_text(" \n")
    assert f"{path}: the text is empty" in refusal(prune(dense, path, tmp_path))
    assert "cannot be read: Is a directory" in refusal(prune(dense, tmp_path, tmp_path))
    path.write_bytes(bytes(5000))
    assert f"{path} is not text: character 0 is NUL" in refusal(prune(dense, path, tmp_path))


@pytest.mark.parametrize("option", ["--samples", "--length"])
def test_numbers_are_refused_by_the_options_name(option, dense, text, tmp_path, capsys):
    for number in ("0", "-3", "many", "2.5"):
        with pytest.raises(SystemExit):
            main(prune(dense, text, tmp_path, option, number))
        assert f"argument {option}: {number} is not a whole number from" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["prune", "MODEL", "--recipe", "crepe_2of4"], ["recover", "DIR"], ["search", "MODEL"], ["demo"]]
)
def test_seeds_are_refused_by_the_options_name(command, capsys):
    for number, said in (("-1", "is not a whole number from 0 on"), (str(1 << 70), "is not below 2^32")):
        with pytest.raises(SystemExit):
            main([*command, "--seed", number])
        assert f"argument --seed: {number} {said}" in capsys.readouterr().err


def test_no_space_is_known_before_calibration(dense, text, tmp_path, refusal, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "has 1e-06 GB free; make room" in refusal(prune(dense, text, tmp_path))


def test_mixtures_of_experts(text, tmp_path, capsys):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, sliding_window=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    letters_tokenizer(True).save_pretrained(tmp_path / "model")
    assert main(prune(tmp_path / "model", text, tmp_path)) == 0
    shown = capsys.readouterr()
    assert "warning: " not in shown.err and "accelerator" not in shown.err
    printed = shown.out
    assert "are removed" not in printed and "50.00% of the weights of 5 linear layers are zero" in printed
    assert "| model.layers.0.mlp.experts | 384 x 32 | 50.00% | 0.00% |" in (tmp_path / "out" / "README.md").read_text()


def test_two_processes_do_not_quantize_weights_on_the_disk(dense, text, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["prune", dense, "--recipe", "crepe_2of4_int8", "--text", text, "--samples", 4, "--length", 32]
    words = [*torchrun, "-m", "crepe_llm", *command, "--memory", 1e-5, "--output", tmp_path / "out"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode and "--memory: QuantizationModifier does not wait for the other processes" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", [None, 1e-5, 2.5e-5], ids=["whole", "on the disk", "in part"])
def test_prune_in_two_processes_writes_what_one_writes(memory, dense, text, tmp_path, capsys):
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--length", 32, "--output"]
    assert main([*map(str, command), str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "-m", "crepe_llm", *map(str, command), str(tmp_path / "two")]
    words += [] if memory is None else ["--memory", str(memory)]
    two = subprocess.run(words, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-3000:]
    told = [out.splitlines() for out in (capsys.readouterr().out, two.stdout)]
    assert len(told[1]) == len(told[0]) + (memory is not None) and "2 processes" in two.stdout
    assert ("the others stay on the disk" in two.stdout) == (memory is not None)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "one", tmp_path / "two"]
    for name in ("one", "two"):
        assert {path.name for path in (tmp_path / name).iterdir()} >= {"README.md", "recipe.yaml", "tokenizer.json"}
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(weight, two[name]) for name, weight in one.items())


def weights_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def stopped_after(parts, command, monkeypatch):
    """Run a command until the pipeline ends a part once more, as if it were killed before that was kept."""
    ended, left = LifecycleCallbacks.sequential_epoch_end, iter(range(parts))

    def end(modules, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return ended(modules, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LifecycleCallbacks, "sequential_epoch_end", end)
        assert main(command) != 0


@pytest.mark.parametrize(
    ("recipe", "parts", "kept"),
    [("crepe_2of4", 2, 1), ("crepe_2of4_best", 5, 2), ("crepe_2of4_best", 1, 0), ("crepe_2of4_dsnot", 2, 1)],
)
def test_prune_goes_on_to_the_same_result(recipe, parts, kept, dense, text, tmp_path, capsys, monkeypatch):
    """Stopped after the first block, which comes after the embedding (the best stack permutes before), or earlier."""
    command = ["prune", dense, "--recipe", recipe, "--text", text, "--samples", 4, "--length", 32, "--output"]
    whole, resumed = [[*map(str, command), str(tmp_path / name)] for name in ("whole", "resumed")]
    assert main(whole) == 0
    stopped_after(parts, [*resumed, "--resume"], monkeypatch)
    folder = tmp_path / "resumed.resume"
    assert len(list(folder.glob("*.pt"))) == kept
    capsys.readouterr()
    assert main([*resumed, "--resume"]) == 0
    assert f"{kept} finished parts" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [tmp_path / "resumed", tmp_path / "whole"]
    for name, weight in weights_of(tmp_path / "whole").items():
        assert torch.equal(weights_of(tmp_path / "resumed")[name], weight), name


def test_prune_takes_what_was_kept(dense, text, tmp_path, monkeypatch):
    """A layer whose kept weight is changed has that weight in the end, so it was not pruned again."""
    command = [
        "prune",
        dense,
        "--recipe",
        "crepe_2of4_admm",
        "--text",
        text,
        "--samples",
        4,
        "--length",
        32,
        "--resume",
    ]
    command = [*map(str, command), "--output", str(tmp_path / "out")]
    stopped_after(2, command, monkeypatch)
    (path,) = (tmp_path / "out.resume").glob("*.pt")
    entry = torch.load(path)
    weight, bits = entry["layers"]["model.layers.0.mlp.up_proj"]
    entry["layers"]["model.layers.0.mlp.up_proj"] = (weight * 2, bits)
    torch.save(entry, path)
    assert main(command) == 0
    assert torch.equal(weights_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"], weight * 2)


def test_prune_into_the_folder_that_one_is_in(dense, text, tmp_path, capsys, monkeypatch):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--length", 32, "--resume"]
    stopped_after(2, [*map(str, command), "--output", "."], monkeypatch)
    (tmp_path / "here.resume" / "notes").mkdir()  # of nobody's but the user
    assert main([*map(str, command), "--output", ".", "--json", "../figures.json"]) == 0
    assert "1 finished parts are in" in capsys.readouterr().out
    assert {"config.json", "model.safetensors"} < {path.name for path in Path.cwd().iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "here"]


def test_prune_does_not_go_on_with_other_coefficients(dense, text, tmp_path, refusal, monkeypatch):
    """A study that a recipe names may change while the recipe stays."""
    found = {"neighbourhood": 0.5, "kernel_size": 3, "activation_exponent": 0.5}
    command = [*map(str, prune(dense, text, tmp_path, "--resume"))]
    stopped_after(2, command, monkeypatch)
    use = CRePEModifier.on_initialize

    def other(self, state, **kwargs):
        self.use(row=1.0, column=0.0, **found)
        return use(self, state, **kwargs)

    monkeypatch.setattr(CRePEModifier, "on_initialize", other)
    said = refusal(command)
    assert "out.resume holds finished blocks that were pruned by" in said and '"column": 0.0' in said


def test_one_run_at_a_time_keeps_blocks(dense, text, tmp_path, refusal, monkeypatch):
    command = [*map(str, prune(dense, text, tmp_path, "--resume"))]
    stopped_after(2, command, monkeypatch)
    with claimed(tmp_path / "out.resume"):
        assert f"out.resume is in use by process {os.getpid()} on " in refusal(command)
    assert main(command) == 0


def test_damaged_files_of_what_was_kept_are_named(dense, text, tmp_path, refusal, monkeypatch):
    command = prune(dense, text, tmp_path, "--resume")
    stopped_after(2, command, monkeypatch)
    (entry,) = (tmp_path / "out.resume").glob("*.pt")
    for path in (entry, tmp_path / "out.resume" / "run.json"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert f"{path} is damaged (" in (said := refusal(command)) and "remove the folder" in said
    shutil.rmtree(tmp_path / "out.resume")
    (tmp_path / "out.resume").touch()
    assert "out.resume, where finished blocks belong, is a file: remove it, or give" in refusal(command)


def test_prune_does_not_go_on_with_another_run(dense, text, tmp_path, capsys, monkeypatch):
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--resume"]
    command = [*map(str, command), "--output", str(tmp_path / "out")]
    stopped_after(1, [*command, "--length", "32"], monkeypatch)
    assert main([*command, "--length", "16"]) != 0
    assert "repeat that run's command, or remove the folder" in capsys.readouterr().err
    assert main([*command, "--length", "32"]) == 0


def test_prune_does_not_go_on_with_other_weights_of_the_same_name(dense, text, tmp_path, refusal, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(dense, source)
    command = prune(source, text, tmp_path, "--resume")
    stopped_after(1, command, monkeypatch)
    (file,) = source.glob("*.safetensors")
    tensors = weights_of(source)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    assert "weights" in (said := refusal(command)) and "remove the folder" in said


def test_prune_refuses_what_is_pruned_already(dense, text, tmp_path, refusal, capsys):
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--length", 32, "--output"]
    assert main([*map(str, command), str(tmp_path / "once")]) == 0
    command[1] = tmp_path / "once"
    said = "nothing is left to prune: all 14 targeted layers are sparse already"
    for recipe in ("crepe_2of4_admm", "crepe_2of4_dsnot", "crepe_2of4_pho"):
        command[3] = recipe
        assert said in refusal([*map(str, command), str(tmp_path / "twice")])
        assert not (tmp_path / "twice").exists()
    command[3] = "crepe_2of4"
    assert main([*map(str, command), str(tmp_path / "twice")]) == 0
    assert f"warning: {said}, " in capsys.readouterr().err
    assert all(
        torch.equal(weight, weights_of(tmp_path / "once")[name])
        for name, weight in weights_of(tmp_path / "twice").items()
    )


def test_what_was_packed_is_packed_after_quantization_alone(dense, text, tmp_path):
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--length", 32, "--output"]
    assert main([*map(str, command), str(tmp_path / "once")]) == 0
    recipe = tmp_path / "quantize.yaml"
    fields = "{targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head]}"
    recipe.write_text(f"a_stage:\n  quantization_modifiers:\n    QuantizationModifier: {fields}\n")
    command = ["prune", tmp_path / "once", "--recipe", recipe, "--output", tmp_path / "twice"]
    assert main([*map(str, command)]) == 0
    once, twice = (read_folder(tmp_path / name).layers for name in ("once", "twice"))
    assert len(once) == 14 and once.keys() == twice.keys()


def test_a_disk_without_room_for_finished_blocks_is_found_out_before(dense, text, tmp_path, capsys, monkeypatch):
    size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * size)
    monkeypatch.setattr("crepe_llm.checkpoints.folders.shutil.disk_usage", lambda folder: usage)
    command = ["prune", dense, "--recipe", "crepe_2of4", "--text", text, "--samples", 4, "--length", 32, "--output"]
    assert main([*map(str, command), str(tmp_path / "kept"), "--resume"]) != 0
    assert "make room" in capsys.readouterr().err
    assert main([*map(str, command), str(tmp_path / "out")]) == 0


def test_a_recipe_of_any_letters_is_quoted_whatever_the_locale(dense, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipe_path("magnitude_2of4").read_text(encoding="utf-8") + "# für später\n", encoding="utf-8")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "crepe_llm", "prune", dense, "--recipe", recipe, "--output", tmp_path / "out"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=plain)
    assert done.returncode == 0, done.stderr
    assert "# für später" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
