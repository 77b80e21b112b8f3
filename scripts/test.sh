#!/usr/bin/env bash
# Run every check (style, types, spelling, shell scripts), then the tests.
#   bash scripts/test.sh                      the default tests: all but the slow ones
#   bash scripts/test.sh --fast               only the tests that start no process
#   bash scripts/test.sh -m slow tests/data   other arguments go to pytest
set -euo pipefail
shopt -s globstar
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
PATH="$PWD/.venv/bin:$PATH"
# .pre-commit-config.yaml runs the same commands.
ruff check .
ruff format --check .
mypy
codespell
shellcheck scripts/*.sh .ci/* tests/**/*.sh
if [[ ${1:-} == --fast ]]; then
    shift
    set -- -m unit "$@"
fi
exec python -m pytest "$@"
