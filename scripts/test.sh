#!/usr/bin/env bash
# The test command: lint, types, then every test this machine has the hardware for, one process a core up to four.
# A file's tests stay in one process and share its fixtures. A GPU is not shared: beside one, all run in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/clang-format --dry-run --Werror src/crepe_llm/kernels/cpu/*.{cpp,h} tests/*.cpp
.venv/bin/mypy
processes=$(nproc)
if [ "$processes" -gt 4 ]; then processes=4; fi
if [ "$processes" = 1 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }; then processes=0; fi
# Threads of one process that wait for work must not keep a core from the other.
export OMP_WAIT_POLICY=passive
.venv/bin/python -m pytest -n "$processes" --dist loadfile --no-loadscope-reorder --durations 20 "$@"
