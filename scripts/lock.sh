#!/usr/bin/env bash
# Write scripts/constraints.txt: a version for each package that `.[dev]` needs, directly or indirectly.
#   bash scripts/lock.sh             keep the locked versions, add missing packages, drop unneeded ones
#   bash scripts/lock.sh --upgrade   use the newest versions that pyproject.toml allows
# PYTHON names the interpreter (default python3). Nothing is installed outside a temporary folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
touch "$folder/kept.txt"
if [[ ${1:-} != --upgrade ]]; then cp scripts/constraints.txt "$folder/kept.txt"; fi

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --dry-run --ignore-installed \
    --constraint "$folder/kept.txt" --report "$folder/report.json" '.[dev]'
cat >"$folder/constraints.txt" <<'TEXT'
# The versions that the tests ran with; scripts/setup.sh installs these. Written by: bash scripts/lock.sh
# A CUDA build of torch also needs nvidia-*, cuda-* and triton packages. They are left out because torch pins them
# itself, and a constraint only limits what is installed. For the same reason torch has no build label such as +cpu.
TEXT
"$folder/venv/bin/python" - "$folder/report.json" >>"$folder/constraints.txt" <<'CODE'
import json, re, sys

pins = {}
for package in json.load(open(sys.argv[1]))["install"]:
    name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
    if name != "superoffload" and not re.match(r"(nvidia|cuda)-|triton$", name):
        pins[name] = package["metadata"]["version"].split("+")[0]
print("\n".join(f"{name}=={pins[name]}" for name in sorted(pins)))
CODE
mv "$folder/constraints.txt" scripts/constraints.txt
