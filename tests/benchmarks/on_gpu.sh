#!/usr/bin/env bash
# Run everything that needs a CUDA device: tests of equality, whole runs, and measurements.
#   bash tests/benchmarks/on_gpu.sh                       every part
#   bash tests/benchmarks/on_gpu.sh equality train        some parts; --help lists them
#   bash tests/benchmarks/on_gpu.sh --rehearse            every part small, on the CPU
# Needs 40 GiB of device memory; a part takes up to about 8 minutes on an H100. Parts that a call has finished are not
# repeated by the next one unless the code changes (--again repeats them). A part that fails does not stop the others; the
# exit status is then 1. The table is tests/benchmarks/results/on_gpu.md, logs are in on_gpu_output/logs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -m tests.benchmarks.on_gpu "$@"
