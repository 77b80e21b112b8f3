# Logic shared by all recipes: check the recipe's values, turn them into flags, start the launcher.
# A recipe sources this file and passes its own arguments: MODE [BATCH_SIZE] [more flags].
# shellcheck shell=bash
# shellcheck disable=SC2153  # BATCH_SIZE is the recipe's default, batch_size the value of this run
set -euo pipefail

recipe=$(basename "$0" .sh)
recipe=${recipe#finetune_}
recipe=${recipe%_[0-9]*gpu}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat >&2 <<TEXT
Usage: bash $0 MODE [BATCH_SIZE] [more flags of finetune_zero3.py]

  MODE         superoffload or zerooffload
  BATCH_SIZE   rows or packs per micro-batch, summed over all devices (default $BATCH_SIZE)

Environment variables:
  OUTPUT_DIR   output folder (default ./${recipe}_MODE_output)
  DRY_RUN      1 prints the command instead of running it
  HOSTFILE     hosts of a job on several nodes, reached by ssh
  NUM_NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
               for a job on several nodes without ssh; start this script on each node

The values at the top of the script set everything else: checkpoints, W&B, data and training.
TEXT
    exit 2
}

fail() {
    echo "Error: $*" >&2
    exit 2
}

whole_number() {
    [[ $2 =~ ^[1-9][0-9]{0,8}$ ]] || fail "$1 is '$2'; it must be a whole number above 0, of at most 9 digits"
}

# on NAME VALUE: succeed if a switch is true, stop if it is neither true nor false
on() {
    case "$2" in
        true) return 0 ;;
        false) return 1 ;;
        *) fail "$1=$2 in $0: it must be true or false" ;;
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
: "${LONG_ROWS:=truncate}" "${TILED_MLP:=0}" # recipes of earlier versions do not have these
batch_size=$BATCH_SIZE
if [[ $# -gt 0 && $1 != -* ]]; then
    batch_size=$1
    shift
fi

nodes=${NUM_NODES:-1}
whole_number BATCH_SIZE "$batch_size"
whole_number NUM_NODES "$nodes"
whole_number GPUS_PER_NODE "$GPUS_PER_NODE"
if [[ -n ${HOSTFILE:-} ]]; then
    [[ -f $HOSTFILE ]] || fail "HOSTFILE=$HOSTFILE: no such file"
    nodes=$(grep -cE '^[^#[:space:]]' "$HOSTFILE" || true)
    whole_number "the number of hosts in $HOSTFILE" "$nodes"
fi
devices=$((nodes * GPUS_PER_NODE))
((batch_size % devices == 0)) ||
    fail "batch size $batch_size cannot be divided among $devices devices; use a multiple of $devices"
output_dir=${OUTPUT_DIR:-./${recipe}_${mode}_output}

# Use the active environment, or else the one that scripts/setup.sh created.
if ! command -v deepspeed >/dev/null; then
    PATH="$repository/.venv/bin:$PATH"
    command -v deepspeed >/dev/null || fail "deepspeed is not installed; run: bash $repository/scripts/setup.sh"
fi

# Succeed if the launcher's packages are also those of python3.
python_has_deepspeed() {
    python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("deepspeed") is None)' 2>/dev/null
}

labels="" # the file of node names, if this script is to write one
program=$repository/finetune_zero3.py
bind_cores=false
if on BIND_CORES "$BIND_CORES"; then bind_cores=true; fi
if [[ $devices == 1 && -z ${HOSTFILE:-} ]] && ! $bind_cores && python_has_deepspeed; then
    # One rank needs no launcher, whose two processes take several seconds to import torch and DeepSpeed. Without the
    # variables below, among them the number of tasks of srun and of mpirun, it is a job of its own.
    launch=(python3 "$program" --local_rank 0)
    unset RANK LOCAL_RANK WORLD_SIZE SLURM_STEP_NUM_TASKS OMPI_COMM_WORLD_SIZE
    visible=${CUDA_VISIBLE_DEVICES-0}
    export CUDA_VISIBLE_DEVICES=${visible%%,*} # the first of those it may use
else
    launch=(deepspeed --num_gpus "$GPUS_PER_NODE")
    if [[ "$*" != *--log_level?DEBUG* ]]; then launch+=(--quiet); fi # only errors; run.log has the command
    if $bind_cores; then launch+=(--bind_cores_to_rank); fi
    if [[ -n ${HOSTFILE:-} ]]; then
        launch+=(--hostfile "$HOSTFILE")
    elif ((nodes > 1)); then
        # The launcher reads the nodes only from a file. Without ssh, their names are mere labels.
        [[ -n ${NODE_RANK:-} && -n ${MASTER_ADDR:-} ]] ||
            fail "NUM_NODES=$nodes also needs NODE_RANK (0 to $((nodes - 1))) and MASTER_ADDR (the address of node 0)"
        labels=$output_dir/hostfile_$NODE_RANK
        launch+=(--hostfile "$labels" --no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    fi
    [[ -z ${MASTER_PORT:-} ]] || launch+=(--master_port "$MASTER_PORT")
    launch+=("$program")
fi

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
    --dataset_name "${DATASET_NAME[@]}" # one name, or a list: DATASET_NAME=(a.jsonl b.parquet)
    --dataset_percentage "$DATASET_PERCENTAGE"
    --bench_steps "$BENCH_STEPS"
    --warmup_steps "$WARMUP_STEPS"
    --attn_implementation "$ATTN_IMPLEMENTATION"
    --sub_group_size "$SUB_GROUP_SIZE"
    --save_steps "$SAVE_STEPS"
    --keep_checkpoints "$KEEP_CHECKPOINTS"
    --resume "$RESUME"
)
# ZeRO-Offload keeps the whole optimizer on the host, as upstream's scripts do.
if [[ $mode == superoffload ]]; then arguments+=(--offload_ratio "$OFFLOAD_RATIO"); fi
if [[ -n $LEAF_MODULE ]]; then arguments+=(--leaf_module "$LEAF_MODULE"); fi
if [[ $LONG_ROWS != truncate ]]; then arguments+=(--long_rows "$LONG_ROWS"); fi
if ! on PACKING "$PACKING"; then arguments+=(--no_packing); fi
case "$ACTIVATION_CHECKPOINTING" in
    true | full) arguments+=(--activation_checkpointing) ;;
    false | none) ;;
    offload) arguments+=(--activation_checkpointing offload) ;;
    *) fail "ACTIVATION_CHECKPOINTING=$ACTIVATION_CHECKPOINTING in $0: it must be none, full or offload" ;;
esac
if [[ $TILED_MLP != 0 ]]; then arguments+=(--tiled_mlp "$TILED_MLP"); fi
if on DETERMINISTIC "$DETERMINISTIC"; then arguments+=(--deterministic); fi
saves=false
if on SAVE_CHECKPOINT "$SAVE_CHECKPOINT"; then
    arguments+=(--save_checkpoint)
    saves=true
fi
if $saves || [[ $SAVE_STEPS != 0 ]]; then arguments+=(--fail_on_checkpoint_error); fi
if on EXPORT "$EXPORT"; then arguments+=(--export); fi
if on USE_WANDB "$USE_WANDB"; then
    arguments+=(--use_wandb --wandb_project "$WANDB_PROJECT" --wandb_run_name "$WANDB_RUN_NAME-$mode")
fi

# Less fragmentation on the device, and pinned memory that is neither rounded up to a power of two nor kept after it was
# freed. The two options for pinned memory belong together: with the first alone, torch 2.13 may reuse a freed block for
# a larger tensor (github.com/pytorch/pytorch/pull/192722). CUDA does not start with an option that torch does not know,
# so they are passed only if torch's library contains both names. Both variables are set, because torch 2.8 to 2.10
# follow the second for CUDA, and some of them warn if the first is not set.
if [[ -z ${PYTORCH_ALLOC_CONF+set}${PYTORCH_CUDA_ALLOC_CONF+set} ]]; then
    PYTORCH_ALLOC_CONF=expandable_segments:True
    torch=$(python3 -c 'import importlib.util as u; print(u.find_spec("torch").origin)' 2>/dev/null) || torch=""
    library=$(dirname "$torch")/lib/libc10.so
    if grep -qs pinned_max_round_threshold_mb "$library" && grep -qs pinned_max_cached_size_mb "$library"; then
        PYTORCH_ALLOC_CONF+=,pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64
    fi
    export PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF=$PYTORCH_ALLOC_CONF
fi

echo "================================================"
echo "Fine-tuning $MODEL_NAME on $devices x $DEVICE_KIND, $mode"
echo "================================================"
more=("$@")
command=("${launch[@]}" "${arguments[@]}" "${more[@]}")
if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
if [[ -n $labels ]]; then
    mkdir -p "$output_dir" || fail "OUTPUT_DIR=$output_dir: cannot create the folder"
    for ((node = 0; node < nodes; node++)); do
        echo "node-$node slots=$GPUS_PER_NODE"
    done >"$labels"
fi

# Print how many processes the kernel has killed for lack of memory: of this cgroup, or else of the machine.
oom_kills() {
    local group name found
    group=$(grep -E '^[0-9]+:([a-z,]*,)?memory(,[a-z,]*)?:|^0::' /proc/self/cgroup | head -n 1) || true
    name=${group##*:}
    found=$(
        cat "/sys/fs/cgroup$name/memory.events" "/sys/fs/cgroup/memory$name/memory.oom_control" \
            /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control /proc/vmstat 2>/dev/null |
            grep -m 1 '^oom_kill '
    ) || true
    echo "${found#oom_kill }"
}

# Print the kernel's last line about a process that it has killed for lack of memory since this script started.
kernel_line() {
    {
        journalctl --dmesg --quiet --no-pager --output cat --since "@$started_at_s"
        dmesg | awk -v from="$started_at_uptime_s" -F '[][ ]+' '$2 >= from'
    } 2>/dev/null | grep -i 'out of memory.*killed process' | tail -n 1 || true
}

# The flags that `superoffload plan` takes as a run does.
planned=" --config --output_dir --model_name --revision --trust_remote_code --no_trust_remote_code \
--attn_implementation --freeze --activation_checkpointing --no_activation_checkpointing --tiled_mlp --loss_kernel \
--max_length --packing --no_packing --padding --batch_size --gradient_accumulation_steps --sequence_parallel_size \
--deepspeed_config --offload_ratio --optimizer_state --offload_params --no_offload_params --sub_group_size \
--save_checkpoint --no_save_checkpoint --save_steps --save_minutes --keep_checkpoints --export --no_export "

# Print those flags of this run that `superoffload plan` takes, with their values.
plan_flags() {
    local word keep=false
    for word in "${arguments[@]}" "${more[@]}"; do
        if [[ $word == --* ]]; then
            if [[ $planned == *" ${word%%=*} "* ]]; then keep=true; else keep=false; fi
        fi
        if $keep; then printf ' %q' "$word"; fi
    done
}

# explain SIGNAL KILLS: say what it usually means that signal 9 or 7 has ended a rank, after so many kills by the kernel.
explain() {
    local line free
    echo "================================================" >&2
    if [[ $2 != 0 ]]; then
        echo "The kernel killed $2 process(es) for lack of host memory while this run was under way." >&2
        line=$(kernel_line)
        [[ -z $line ]] || echo "The kernel's line: $line" >&2
    elif [[ $1 == 7 ]]; then
        free=$(df -h /dev/shm 2>/dev/null | awk 'NR == 2 { print $4 " of " $2 }') || true
        echo "A rank was killed by signal 7 (SIGBUS): usually /dev/shm or host memory is too small." \
            "/dev/shm has ${free:-nothing} free." >&2
    else
        echo "A rank was killed by signal 9 (SIGKILL), but not by the kernel for lack of memory: usually by a scheduler's" \
            "limit on memory or time, or by hand." >&2
    fi
    echo "What the run needs: superoffload plan --gpus $GPUS_PER_NODE --nodes $nodes$(plan_flags)" >&2
}

# DeepSpeed's launcher exits on SIGTERM without stopping its ranks, and kills them 30 seconds after Ctrl-C. So it runs in
# a process group of its own. This shell forwards signals to the ranks, which save and exit, and waits for them. Stdin is
# /dev/null because a background process that reads the terminal is stopped.
force_after_s=3
signals=0
launcher=""
pending="" # a signal that arrived before the launcher had a PID

# Print the PIDs of the launcher's ranks. A zombie has an empty cmdline, so it is not listed.
ranks() {
    local process line group
    for process in /proc/[0-9]*; do
        { read -r line <"$process/stat"; } 2>/dev/null || continue
        read -r _ _ group _ <<<"${line##*) }"
        [[ $group != "$launcher" ]] || ! grep -qsz -- '^--local_rank' "$process/cmdline" || echo "${process#/proc/}"
    done
}

# forward SIGNAL: send the first signal to the ranks; kill the group if another comes later.
# shellcheck disable=SC2329  # called by the traps below
forward() {
    local found
    if [[ -z $launcher ]]; then
        pending=$1
        return
    fi
    signals=$((signals + 1))
    if ((signals == 1)); then
        asked_at=$SECONDS
        found=$(ranks)
        # shellcheck disable=SC2086  # a list of PIDs; the whole group while there are no ranks yet
        kill -s "$1" -- ${found:-"-$launcher"} 2>/dev/null || true
    elif ((SECONDS - asked_at > force_after_s)); then # a second request, not an echo of the first: kill ranks that hang
        kill -s KILL -- "-$launcher" 2>/dev/null || true
    fi
}

started_at_s=$(date +%s)
read -r started_at_uptime_s _ </proc/uptime
kills_before=$(oom_kills)
trap 'forward USR1' USR1
trap 'forward TERM' TERM INT HUP
trap '' TTOU # with `stty tostop`, a job in the background would stop when it writes
set -m
"${command[@]}" </dev/null &
launcher=$!
set +m
[[ -z $pending ]] || forward "$pending"
while kill -0 "$launcher" 2>/dev/null; do sleep 0.2 || true; done # a trap would interrupt `wait`, whose status is then lost
status=0
wait "$launcher" || status=$?
left_alone=""
if [[ ${launch[0]} == deepspeed ]]; then left_alone=$(ranks); fi
while [[ -n $(ranks) ]]; do sleep 0.2 || true; done # a scheduler signals the launcher too, which then exits before its ranks
((signals == 0)) || kill -s TERM -- "-$launcher" 2>/dev/null || true # children of the ranks, such as tokenising workers
trap - USR1 TERM INT HUP
# A shell reports a signal as 128 more, and DeepSpeed's launcher as 256 less. If a rank is killed, the status can also be
# that of another rank, which has lost its connection; the kernel's count tells. `deepspeed` starts the launcher of the
# ranks, and reports 0 if that is killed. Otherwise that launcher ends with 0 only after its ranks.
kills=$(($(oom_kills) - kills_before))
if ((signals == 0)); then
    case "$status" in
        137 | 247) explain 9 "$kills" ;;
        135 | 249) explain 7 "$kills" ;;
        *) ((kills == 0)) || explain 9 "$kills" ;;
    esac
    if ((status == 0)) && [[ -n $left_alone ]]; then
        echo "DeepSpeed's launcher was killed, and its ranks went on alone: the log says how they ended." >&2
        status=137
    fi
fi
# A recipe may define `afterwards`, which runs after a complete run.
if ((status == 0 && signals == 0)) && declare -F afterwards >/dev/null; then afterwards; fi
exit "$status"
