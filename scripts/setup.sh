#!/usr/bin/env bash
# Make .venv with the package and the tested versions of what it needs; does nothing where that is done.
# PYTHON names the interpreter (default python3, 3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Error: $python is $("$python" --version 2>&1), Python 3.11 or newer is needed; name one with PYTHON=..." >&2
    exit 2
}
command -v "${CXX:-c++}" >/dev/null || {
    echo "Error: no C++ compiler (${CXX:-c++}); DeepSpeed builds its CPU Adam with one, e.g. install g++" >&2
    exit 2
}

state=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | cksum)
if [[ -f .venv/installed && $(<.venv/installed) == "$state" ]]; then
    exit 0
fi

echo "Setting up .venv (some minutes)"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}
torch=$(grep '^torch==' scripts/constraints.txt)
# Without an NVIDIA driver the CPU build saves several GB; an index that has one is found by pip's own settings.
if command -v nvidia-smi >/dev/null || ! install "$torch+cpu" 2>/dev/null; then
    install "$torch"
fi
install --constraint scripts/constraints.txt --editable '.[dev]'
echo "$state" >.venv/installed
