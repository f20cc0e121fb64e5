# shellcheck shell=bash
# To be sourced. `overlay PYTHON DIR` makes an environment in DIR that has PYTHON's packages below its own, and prints
# where its own ones lie.
overlay() {
    local place='import sysconfig; print(sysconfig.get_path("purelib"))' own
    "$1" -m venv --without-pip "$2"
    own=$("$2/bin/python" -c "$place")
    "$1" -c "$place" >"$own/base.pth"
    echo "$own"
}
