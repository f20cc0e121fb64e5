#!/usr/bin/env bash
# Runs the loading, saving and recipe tests with other versions of transformers and compressed-tensors, each in an
# environment of its own on top of .venv, and prints the table of docs/scale.md. Arguments: pairs TRANSFORMERS,COMPRESSED
# (default: from what is pinned to the newest on the registry). TESTS: the test files; LOGS: a folder that keeps the logs.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/overlay.sh
python=${PYTHON:-.venv/bin/python}
tests=${TESTS:-tests/checkpoints/test_loading.py tests/checkpoints/test_saving.py tests/checkpoints/test_converting.py tests/checkpoints/test_space.py tests/checkpoints/test_experts.py tests/checkpoints/test_model_check.py tests/oneshot/test_recipes.py}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=${LOGS:-$work}
mkdir -p "$logs"

# The last release of each minor version of a package, from the one that is installed on.
releases() {
    "$python" -m pip index versions "$1" 2>/dev/null | "$python" -c '
import sys
from importlib.metadata import version
name = sys.argv[1]
known = next(line for line in sys.stdin if line.startswith("Available"))
numbers = [tuple(map(int, v.strip().split(".")[:3])) for v in known.split(":")[1].split(",") if v.strip().replace(".", "").isdecimal()]
last = {n[:2]: n for n in sorted(numbers)}
pinned = tuple(map(int, version(name).split("+")[0].split(".")[:2]))
print(*(".".join(map(str, n)) for minor, n in last.items() if minor >= pinned))' "$1"
}

if [ $# -eq 0 ]; then
    pinned=$("$python" -c 'from importlib.metadata import version as v; print(v("transformers"), v("compressed-tensors"))')
    set -- "${pinned% *},${pinned#* }"
    newest=$(releases compressed-tensors | awk '{print $NF}')
    for version in $(releases transformers); do set -- "$@" "$version,$newest"; done
fi

echo "| transformers | compressed-tensors | torch | tests |"
echo "|---|---|---|---|"
torch=$("$python" -c 'import torch; print(torch.__version__)')
vllm=$("$python" -c 'from importlib.metadata import version; print(version("vllm"))' 2>/dev/null || echo none)
for pair in "$@"; do
    transformers=${pair%,*} compressed=${pair#*,} log="$logs/$pair.log"
    overlay "$python" "$work/env" >/dev/null
    if "$work/env/bin/python" -m pip install -q "transformers==$transformers" "compressed-tensors==$compressed" >"$log" 2>&1; then
        # shellcheck disable=SC2086  # several files
        PYTHONPATH=src "$work/env/bin/python" -m pytest -q -p no:cacheprovider $tests >>"$log" 2>&1 || true
        result=$(grep -E '^(=+ )?[0-9]+ (passed|failed|errors?)' "$log" | tail -1 | sed -E 's/ in [0-9].*//; s/^=+ //; s/, [0-9]+ warnings?//')
    else
        result="cannot be installed"
    fi
    echo "| $transformers | $compressed | $torch | ${result:-did not run, see $log} |"
    rm -rf "$work/env"
done
echo
echo "vLLM beside them: $vllm, whose own tests run with \`make test\`."
