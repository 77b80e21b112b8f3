#!/usr/bin/env bash
# Run the default tests with other versions of some packages, in an environment of its own.
#   bash scripts/test_versions.sh transformers==5.17.0
#   bash scripts/test_versions.sh torch==2.11.0 transformers==5.17.0 -- -m unit
# Arguments after -- go to pytest. The environment is kept in .versions/NAME==VERSION..., with its compiled operators; a
# long list of packages is shortened to its checksum.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=()
while [[ $# -gt 0 && $1 != -- ]]; do
    [[ $1 == ?*==?* ]] || {
        echo "Usage: bash $0 NAME==VERSION ... [-- arguments of pytest]" >&2
        exit 2
    }
    packages+=("$1")
    shift
done
[[ ${#packages[@]} -gt 0 ]] || {
    echo "Usage: bash $0 NAME==VERSION ... [-- arguments of pytest]" >&2
    exit 2
}
[[ $# -eq 0 ]] || shift

name=$(printf '%s\n' "${packages[@]}" | sort | paste -sd_)
[[ ${#name} -le 200 ]] || name=$(cksum <<<"$name" | cut -d' ' -f1) # a longer one would be no file name
folder=$PWD/.versions/$name
install() {
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}
if [[ ! -f $folder/installed ]]; then
    "${PYTHON:-python3}" -m venv "$folder"
    # The other packages may be newer than those tested, if the chosen versions need that; torch comes first, as in setup.sh.
    torch=$(printf '%s\n' "${packages[@]}" "$(grep '^torch==' scripts/constraints.txt)" | grep '^torch==' | head -n 1)
    install "$torch+cpu" 2>/dev/null || install "$torch"
    install "$torch" "${packages[@]}" --editable '.[dev]'
    touch "$folder/installed"
fi
"$folder/bin/python" -m pip list --disable-pip-version-check | grep -iE '^(torch|transformers|deepspeed|datasets|accelerate|tokenizers) '
PATH=$folder/bin:$PATH TORCH_EXTENSIONS_DIR=$folder/operators exec "$folder/bin/python" -m pytest "$@"
