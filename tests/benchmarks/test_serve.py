"""Engines beside each other: what a token reads, the tables, the same weights as GGUF, and the profile's clock."""

import json
import time

import gguf
import pytest
import torch
from safetensors.torch import load_file

import llama_cpp
import serve
from crepe_llm.evaluation.random_models import write_random_model
from crepe_llm.samples.gguf import Gguf
from decode_profile import Clock
from serve_models import DENSE, Storage, token_bytes
from vllm_runs import llama, qwen2


def row(engine, speeds, read=1e6, streams=1, **more):
    cases = [{"prompt": 32, "streams": streams, "first_token_s": 0.5, "tokens_per_s": speed} for speed in speeds]
    return {"model": "m", "engine": engine, "token_bytes": read, "read_bandwidth": 1e9, "cases": cases, **more}


def test_ratios_are_of_medians_and_a_reading_serves_all_streams():
    rows = {
        "vLLM bf16": [row("vLLM bf16", [speed], streams=4) for speed in (100.0, 900.0, 200.0)],
        "2:4 bf16": [row("2:4 bf16", [speed], read=5e5, streams=4) for speed in (300.0, 400.0, 10.0)],
    }
    heading, figures, ratios = serve.report(rows)
    assert heading == "32-token prompt, 4 streams"
    assert "| vLLM bf16 | 3 | 200.0 | 0.50 | 1 | 0.1 | 5% |" in figures
    assert ratios.splitlines()[-1] == "| 2:4 bf16 | 1.50 |"


def test_loading_is_shown_of_engines_that_measure_it():
    loading = {
        "load_s": 9.0,
        "model_s": 2.0,
        "packing_s": 0.5,
        "weight_bytes": 5e6,
        "model_bytes": 4e6,
        "peak_bytes": 5e6,
    }
    rows = {"2:4 bf16": [row("2:4 bf16", [1.0], **loading)], "llama.cpp Q8_0": [row("llama.cpp Q8_0", [1.0])]}
    table = list(serve.report(rows))[-1]
    assert table.splitlines()[2:] == ["| 2:4 bf16 | 1 | 9.0 | 2.0 | 0.5 | 5 | 4 | 5 | 1.25 |"]


@pytest.mark.parametrize("config", [llama(), qwen2()], ids=["tied", "untied"])
def test_a_token_reads_all_weights_but_the_rows_of_an_untied_embedding(config, tmp_path):
    folder = write_random_model(config, tmp_path, sparse=False)
    tensors = load_file(folder / "model.safetensors")
    read = sum(t.numel() for name, t in tensors.items() if config.tie_word_embeddings or "embed" not in name)
    assert token_bytes(folder, "bfloat16", DENSE) == 2 * read
    assert token_bytes(folder, "float32", DENSE) == 4 * read


def test_of_packed_int4_codes_three_bits_a_weight_are_read(tmp_path):
    from safetensors.torch import save_file

    tensors = {"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(16, 8, dtype=torch.int32)}
    save_file(tensors | {"lm_head.weight_packed": torch.zeros(2, 8, dtype=torch.int32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert token_bytes(tmp_path, "bfloat16", Storage("int4", sparse=False)) == 512 + 64
    assert token_bytes(tmp_path, "bfloat16", Storage("int4", sparse=True)) == 384 + 64


@pytest.mark.parametrize("config", [llama(), qwen2()], ids=["llama", "qwen2"])
def test_gguf_holds_the_same_weights(config, tmp_path):
    folder, file = write_random_model(config, tmp_path / "dense", sparse=False), tmp_path / "model.gguf"
    llama_cpp.write_gguf(folder, file)
    source, tensors = Gguf(file), load_file(folder / "model.safetensors")
    assert source.hyperparameter("vocab_size") == config.vocab_size
    assert torch.equal(source.tensor("blk.1.ffn_down.weight"), tensors["model.layers.1.mlp.down_proj.weight"].float())
    ours, theirs = tensors["model.layers.0.self_attn.k_proj.weight"].float(), source.tensor("blk.0.attn_k.weight")
    if config.model_type == "llama":  # pairs of a head side by side
        theirs = theirs.view(config.num_key_value_heads, -1, 2, ours.shape[1]).transpose(1, 2).reshape(ours.shape)
    assert torch.equal(ours, theirs)
    names = {tensor.name for tensor in gguf.GGUFReader(file).tensors}
    assert ("output.weight" in names) != config.tie_word_embeddings
    assert llama_cpp.token_bytes(file) == pytest.approx(token_bytes(folder, "bfloat16", DENSE), rel=0.05)


def test_a_missing_build_of_llama_cpp_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"llama-batched-bench.*--help"):
        llama_cpp.LlamaCpp(tmp_path)


def test_a_part_is_timed_without_the_parts_that_it_calls():
    clock = Clock()
    inner = clock.timed("inner", lambda: time.sleep(0.05))
    clock.timed("outer", lambda: (time.sleep(0.1), inner(), inner()))()
    taken = clock.take()
    assert taken["inner"] >= 0.1
    assert taken["outer"] >= 0.1
    assert clock.take() == {}
    clock.timed("outer", inner)()
    assert clock.take()["outer"] < 0.05
