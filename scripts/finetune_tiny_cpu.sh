#!/usr/bin/env bash
# Quick start: train a small model on simple tasks with two CPU cores, without a network or a GPU.
# bash scripts/finetune_tiny_cpu.sh MODE [BATCH_SIZE] [more flags]
# MODE is superoffload or zerooffload.

MODEL_NAME=""  # written below
GPUS_PER_NODE=1
DEVICE_KIND="CPU"
BIND_CORES=false

# This example always saves a checkpoint, whatever the value here, because the answers at the end are computed from it.
SAVE_CHECKPOINT=false
SAVE_STEPS=0
EXPORT=false
KEEP_CHECKPOINTS=1
RESUME=none
USE_WANDB=false
WANDB_PROJECT="tiny"
WANDB_RUN_NAME="tiny"

DATASET_NAME=""  # written below
DATASET_PERCENTAGE=100.0
MAX_LENGTH=64
LONG_ROWS=truncate
PACKING=false
BATCH_SIZE=64
EPOCHS=3
LR=1e-3
WARMUP=0.05
WEIGHT_DECAY=0.01
SEED=42
DETERMINISTIC=false

ACTIVATION_CHECKPOINTING=false
TILED_MLP=0
ATTN_IMPLEMENTATION=auto
LEAF_MODULE=""
SUB_GROUP_SIZE=4e8
OFFLOAD_RATIO=1.0

LOG_INTERVAL=25
WARMUP_STEPS=15
BENCH_STEPS=0

set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mode=${1:-}
OUTPUT_DIR=${OUTPUT_DIR:-./tiny_cpu_${mode}_output}
export OUTPUT_DIR DS_ACCELERATOR=cpu

[[ $# -eq 0 ]] || set -- "$@" --save_checkpoint --fail_on_checkpoint_error

if [[ $mode == superoffload || $mode == zerooffload ]] && [[ ${DRY_RUN:-0} != 1 ]]; then
    if ! command -v superoffload >/dev/null; then
        bash "$scripts/setup.sh"
        PATH="$scripts/../.venv/bin:$PATH"
    fi
    superoffload tiny write "$OUTPUT_DIR/start"
fi
MODEL_NAME="$OUTPUT_DIR/start/model"
DATASET_NAME="$OUTPUT_DIR/start/train.json"

afterwards() {
    superoffload tiny score "$OUTPUT_DIR/start" "$OUTPUT_DIR"
}
source "$scripts/_launch.sh" "$@"
