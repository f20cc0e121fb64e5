import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from crepe_llm.cli.main import main
from tiny_models import letters_tokenizer


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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # where log files lie


@pytest.fixture
def refusal(capsys):
    """A function: the error of a command that must fail as a user's mistake, in one line, no traceback, status 2."""

    def error_of(arguments):
        assert main([str(argument) for argument in arguments]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("crepe: error: ")]
        assert len(lines) == 1
        return lines[0]

    return error_of
