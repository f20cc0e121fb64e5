"""The real server, started as a user starts it, and asked as a client asks."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crepe_llm.evaluation.random_models import write_random_model
from ports import free_port

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")
openai = pytest.importorskip("openai")
psutil = pytest.importorskip("psutil")

VOCABULARY = 512
TIE = 1e-3  # see tests/vllm_plugin/test_models.py
START_SECONDS = 300


def write_checkpoint(folder: Path, *, sparse: bool) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    write_random_model(config, folder, sparse=sparse, dtype=torch.float32)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    # A timeout in a queue of other work must not pass for a dead engine.
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENGINE_READY_TIMEOUT_S": "600"}


def command(folder: Path, *options: str) -> list[str]:
    started = [sys.executable, "-m", "crepe_llm", "serve", str(folder), "--served-model-name", "m"]
    return [*started, "--dtype", "float32", "--max-model-len", "256", "--enforce-eager", *options]


class Server:
    def __init__(self, folder: Path, log: Path) -> None:
        port = free_port()
        self.log = log
        self.url = f"http://127.0.0.1:{port}/v1"
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command(folder, "--host", "127.0.0.1", "--port", str(port)),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment(),
            )
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, f"not ready in {START_SECONDS} s:\n{log.read_text()[-5000:]}"
            try:
                self.client.models.list()
                return
            except openai.APIConnectionError:
                time.sleep(0.5)

    def processes(self) -> list[Any]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


@pytest.fixture(scope="module")
def sparse_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sparse"), sparse=True)


@pytest.fixture(scope="module")
def server(sparse_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(sparse_folder, tmp_path_factory.mktemp("log") / "server.log")
    yield running
    if running.process.poll() is None:
        for process in reversed(running.processes()):
            process.kill()


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same masked weights, dense, in transformers in fp32."""
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint(tmp_path_factory.mktemp("dense"), sparse=False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def prompts(count: int, lengths: tuple[int, int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    sizes = torch.randint(*lengths, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]


def is_greedy(model: Any, prompt: list[int], made: list[int]) -> bool:
    """Whether the dense model chooses these tokens, too; False after a tie. A wrong token that is no tie fails."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + made])).logits[0].log_softmax(-1)
    for step, token in enumerate(made):
        row = logits[len(prompt) + step - 1]
        if int(row.argmax()) != token:
            gap = float(row.max() - row[token])
            assert gap < TIE, f"prompt of {len(prompt)}, step {step}: token {token} is {gap} below the dense choice"
            return False
    return True


def complete(server: Server, prompt: list[int], tokens: int, **options: Any) -> Any:
    extra = {"return_token_ids": True, "ignore_eos": True}
    return server.client.completions.create(
        model="m", prompt=prompt, max_tokens=tokens, temperature=0, extra_body=extra, **options
    )


def test_completions_are_the_dense_models(server: Server, dense_model: Any) -> None:
    asked = prompts(6, (1, 60))
    exact = 0
    for prompt in asked:
        choice = complete(server, prompt, 20).choices[0]
        assert len(choice.token_ids) == 20
        assert choice.text.split() == [f"w{token}" for token in choice.token_ids]
        exact += is_greedy(dense_model, prompt, choice.token_ids)
    assert exact >= len(asked) - 1


def test_a_stream_holds_the_same_text(server: Server) -> None:
    prompt = prompts(1, (20, 21))[0]
    whole = complete(server, prompt, 20).choices[0].text
    parts = [chunk.choices[0].text for chunk in complete(server, prompt, 20, stream=True) if chunk.choices]
    assert len(parts) > 10
    assert "".join(parts) == whole


def test_chat_is_refused_without_a_template_and_the_server_lives(server: Server) -> None:
    with pytest.raises(openai.BadRequestError):
        server.client.chat.completions.create(model="m", messages=[{"role": "user", "content": "w1"}])
    assert complete(server, [1], 1).choices[0].finish_reason == "length"


def test_32_requests_of_mixed_lengths_at_once(server: Server, dense_model: Any) -> None:
    asked = prompts(32, (1, 200))
    lengths = [4 + 3 * (index % 9) for index in range(32)]

    async def everything() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=300) as client:
            return await asyncio.gather(
                *(
                    client.completions.create(
                        model="m",
                        prompt=prompt,
                        max_tokens=length,
                        temperature=0,
                        extra_body={"return_token_ids": True, "ignore_eos": True},
                    )
                    for prompt, length in zip(asked, lengths, strict=True)
                )
            )

    exact = 0
    for prompt, length, answer in zip(asked, lengths, asyncio.run(everything()), strict=True):
        assert len(answer.choices[0].token_ids) == length
        exact += is_greedy(dense_model, prompt, answer.choices[0].token_ids)
    assert exact >= 29


def test_the_server_stops_cleanly(server: Server, record_property: Callable[[str, object], None]) -> None:
    processes = server.processes()
    record_property("resident_bytes", {" ".join(p.cmdline())[:80]: p.memory_info().rss for p in processes})
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0, server.log.read_text()[-5000:]
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive


def test_a_damaged_checkpoint_stops_the_server_naming_the_tensor(sparse_folder: Path, tmp_path: Path) -> None:
    for file in sparse_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    mask = tensors["model.layers.1.mlp.up_proj.bitmask"]
    mask[100, 3] = 0b1111_0000
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        command(tmp_path), env=environment(), capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert done.returncode != 0
    assert re.search(
        r"damaged checkpoint: .*model\.layers\.1\.mlp\.up_proj.*columns \d+ to \d+", done.stdout + done.stderr
    )


def test_a_missing_tensor_is_named_before_anything_is_loaded(sparse_folder: Path, tmp_path: Path) -> None:
    config = json.loads((sparse_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(sparse_folder / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.bitmask"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = subprocess.run(
        command(tmp_path, "--skip-tokenizer-init"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert re.search(r"model\.safetensors: layer model\.layers\.0\.mlp\.down_proj .*bitmask", output)
    assert "Starting to load model" not in output
