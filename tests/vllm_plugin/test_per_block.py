"""vLLM on models whose FFNs were cut: the greedy tokens of transformers, and a refusal that says what to install."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from crepe_llm.models import per_block
from crepe_llm.models.families import PER_BLOCK
from crepe_llm.models.ffn import cut, find_ffns
from vllm_runs import PROMPTS, TOKENS, assert_same, generate, in_process, llama

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")
__all__ = ["in_process"]  # the fixture


def write(folder: Path, config, widths: list[int]) -> Path:
    """A random model whose blocks keep the first channels of their FFNs."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for ffn, width in zip(find_ffns(model), widths, strict=True):
        cut(ffn, torch.arange(width))
    if len(set(widths)) == 1:
        per_block.set_width(model, widths[0])
    else:
        per_block.convert(model, widths)
    model.save_pretrained(folder)
    return folder


def by_transformers(folder: Path):
    """Greedy tokens of every prompt and the log-probabilities of the two best, without a cache."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = []
    for prompt in PROMPTS:
        ids, best = list(prompt), []
        for _ in range(TOKENS):
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            top = logprobs.topk(2)
            best.append(dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
            ids.append(int(top.indices[0]))
        made.append((ids[len(prompt) :], best))
    return made


def test_different_widths_give_the_tokens_of_transformers(tmp_path):
    folder = write(tmp_path / "model", llama(), [96, 160])

    def served_widths(model):
        return [layer.mlp.down_proj.input_size for layer in model.model.layers]

    ours, seen = generate(folder, inspect=served_widths)
    assert seen == [96, 160]
    assert_same(ours, by_transformers(folder))


def test_every_family_that_can_be_saved_has_a_class():
    from crepe_llm.vllm_plugin import per_block as served

    written = {per_block._model_class(family).__name__ for family in PER_BLOCK}
    assert set(served.architectures()) == written
    for name in written:
        base = served._MODELS[name.removeprefix("PerBlock")]
        assert getattr(served, name).__name__ == name
        builder = importlib.import_module(f"vllm.model_executor.models.{base[1]}")
        assert callable(builder.make_layers)


def stock_vllm(folder: Path) -> subprocess.CompletedProcess[str]:
    code = (
        "from vllm import LLM, SamplingParams\n"
        f"engine = LLM({str(folder)!r}, dtype='float32', max_model_len=64, skip_tokenizer_init=True, "
        "enforce_eager=True, kv_cache_memory_bytes=64 << 20)\n"
        "wanted = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)\n"
        "outputs = engine.generate([{'prompt_token_ids': [17, 4, 99, 250]}], wanted, use_tqdm=False)\n"
        "print('tokens', list(outputs[0].outputs[0].token_ids))\n"
    )
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "VLLM_PLUGINS": ""}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_one_width_is_served_by_vllm_alone(tmp_path):
    folder = write(tmp_path / "model", llama(), [160, 160])
    done = stock_vllm(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = by_transformers(folder)[PROMPTS.index([17, 4, 99, 250])][0][:8]
    assert f"tokens {tokens}" in done.stdout


def test_different_widths_in_vllm_alone_say_what_to_install(tmp_path):
    done = stock_vllm(write(tmp_path / "model", llama(), [96, 160]))
    assert done.returncode != 0
    assert "model type `llama (pip install crepe-llm)`" in done.stderr
