#!/usr/bin/env bash
# gpt-oss 20B on 1 GPU: bash scripts/finetune_gpt-oss-20b_1gpu.sh MODE [BATCH_SIZE] [more flags]
# MODE is superoffload or zerooffload.

MODEL_NAME="openai/gpt-oss-20b"
GPUS_PER_NODE=1
DEVICE_KIND="GPU"
BIND_CORES=false

SAVE_CHECKPOINT=false
SAVE_STEPS=0
EXPORT=false
KEEP_CHECKPOINTS=2
RESUME=auto
USE_WANDB=false
WANDB_PROJECT="gpt-oss-20b"
WANDB_RUN_NAME="gpt-oss-20b"

DATASET_NAME="tatsu-lab/alpaca"
DATASET_PERCENTAGE=100.0
MAX_LENGTH=8192
LONG_ROWS=truncate
PACKING=false  # the model's attention does not separate packed rows (transformers 5.24)
BATCH_SIZE=4
EPOCHS=1
LR=1e-5
WARMUP=0.05
WEIGHT_DECAY=0.01
SEED=42
DETERMINISTIC=false

ACTIVATION_CHECKPOINTING=true
TILED_MLP=0
ATTN_IMPLEMENTATION=eager
LEAF_MODULE="GptOssExperts"
SUB_GROUP_SIZE=8e8
OFFLOAD_RATIO=0.95

LOG_INTERVAL=1
WARMUP_STEPS=15
BENCH_STEPS=0

source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh" "$@"
