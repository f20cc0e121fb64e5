import importlib.util
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from crepe_llm import samples
from crepe_llm.cli.demo import _output
from crepe_llm.cli.main import main
from tiny_models import letters_tokenizer


def test_demo_prints_its_table_and_leaves_the_model(tmp_path, monkeypatch, capsys):
    """The whole demo, served by vLLM too, on a small random model and random words; `make demo` has the real ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    letters_tokenizer(False).save_pretrained(tmp_path / "dense")
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefgh ", k=2000)) for _ in range(12)]
    monkeypatch.setattr(samples, "smollm2", lambda: tmp_path / "dense")
    monkeypatch.setattr(samples, "wikipedia", lambda: samples.Corpus("words", texts, [], texts[:1]))
    output = tmp_path / "output"
    output.mkdir()
    (output / "README.md").write_text("# x, pruned\n\n0 layers were pruned. Made by\n\n    crepe demo --tokens 512\n")
    (output / "config.json").write_text("of an earlier run, to be replaced")
    (tmp_path / "link").symlink_to(output)
    capsys.readouterr()
    assert (
        main(["demo", "--tokens", "1024", "--output", str(tmp_path / "link"), "--json", str(tmp_path / "figures.json")])
        == 0
    )
    printed, said = capsys.readouterr()
    assert all("steps" in line for line in said.replace("\r", "\n").splitlines() if line), said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert "Compression lifecycle" in Path(figures["log"]).read_text() and str(figures["log"]) in printed
    rows = dict(re.findall(r"^(\w+) +[\d.]+ +([\d.]+%) +[\d.]+$", printed, flags=re.MULTILINE))
    assert rows == {"dense": "0.00%", **dict.fromkeys(["magnitude", "Wanda", "RIA", "CRePE"], "50.00%")}
    assert "1022 tokens predicted in 2 windows of 512" in printed and "seed 0" in printed
    if importlib.util.find_spec("vllm") is None:
        assert "Serving is skipped" in printed
    else:
        served = re.findall(r"^(dense|2:4 sparse) +([\d.]+) +(\d+)  ", printed, flags=re.MULTILINE)
        assert [name for name, _, _ in served] == ["dense", "2:4 sparse"]
        assert all(float(speed) > 0 for _, speed, _ in served)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert (model.model.layers[0].mlp.down_proj.weight.view(-1, 4).count_nonzero(dim=1) == 2).all()
    assert "CRePEModifier" in (output / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "figures.json", "link", "output"]
    with _output(output):  # of a demo, says the card that it wrote
        pass


@pytest.mark.parametrize(
    "name, content",
    [
        ("recipe.yaml", "CRePEModifier: {}"),
        ("config.json", "{}"),
        ("README.md", "Made by\n\n    crepe recover demo-output\n\nMade by\n\n    crepe demo\n"),
    ],
)
def test_what_no_demo_made_is_refused_before_the_work(name, content, tmp_path, refusal, monkeypatch):
    monkeypatch.setattr(samples, "smollm2", lambda: pytest.fail("the work began"))
    (tmp_path / name).write_text(content)
    (tmp_path / "model.safetensors").write_text("precious")
    assert "holds what `crepe demo` has not made: name another folder" in refusal(["demo", "--output", tmp_path])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "model.safetensors"])
