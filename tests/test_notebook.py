"""The notebook of the docs, run from its first cell to its last on a small random model and random words."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from crepe_llm import samples
from modifier_helpers import SMALL
from tiny_models import letters_tokenizer

ROOT = Path(__file__).parents[1]
CELLS = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]


def source(kind):
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]


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


def test_its_cells_run_in_their_order(sample, capsys):
    names = {}
    for number, cell in enumerate(source("code")):
        exec(compile(cell, f"code cell {number}", "exec"), names)
    assert names["dense"].tokens == names["pruned"].tokens > 1000
    assert names["dense"].perplexity != names["pruned"].perplexity
    weight = names["packed"].model.layers[1].mlp.down_proj.weight
    assert (weight.view(-1, 4).count_nonzero(dim=1) == 2).all()
    assert names["zeros"] == [0.5] * 14
    assert Path("smollm2-2of4.png").read_bytes().startswith(b"\x89PNG")
    assert str(names["pruned"]) in capsys.readouterr().out


def test_it_is_stored_without_outputs_and_its_links_lead_somewhere():
    assert not [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")]
    targets = re.findall(r"\]\(([^)]+)\)", "\n".join(source("markdown")))
    assert targets and all((ROOT / "docs" / target).is_file() for target in targets)
