"""`crepe serve`: the command it runs and what it sets."""

import importlib.util
import sys

import pytest

from crepe_llm.cli import main as cli
from crepe_llm.vllm_plugin import serve

GIB = 1 << 30


def test_command_is_vllms_server_with_the_users_options() -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    command = serve.server_command("folder", ["--port", "8001"])
    assert command[0] == sys.executable
    assert importlib.util.find_spec(command[2]) is not None
    assert command[3:] == ["--model", "folder", "--port", "8001"]


def test_cache_gets_a_quarter_of_the_available_memory() -> None:
    assert serve.cpu_environment([], {}, 40 * GIB) == {"VLLM_CPU_KVCACHE_SPACE": "10"}
    assert serve.cpu_environment([], {}, GIB // 2) == {"VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["--kv-cache-memory-bytes", "1000"], {}),
        (["--gpu-memory-utilization=0.5"], {}),
        ([], {"VLLM_CPU_KVCACHE_SPACE": "3"}),
    ],
)
def test_what_the_user_decided_stays(arguments: list[str], environment: dict[str, str]) -> None:
    assert serve.cpu_environment(arguments, environment, 40 * GIB) == {}


def test_command_line_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[object] = []
    monkeypatch.setattr(serve, "serve", lambda *what: passed.extend(what))
    assert cli.main(["serve", "folder", "--port", "8001", "--enforce-eager"]) == 0
    assert passed == ["folder", ["--port", "8001", "--enforce-eager"]]


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    assert cli.main(["serve", "folder"]) == 2
    assert "crepe-llm[serve]" in capsys.readouterr().err
