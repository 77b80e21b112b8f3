#!/usr/bin/env bash
# Llama 3.1 8B with rows of 131,072 tokens, the most that the model knows, on 1 GPU of 80 GB:
# bash scripts/finetune_llama-8b_longcontext_1gpu.sh MODE [BATCH_SIZE] [more flags]
# MODE is superoffload or zerooffload.

MODEL_NAME="meta-llama/Llama-3.1-8B"
GPUS_PER_NODE=1
DEVICE_KIND="GPU"
BIND_CORES=false

SAVE_CHECKPOINT=false
SAVE_STEPS=0
EXPORT=false
KEEP_CHECKPOINTS=2
RESUME=auto
USE_WANDB=false
WANDB_PROJECT="llama-8b-longcontext"
WANDB_RUN_NAME="llama-8b-longcontext"

DATASET_NAME="emozilla/pg19"  # whole books; a download of 12 GB
DATASET_PERCENTAGE=1.0
MAX_LENGTH=131072
LONG_ROWS="split"
PACKING=true
BATCH_SIZE=1
EPOCHS=1
LR=1e-5
WARMUP=0.05
WEIGHT_DECAY=0.01
SEED=42
DETERMINISTIC=false

ACTIVATION_CHECKPOINTING=offload
TILED_MLP=auto
ATTN_IMPLEMENTATION=auto
LEAF_MODULE=""
SUB_GROUP_SIZE=4e8
OFFLOAD_RATIO=0.80

LOG_INTERVAL=1
WARMUP_STEPS=15
BENCH_STEPS=0

source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" "$@"
