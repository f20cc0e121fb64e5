#!/usr/bin/env bash
# Everything that only a GPU can show, in under 8 minutes, on a machine that has torch, Triton and transformers and can
# fetch nothing. Writes one JSON file. PYTHON: the interpreter (default: .venv's, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
export PYTHONPATH="$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
exec "$python" scripts/gpu.py "$@"
