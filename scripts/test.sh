#!/usr/bin/env bash
# Check everything: style, types, tests. Arguments go to pytest: bash scripts/test.sh tests/test_cli.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
