"""`crepe serve`: the command it runs and what it sets."""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

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
        (["--port", "8001", "--kv_cache_memory_bytes", "1000"], {}),
        (["--gpu_memory_utilization=0.5"], {}),
        (["--device-memory-utilization", "0.5"], {}),  # vLLM's other name of the same
        (["--kv-cache-mem", "1000"], {}),  # argparse takes what is cut short
        ([], {"VLLM_CPU_KVCACHE_SPACE": "3"}),
    ],
)
def test_what_the_user_decided_stays(arguments: list[str], environment: dict[str, str]) -> None:
    assert serve.cpu_environment(arguments, environment, 40 * GIB) == {}


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("kv-cache-memory-bytes: 1000", True),
        ("port: 8001\ngpu_memory_utilization: 0.5", True),
        ("kv-cache-dtype: fp8\nport: 8001", False),
        ("", False),
    ],
)
def test_what_a_config_file_decides_stays(text: str, decided: bool, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert serve.cpu_environment(["--config", str(file), "--enforce-eager"], {}, 40 * GIB) == (
        {} if decided else {"VLLM_CPU_KVCACHE_SPACE": "10"}
    )


@pytest.mark.parametrize("arguments", [["--port", "8001"], ["--kv-cache-dtype", "fp8"], ["-O3", "--"], ["--config"]])
def test_other_options_leave_the_cache_to_us(arguments: list[str]) -> None:
    assert serve.cpu_environment(arguments, {}, 40 * GIB) == {"VLLM_CPU_KVCACHE_SPACE": "10"}


def test_a_config_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("port: [")
    with pytest.raises(ValueError, match=r"--config .*options\.yaml is not YAML"):
        serve.cpu_environment(["--config", str(file)], {}, 40 * GIB)
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        serve.cpu_environment(["--config", str(tmp_path / "none.yaml")], {}, 40 * GIB)


def test_plugins_without_this_one_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    named = {entry.name for entry in importlib.metadata.entry_points(group="vllm.general_plugins")}
    for listed, cure in (("other", "other,crepe_llm"), ("", "crepe_llm"), ("crepe_llm2", "crepe_llm2,crepe_llm")):
        monkeypatch.setenv("VLLM_PLUGINS", listed)
        assert cli.main(["serve", "folder"]) == 2
        assert f"VLLM_PLUGINS={listed} leaves out crepe_llm, " in (said := capsys.readouterr().err)
        assert f"set VLLM_PLUGINS={cure}, or unset it" in said
        assert cure.split(",")[-1] in named
    serve.check_plugins({})
    serve.check_plugins({"VLLM_PLUGINS": "other,crepe_llm"})


def test_a_path_of_no_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    assert cli.main(["serve", str(tmp_path / "none")]) == 2
    assert f"there is no folder {tmp_path / 'none'}: give a checkpoint's folder" in capsys.readouterr().err


def test_command_line_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[object] = []
    monkeypatch.setattr(serve, "serve", lambda *what: passed.extend(what))
    assert cli.main(["serve", "folder", "--port", "8001", "--enforce-eager"]) == 0
    assert passed == ["folder", ["--port", "8001", "--enforce-eager"]]


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest))
    assert cli.main(["serve", "folder"]) == 2
    assert ".[serve]" in capsys.readouterr().err
