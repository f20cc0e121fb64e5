#!/usr/bin/env bash
# Runs the plugin's tests in the Python code of another version of vLLM, with the compiled CPU operators of the pinned
# one: of a version that has no build for CPUs on the registry, that is as much as runs without a GPU. Argument: the
# version, as 0.33.0. TESTS: the test files; LOGS: a folder that keeps the log.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/overlay.sh
version=$1
python=${PYTHON:-.venv/bin/python}
tests=${TESTS:-tests/vllm_plugin}
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=${LOGS:-$work}/vllm-$version.log

here=$(overlay "$python" "$work/env")
env=$work/env/bin/python

# pip would prepare a build of the source distribution, for which it installs another torch.
"$python" - "$version" "$work/vllm.tar.gz" <<'END'
import json
import sys
import urllib.request

version, to = sys.argv[1:]
page = urllib.request.Request(
    "https://pypi.org/simple/vllm/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
)
files = json.load(urllib.request.urlopen(page, timeout=60))["files"]
url = next((file["url"] for file in files if file["filename"] == f"vllm-{version}.tar.gz"), None)
if url is None:
    sys.exit(f"the registry has no sources of vllm {version}")
urllib.request.urlretrieve(url, to)
END
tar xzf "$work/vllm.tar.gz" -C "$work"
cp -r "$work/vllm-$version/vllm" "$here"
(cd "$site" && find vllm \( -name "*.so" -o -name _version.py \) -exec cp --parents {} "$here" \;)
pinned=$(sed -n "s/.*= version = '\(.*\)'.*/\1/p" "$site/vllm/_version.py")
sed -i "s/$pinned/$version/; s/(${pinned//./, })/(${version//./, })/" "$here/vllm/_version.py"

# What its own code needs that the pinned one's does not.
missing=$("$env" - "$work/vllm-$version/requirements/common.txt" <<'END'
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from packaging.requirements import Requirement

for line in open(sys.argv[1]):
    line = line.split("#")[0].strip()
    if not line or line.startswith("-"):
        continue
    need = Requirement(line)
    if need.marker and not need.marker.evaluate():
        continue
    try:
        installed(need.name)
    except PackageNotFoundError:
        print(f"{need.name}{need.specifier}")
END
)
# shellcheck disable=SC2086  # several packages
[ -z "$missing" ] || "$env" -m pip install -q --no-deps $missing

# shellcheck disable=SC2086  # several files
PYTHONPATH=src "$env" -m pytest -q -p no:cacheprovider $tests 2>&1 | tee "$log"
