"""The notebook of the docs: its cells run on a small model, and its outputs are those of the real one."""

import base64
import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from crepe_llm import samples
from modifier_helpers import SMALL
from script_modules import load_script
from tiny_models import letters_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.ipynb"
NOTEBOOK = json.loads(PAGE.read_text())


@pytest.fixture(scope="module")
def script():
    return load_script("notebook")


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A small model and a text, which stand for those that pip fetches, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "max_position_embeddings": 512})
    AutoModelForCausalLM.from_config(config).save_pretrained("dense")
    letters_tokenizer(False).save_pretrained("dense")
    letters = random.Random(0).choices("abcdefgh ", k=9000)
    corpus = samples.Corpus("letters", ["".join(letters)], [], ["".join(letters[:2000])])
    monkeypatch.setattr(samples, "smollm2", lambda: tmp_path / "dense")
    monkeypatch.setattr(samples, "wikipedia", lambda: corpus)


def outputs(notebook):
    return [output for cell in notebook["cells"] for output in cell.get("outputs", ())]


def test_its_cells_run_in_their_order(sample, script):
    notebook = json.loads(PAGE.read_text())
    for cell in notebook["cells"]:
        cell.pop("outputs", None)
    names = script.run(notebook)
    assert names["dense"].tokens == names["pruned"].tokens > 1000
    assert names["dense"].perplexity != names["pruned"].perplexity
    weight = names["packed"].model.layers[1].mlp.down_proj.weight
    assert (weight.view(-1, 4).count_nonzero(dim=1) == 2).all()
    assert names["zeros"] == [0.5] * 14
    assert Path("smollm2-2of4.png").read_bytes().startswith(b"\x89PNG")
    made = outputs(notebook)
    assert [output["output_type"] for output in made] == ["stream", "stream", "display_data"]
    assert f"perplexity {names['pruned'].perplexity:.2f} over" in made[1]["text"][0]
    assert script.is_current(notebook)
    notebook["cells"][1]["source"].append("# changed")
    assert not script.is_current(notebook)


def test_it_is_stored_with_the_outputs_of_its_cells(script):
    assert script.is_current(NOTEBOOK), "run python scripts/notebook.py"
    made = outputs(NOTEBOOK)
    (picture,) = [output["data"]["image/png"] for output in made if output["output_type"] == "display_data"]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    printed = "".join(line for output in made for line in output.get("text", ()))
    dense, pruned = map(float, re.findall(r"perplexity ([\d.]+) over 8176 tokens", printed))
    assert 15 < dense < 17 and 100 < pruned < 140  # as docs/results.md has them
    assert "The Moon is" in printed
    # Paths of the machine that ran it, in what is printed or beside it.
    assert not re.search(r"/(tmp|root|home|work|usr|var|opt|Users)/|site-packages|\\\\", PAGE.read_text()), "a path"


def test_its_links_lead_somewhere():
    texts = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown"]
    targets = re.findall(r"\]\(([^)]+)\)", "\n".join(texts))
    assert targets and all((ROOT / "docs" / target).is_file() for target in targets)
