#!/usr/bin/env bash
# A recipe as a Slurm job, on one node or several. Adapt the lines #SBATCH to your cluster, then e.g.
#   sbatch scripts/slurm.sh scripts/finetune_llama-8b_1gpu.sh superoffload
#   sbatch --nodes=2 scripts/slurm.sh scripts/finetune_llama-70b_4gpu.sh superoffload 8
# Everything after slurm.sh is a recipe and its arguments. Submit it from the folder that the outputs are to lie in, on a
# disk that all nodes share. Slurm copies this file, so the recipe is named by its path.
#
# Five minutes before the time limit Slurm sends SIGUSR1, upon which the run saves a checkpoint and ends; submit the same
# command again to resume (RESUME=auto in the recipe).
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.log
set -euo pipefail

if [[ $# -lt 2 || ! -f $1 ]]; then
    echo "Usage: sbatch $0 RECIPE.sh MODE [BATCH_SIZE] [more flags]" >&2
    exit 2
fi

# One task per node starts the recipe, whose launcher starts the ranks of the node.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=${nodes[0]:?scontrol names no nodes}
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) # jobs that share a node must not share a port
export MASTER_ADDR MASTER_PORT NUM_NODES=$SLURM_JOB_NUM_NODES
# shellcheck disable=SC2016  # each task expands SLURM_NODEID itself
exec srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' task "$@"
