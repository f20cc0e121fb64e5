"""`make gpu` as far as a machine without a GPU can tell: it says so, and its parts are commands that exist."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from script_modules import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def gpu():
    return load_script("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu.sh"), str(tmp_path / "gpu.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 1 and "sees no CUDA device" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_the_parts_take_under_8_minutes(gpu, tmp_path):
    assert sum(limit for _, _, limit, _ in gpu._parts(tmp_path)) < 8 * 60


def test_a_part_is_recorded_with_its_rows_or_its_failure(gpu, tmp_path):
    (tmp_path / "counts.jsonl").write_text('{"rows": 1}\n{"rows": 2}\n')
    part = gpu._run("counts", 30, ["-c", "print('two rows')"], tmp_path)
    assert part["returned"] == 0 and part["rows"] == [{"rows": 1}, {"rows": 2}] and part["last_lines"] == ["two rows"]
    assert "FAILED" in gpu._said(gpu._run("fails", 30, ["-c", "raise SystemExit(3)"], tmp_path))
    assert gpu._run("sleeps", 1, ["-c", "import time; time.sleep(60)"], tmp_path)["returned"] is None


def test_the_kernel_tables_options_exist(gpu, tmp_path):
    for _, _, _, command in gpu._parts(tmp_path):
        if command[0].endswith("kernel.py"):
            helped = subprocess.run([sys.executable, str(ROOT / command[0]), "--help"], capture_output=True, text=True)
            assert all(word in helped.stdout for word in command if word.startswith("--"))
            break
