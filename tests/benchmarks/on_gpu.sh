#!/usr/bin/env bash
# Run everything that needs a CUDA device; results go to tests/benchmarks/results.
#   bash tests/benchmarks/on_gpu.sh
# Tests equality with ZeRO-Offload and checkpoints on the device, then measures copy rates and the step times of this
# package, DeepSpeed's SuperOffload and ZeRO-Offload for random models of 1 and 3 billion parameters. Needs about 30 GiB
# of device memory and three times 18 bytes of host memory per parameter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OFFLOAD_ACCELERATOR=cuda CUBLAS_WORKSPACE_CONFIG=:4096:8 python -m pytest -m '' -k 'not two_ranks' \
    tests/offload/test_equality.py tests/offload/zero3/test_checkpointing.py
python tests/benchmarks/pinned_rates.py
for length in 2048 8192; do
    for preset in llama-1b llama-3b; do
        python tests/benchmarks/offload_speed.py --preset "$preset" --length "$length" --rounds 5 --steps 2 \
            --name "offload_speed_${preset}_${length}_cuda"
    done
done
