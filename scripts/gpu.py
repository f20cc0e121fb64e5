"""Runs what only a GPU can show, each part with a time limit, and writes one JSON file: python scripts/gpu.py [FILE].

The parts are the tests marked gpu, the kernel tables (bf16, int8 and FP8 against torch's dense products), and two
models pruned on the GPU, where llm-compressor and the models are there. A part that cannot run is named with the
reason.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from records import provenance

ROOT = Path(__file__).resolve().parent.parent
TOKENS = ("1", "16", "256", "2048")
_PRUNING = ("llmcompressor", "gguf", "accelerate", "datasets")


def main(output: Path) -> int:
    if not torch.cuda.is_available():
        print(f"gpu: torch {torch.__version__} sees no CUDA device here, so nothing was run and nothing was written")
        return 1
    started, parts = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, needs, limit, command in _parts(Path(folder)):
            missing = [package for package in needs if importlib.util.find_spec(package) is None]
            part = {"part": name, "missing": missing} if missing else _run(name, limit, command, Path(folder))
            parts.append(part)
            print(f"gpu: {name}: {_said(part)}", flush=True)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    device = {"name": torch.cuda.get_device_name(), "capability": capability, "cuda": torch.version.cuda}
    record = provenance() | {"device": device, "seconds": time.monotonic() - started, "parts": parts}
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"gpu: {output}")
    return int(any(part.get("returned") != 0 for part in parts if "missing" not in part))


def _parts(folder: Path) -> list[tuple[str, tuple[str, ...], int, list[str]]]:
    """Of each part the name, the packages that it needs, its limit in seconds, and its command."""
    parts = [("tests", ("pytest", "triton"), 130, ["-m", "pytest", "-q", "-m", "gpu", "tests"])]
    for dtype in ("bf16", "int8", "fp8"):
        rows = ["--results", str(folder / f"kernel {dtype}.jsonl"), "--seconds", "0.5", "--tokens", *TOKENS]
        command = ["benchmarks/kernel.py", "--device", "cuda", "--dtype", dtype, *rows]
        parts.append((f"kernel {dtype}", ("triton",), 50, command))
    for model in ("smollm2", "gemma3"):
        command = ["-m", "crepe_llm", "prune", model, "--recipe", "crepe_2of4", "--sample", "--samples", "16"]
        results = ["--json", str(folder / f"prune {model}.json"), "--output", str(folder / model)]
        parts.append((f"prune {model}", _PRUNING, 90, [*command, "--length", "512", *results]))
    return parts


def _run(name: str, limit: int, command: list[str], folder: Path) -> dict:
    """How a part ended, with the rows it wrote."""
    started, part = time.monotonic(), {"part": name, "command": command}
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=limit, errors="replace"
        )
        part |= {"returned": done.returncode, "last_lines": (done.stdout + done.stderr).splitlines()[-8:]}
    except subprocess.TimeoutExpired:
        part |= {"returned": None, "last_lines": [f"not done after {limit} s"]}
    part["seconds"] = time.monotonic() - started
    for file in folder.glob(f"{name}.json*"):
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        part["rows"] = [json.loads(line) for line in lines]
    return part


def _said(part: dict) -> str:
    if "missing" in part:
        return f"not run, as {', '.join(part['missing'])} is not installed"
    last = next((line for line in reversed(part["last_lines"]) if line.strip()), "")
    return f"{'done' if part['returned'] == 0 else 'FAILED'} in {part['seconds']:.0f} s: {last[:100]}"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "gpu.json")))
