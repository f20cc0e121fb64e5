"""A few of the mutants of scripts/fuzz_checkpoints.py in the hands of vLLM's own loader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
pytest.importorskip("vllm", reason="vLLM is not installed")

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_checkpoints.py"


def test_no_mutant_is_served_in_silence() -> None:
    """In a process of its own: it makes vLLM's process groups, which engines of other tests make, too."""
    command = [sys.executable, str(SCRIPT), "--by", "vllm", "--mutants", "30"]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    counts = result.stdout.splitlines()[-1]
    assert counts.startswith("vllm: ") and counts.endswith(", 0 SILENT WRONG")
    assert int(counts.split()[1]) > 20  # refused
