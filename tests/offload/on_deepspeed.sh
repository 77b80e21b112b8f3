#!/usr/bin/env bash
# Run the offload tests on another DeepSpeed: bash tests/offload/on_deepspeed.sh VERSION [pytest arguments]
# The version is installed in a temporary folder, which is removed afterwards.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: $0 VERSION [pytest arguments]" >&2
    exit 2
fi
version=$1
shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

DS_BUILD_OPS=0 python -m pip install --quiet --no-deps --no-build-isolation --target "$folder/site" \
    "deepspeed==$version"
export OFFLOAD_OTHER_DEEPSPEED=$version TORCH_EXTENSIONS_DIR=$folder/ops
cd "$root"
PYTHONPATH=$folder/site${PYTHONPATH:+:$PYTHONPATH} python -m pytest tests/offload "$@"
