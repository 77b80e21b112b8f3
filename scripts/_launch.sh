# What every recipe does with its values: check them, turn them into flags, start the launcher.
# Sourced by a recipe with the recipe's own arguments: MODE [BATCH_SIZE] [more flags].
set -euo pipefail

recipe=$(basename "$0" .sh)
recipe=${recipe#finetune_}
recipe=${recipe%_[0-9]*gpu}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat >&2 <<TEXT
Usage: bash $0 MODE [BATCH_SIZE] [more flags of finetune_zero3.py]

  MODE         superoffload or zerooffload
  BATCH_SIZE   rows per micro-batch of the whole job (default $BATCH_SIZE); shared out among the devices

Environment: OUTPUT_DIR (default ./${recipe}_MODE_output), DRY_RUN=1 prints the command instead of running it,
HOSTFILE for several nodes reached by ssh, or NUM_NODES, NODE_RANK, MASTER_ADDR and MASTER_PORT where this
script is started on each node. Checkpoint, W&B and training are lines at the top of the script.
TEXT
    exit 2
}

fail() {
    echo "Error: $*" >&2
    exit 2
}

whole_number() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 is '$2', must be a whole number above 0"
}

# on NAME: true or false of a switch, and nothing else
on() {
    case "${!1}" in
        true) return 0 ;;
        false) return 1 ;;
        *) fail "$1=${!1} in $0: must be true or false" ;;
    esac
}

[[ $# -gt 0 ]] || usage
mode=$1
shift
case "$mode" in
    superoffload | zerooffload) ;;
    *)
        echo "Error: unknown mode '$mode'" >&2
        usage
        ;;
esac
batch_size=$BATCH_SIZE
if [[ $# -gt 0 && $1 != -* ]]; then
    batch_size=$1
    shift
fi

nodes=${NUM_NODES:-1}
whole_number BATCH_SIZE "$batch_size"
whole_number NUM_NODES "$nodes"
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file"
    nodes=$(grep -cE '^[^#[:space:]]' "$HOSTFILE" || true)
    whole_number "the number of hosts in $HOSTFILE" "$nodes"
fi
devices=$((nodes * GPUS_PER_NODE))
((batch_size % devices == 0)) ||
    fail "batch size $batch_size cannot be shared out among $devices devices; take a multiple of $devices"
output_dir=${OUTPUT_DIR:-./${recipe}_${mode}_output}

launch=(deepspeed --num_gpus "$GPUS_PER_NODE")
if on BIND_CORES; then launch+=(--bind_cores_to_rank); fi
if [[ -n ${HOSTFILE:-} ]]; then
    launch+=(--hostfile "$HOSTFILE")
elif ((nodes > 1)); then
    # The launcher knows the nodes by a file only; without ssh their names are labels.
    [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
        fail "NUM_NODES=$nodes needs NODE_RANK (0 to $((nodes - 1))) and MASTER_ADDR (of node 0) too"
    mkdir -p "$output_dir" || fail "OUTPUT_DIR=$output_dir: cannot be made"
    for ((node = 0; node < nodes; node++)); do
        echo "node-$node slots=$GPUS_PER_NODE"
    done >"$output_dir/hostfile_$NODE_RANK"
    launch+=(--hostfile "$output_dir/hostfile_$NODE_RANK" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
fi
[[ -z ${MASTER_PORT:-} ]] || launch+=(--master_port "$MASTER_PORT")

arguments=(
    --deepspeed_config "$repository/configs/$mode.json"
    --model_name "$MODEL_NAME"
    --output_dir "$output_dir"
    --batch_size "$((batch_size / devices))"
    --num_train_epochs "$EPOCHS"
    --lr "$LR"
    --warmup "$WARMUP"
    --weight_decay "$WEIGHT_DECAY"
    --seed "$SEED"
    --max_length "$MAX_LENGTH"
    --log_interval "$LOG_INTERVAL"
    --dataset_name "$DATASET_NAME"
    --dataset_percentage "$DATASET_PERCENTAGE"
    --bench_steps "$BENCH_STEPS"
    --warmup_steps "$WARMUP_STEPS"
    --attn_implementation "$ATTN_IMPLEMENTATION"
    --sub_group_size "$SUB_GROUP_SIZE"
    --save_steps "$SAVE_STEPS"
    --keep_checkpoints "$KEEP_CHECKPOINTS"
    --resume "$RESUME"
)
# ZeRO-Offload keeps the whole optimizer on the host, as upstream has it.
if [[ $mode == superoffload ]]; then arguments+=(--offload_ratio "$OFFLOAD_RATIO"); fi
if [[ -n $LEAF_MODULE ]]; then arguments+=(--leaf_module "$LEAF_MODULE"); fi
if ! on PACKING; then arguments+=(--no_packing); fi
if on ACTIVATION_CHECKPOINTING; then arguments+=(--activation_checkpointing); fi
if on DETERMINISTIC; then arguments+=(--deterministic); fi
if on SAVE_CHECKPOINT; then arguments+=(--save_checkpoint --fail_on_checkpoint_error); fi
if on EXPORT; then arguments+=(--export); fi
if on USE_WANDB; then
    arguments+=(--use_wandb --wandb_project "$WANDB_PROJECT" --wandb_run_name "$WANDB_RUN_NAME-$mode")
fi

# The environment that is active, else the one that scripts/setup.sh made.
if ! command -v deepspeed >/dev/null; then
    PATH="$repository/.venv/bin:$PATH"
    command -v deepspeed >/dev/null || fail "deepspeed is not installed; run: bash $repository/scripts/setup.sh"
fi

echo "================================================"
echo "Fine-tuning $MODEL_NAME on $devices x $DEVICE_KIND, $mode"
echo "================================================"
command=("${launch[@]}" "$repository/finetune_zero3.py" "${arguments[@]}" "$@")
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

# DeepSpeed's launcher dies of SIGTERM and leaves its ranks behind; at Ctrl-C it kills them after half a minute. So it gets
# a process group of its own, and this shell passes what it is asked on to the ranks, which save and end, and stays until
# they have ended. The group reads no terminal: a process in the background that asked something there would be stopped.
signals=0
ranks() { # the processes of the group that were given a rank; a zombie has no words
    local process line group
    for process in /proc/[0-9]*; do
        { read -r line <"$process/stat"; } 2>/dev/null || continue
        read -r _ _ group _ <<<"${line##*) }"
        [[ $group != "$launcher" ]] || ! grep -qsz -- '^--local_rank' "$process/cmdline" || echo "${process#/proc/}"
    done
}
pass_on() {
    local found
    signals=$((signals + 1))
    if ((signals == 1)); then
        asked_at=$SECONDS
        found=$(ranks)
        # shellcheck disable=SC2086  # a list; and before there are ranks, the whole group
        kill -s "$1" -- ${found:-"-$launcher"} 2>/dev/null || true
    elif ((SECONDS - asked_at > 3)); then # not the same request once more: it is to end at once, also where ranks hang
        kill -s KILL -- "-$launcher" 2>/dev/null || true
    fi
}
set -m
"${command[@]}" </dev/null &
launcher=$!
set +m
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM INT HUP
status=-1
while ((status == -1)) || kill -0 "$launcher" 2>/dev/null; do # a trap ends the wait early
    status=0
    wait "$launcher" || status=$?
done
while [[ -n $(ranks) ]]; do sleep 0.2; done # a scheduler signals the launcher too, which then ends before them
((signals == 0)) || kill -s TERM -- "-$launcher" 2>/dev/null || true # what ranks left, such as processes that tokenise
trap - USR1 TERM INT HUP
# A recipe may say what follows a run that went to its end.
if ((status == 0 && signals == 0)) && declare -F afterwards >/dev/null; then afterwards; fi
exit "$status"
