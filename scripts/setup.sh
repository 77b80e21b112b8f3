#!/usr/bin/env bash
# Create .venv with this package and the tested versions of its dependencies. Does nothing if .venv is up to date.
# PYTHON names the interpreter (default python3; 3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Error: $python is $("$python" --version 2>&1), but Python 3.11 or newer is required; set PYTHON=..." >&2
    exit 2
}
command -v "${CXX:-c++}" >/dev/null || {
    echo "Error: no C++ compiler (${CXX:-c++}); DeepSpeed compiles its CPU Adam with one, so install e.g. g++" >&2
    exit 2
}

state=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | cksum)
if [[ -f .venv/installed && $(<.venv/installed) == "$state" ]]; then
    exit 0
fi

echo "Setting up .venv (this takes a few minutes)"
[[ -x .venv/bin/python ]] || "$python" -m venv .venv
install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}
torch=$(grep '^torch==' scripts/constraints.txt)
# Without an NVIDIA driver the CPU build saves several GB. pip's own settings say which index has it.
if command -v nvidia-smi >/dev/null || ! install --constraint scripts/constraints.txt "$torch+cpu" 2>/dev/null; then
    install --constraint scripts/constraints.txt "$torch"
fi
install --constraint scripts/constraints.txt --editable '.[dev]'
echo "$state" >.venv/installed
