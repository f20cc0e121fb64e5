import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, BloomConfig, RobertaConfig

from crepe_llm.cli.main import main
from tiny_models import letters_tokenizer


def test_evaluate_prints_and_writes_the_conditions(dense, text, tmp_path, capsys):
    result = tmp_path / "result.json"
    command = ["evaluate", dense, "--text", text, "--window", 32, "--tokens", 256, "--dtype", "bfloat16"]
    assert main([*map(str, command), "--json", str(result)]) == 0
    fields = json.loads(result.read_text())
    assert (fields["window"], fields["windows"], fields["tokens"]) == (32, 8, 8 * 31)
    assert (fields["corpus"], fields["dtype"]) == ("fox.txt", "bfloat16")
    printed = capsys.readouterr().out
    assert f"perplexity {fields['perplexity']:.4f} on fox.txt: 248 tokens" in printed


SIZES = {"vocab_size": 96, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "asked", "window"),
    [
        (
            RobertaConfig(**SIZES, max_position_embeddings=34, is_decoder=True),
            [],
            32,
        ),  # the first two are no position's
        (BloomConfig(**SIZES), [], 2048),
        (BloomConfig(**SIZES), ["--window", "2500"], 2500),  # it names no context, and has none
    ],
)
def test_windows_have_the_length_that_the_model_takes(config, asked, window, text, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    letters_tokenizer(True).save_pretrained(tmp_path / "model")
    command = ["evaluate", tmp_path / "model", "--text", text, "--tokens", 32, "--json", tmp_path / "result.json"]
    assert main([*map(str, command), *asked]) == 0
    assert json.loads((tmp_path / "result.json").read_text())["window"] == window


def test_evaluate_refuses_in_one_line(dense, text, tmp_path, refusal):
    assert "context of 64" in refusal(["evaluate", dense, "--text", text, "--window", 65])
    assert "absent.txt" in refusal(["evaluate", dense, "--text", tmp_path / "absent.txt"])
    assert "absent" in refusal(["evaluate", tmp_path / "absent", "--text", text])
    (tmp_path / "empty.txt").write_text("\n")
    assert "the text is empty" in refusal(["evaluate", dense, "--text", tmp_path / "empty.txt"])


def test_where_the_result_goes_is_checked_before_the_work(dense, text, tmp_path, refusal):
    command = ["evaluate", tmp_path / "absent" / "model", "--text", text, "--json"]
    assert "--json" in refusal([*command, tmp_path]) and "is a folder" in refusal([*command, tmp_path])
    assert "the folder" in refusal([*command, tmp_path / "none" / "a.json"])


def test_wikitext2_without_a_network_is_one_line(dense, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "crepe_llm", "evaluate", str(dense), "--wikitext2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "crepe: error: WikiText-2 could not be loaded from the Hugging Face hub" in done.stderr
