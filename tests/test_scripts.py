"""Recipes: the values that reach the launcher, the flags, nodes, errors."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from superoffload import cli, config, launcher
from tests.helpers.ranks import REPOSITORY
from tests.helpers.recipes import (
    OTHER_VALUES,
    RECIPES,
    SCRIPTS,
    TINY,
    call,
    changed,
    program,
    script_of,
    seen,
    starter,
)
from tests.helpers.recipes import stand_in as stand_in

NODE_FLAGS = ("--node_rank", "--master_addr", "--master_port", "--batch_size", "--max_steps")


@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts_the_program_with_its_values(recipe: str, mode: str, stand_in: Path) -> None:
    model, gpus, max_length, sub_group, ratio, leaf, attention = RECIPES[recipe]
    result = call(script_of(recipe), stand_in, mode)
    assert result.returncode == 7, result.stderr  # the launcher's own status
    banner = result.stdout.splitlines()[1]
    assert banner == f"Fine-tuning {model} on {gpus} x GPU, {mode}"
    words, flags = seen(stand_in)
    assert words == (["--num_gpus", str(gpus), "--quiet", "--bind_cores_to_rank"] if gpus > 1 else [])
    values = config.flat(cli.parse(flags))
    expected = {
        "model_name": model, "max_length": max_length, "sub_group_size": sub_group, "leaf_module": leaf,
        "attn_implementation": attention, "batch_size": 4 // gpus, "lr": 1e-5, "warmup": 0.05, "weight_decay": 0.01,
        "seed": 42, "num_train_epochs": 1, "dataset_name": ("tatsu-lab/alpaca",), "activation_checkpointing": "full",
        "save_checkpoint": False, "fail_on_checkpoint_error": False, "use_wandb": False, "deterministic": False,
        "output_dir": f"./{recipe}_{mode}_output", "deepspeed_config": str(REPOSITORY / f"configs/{mode}.json"),
        "offload_ratio": ratio if mode == "superoffload" else 1.0, "dataset_percentage": 100.0, "tiled_mlp": 0,
        "long_rows": "truncate", **OTHER_VALUES.get(recipe, {}),
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected


@pytest.mark.unit
def test_every_recipe_is_in_the_table() -> None:
    assert sorted(SCRIPTS.glob("finetune_*.sh")) == sorted([TINY, *(script_of(recipe) for recipe in RECIPES)])


@pytest.mark.parametrize("recipe", RECIPES)
def test_flipping_save_checkpoint_adds_its_flags_and_nothing_else(recipe: str, stand_in: Path) -> None:
    script = changed(recipe, stand_in.parent, "SAVE_CHECKPOINT=false", "SAVE_CHECKPOINT=true")
    call(script_of(recipe), stand_in, "superoffload", OUTPUT_DIR="out")
    _, before = seen(stand_in)
    call(script, stand_in, "superoffload", OUTPUT_DIR="out")
    after = (stand_in.parent / "seen").read_text().splitlines()
    added = list(after[after.index("--model_name") :])
    for word in before[before.index("--model_name") :]:
        added.remove(word)
    assert added == ["--save_checkpoint", "--fail_on_checkpoint_error"]


def test_flipping_use_wandb(stand_in: Path) -> None:
    script = changed("llama-8b", stand_in.parent, "USE_WANDB=false", "USE_WANDB=true")
    call(script, stand_in, "zerooffload")
    words = (stand_in.parent / "seen").read_text().splitlines()
    start = words.index("--use_wandb")
    assert words[start : start + 5] == [
        "--use_wandb", "--wandb_project", "llama-8b", "--wandb_run_name", "llama-8b-zerooffload"
    ]  # fmt: skip


def test_a_recipe_with_a_list_of_data_sets(stand_in: Path) -> None:
    names = 'DATASET_NAME=("my rows.jsonl" b.parquet:0.5)'
    script = changed("llama-8b", stand_in.parent, 'DATASET_NAME="tatsu-lab/alpaca"', names)
    call(script, stand_in, "superoffload", "--dataset_weights", "1", "2")
    words = (stand_in.parent / "seen").read_text().splitlines()
    data = cli.parse(words[words.index("--model_name") :]).data
    assert (data.dataset_name, data.dataset_weights) == (("my rows.jsonl", "b.parquet:0.5"), (1.0, 2.0))


@pytest.mark.parametrize(("value", "flag"), [("none",) * 2, ("full",) * 2, ("offload",) * 2, ("ofload", None)])
def test_recomputation_of_a_recipe(stand_in: Path, value: str, flag: str | None) -> None:
    line = "ACTIVATION_CHECKPOINTING="
    result = call(changed("llama-8b", stand_in.parent, f"{line}true", line + value), stand_in, "superoffload")
    if flag is None:
        assert result.returncode == 2 and result.stderr.endswith("it must be none, full or offload\n")
    else:
        words = (stand_in.parent / "seen").read_text().splitlines()
        assert cli.parse(words[words.index("--model_name") :]).model.activation_checkpointing == flag


def test_a_recipe_of_an_earlier_version_still_runs(stand_in: Path) -> None:
    script = changed("llama-8b", stand_in.parent, "LONG_ROWS=truncate", "")
    script.write_text(script.read_text().replace("TILED_MLP=0", ""))
    assert call(script, stand_in, "superoffload").returncode == 7
    words = (stand_in.parent / "seen").read_text().splitlines()
    parsed = cli.parse(words[words.index("--model_name") :])
    assert (parsed.data.long_rows, parsed.model.tiled_mlp) == ("truncate", 0)


def test_data_sets_after_the_mode_replace_those_of_the_recipe(stand_in: Path) -> None:
    call(script_of("llama-8b"), stand_in, "superoffload", "--dataset_name", "a.jsonl", "b.jsonl")
    assert cli.parse(seen(stand_in)[1]).data.dataset_name == ("a.jsonl", "b.jsonl")


def test_the_batch_is_that_of_the_whole_job(stand_in: Path) -> None:
    call(script_of("llama-70b"), stand_in, "superoffload", "8", "--max_steps", "3", "--wandb_tags", "a b", "c")
    values = config.flat(cli.parse(seen(stand_in)[1]))
    assert (values["batch_size"], values["max_steps"], values["wandb_tags"]) == (2, 3, ("a b", "c"))
    result = call(script_of("llama-70b"), stand_in, "superoffload", "6")
    assert result.returncode == 2
    assert result.stderr == "Error: batch size 6 cannot be divided among 4 devices; use a multiple of 4\n"


def test_flags_may_follow_the_mode_directly(stand_in: Path) -> None:
    call(script_of("phi-4"), stand_in, "superoffload", "--max_steps", "3")
    assert cli.parse(seen(stand_in)[1]).training.max_steps == 3


@pytest.mark.parametrize("arguments", [[], ["superofload"], ["4"]])
def test_a_missing_or_unknown_mode_shows_the_usage(arguments: list[str], stand_in: Path) -> None:
    result = call(script_of("llama-8b"), stand_in, *arguments)
    assert result.returncode == 2
    assert "Usage: bash " in result.stderr
    assert "superoffload or zerooffload" in result.stderr
    assert not (stand_in.parent / "seen").exists()


@pytest.mark.parametrize("size", ["0", "-4", "four", "4.5", "4" * 20])
def test_an_invalid_batch_size(size: str, stand_in: Path) -> None:
    result = call(script_of("llama-8b"), stand_in, "superoffload", size)
    if size == "-4":  # looks like a flag, and the parser names it
        assert result.returncode == 7
    else:
        assert (result.returncode, result.stderr) == (
            2,
            f"Error: BATCH_SIZE is '{size}'; it must be a whole number above 0, of at most 9 digits\n",
        )


@pytest.mark.parametrize("gpus", ["0", "-1", "two", "1.5"])
def test_an_invalid_number_of_gpus(gpus: str, stand_in: Path) -> None:
    script = changed("llama-8b", stand_in.parent, "GPUS_PER_NODE=1", f"GPUS_PER_NODE={gpus}")
    result = call(script, stand_in, "superoffload")
    message = f"Error: GPUS_PER_NODE is '{gpus}'; it must be a whole number above 0, of at most 9 digits\n"
    assert (result.returncode, result.stderr) == (2, message)


def test_a_switch_is_true_or_false(stand_in: Path) -> None:
    script = changed("llama-8b", stand_in.parent, "SAVE_CHECKPOINT=false", "SAVE_CHECKPOINT=yes")
    result = call(script, stand_in, "superoffload")
    assert result.returncode == 2
    assert result.stderr == f"Error: SAVE_CHECKPOINT=yes in {script}: it must be true or false\n"


def test_a_dry_run_prints_a_command_that_a_shell_reads_back(stand_in: Path) -> None:
    result = call(script_of("qwen3-30b-a3b"), stand_in, "superoffload", DRY_RUN="1", OUTPUT_DIR="my output")
    assert result.returncode == 0
    words = shlex.split(result.stdout.splitlines()[-1])
    assert words[:5] == ["deepspeed", "--num_gpus", "2", "--quiet", "--bind_cores_to_rank"]
    assert cli.parse(words[6:]).output.output_dir == "my output"
    assert not (stand_in.parent / "seen").exists()


@pytest.mark.parametrize(("visible", "device"), [(None, "0"), ("3,1", "3"), ("", "")])
def test_one_rank_needs_no_launcher(visible: str | None, device: str, stand_in: Path) -> None:
    left = "".join(f"${{{name}-}}" for name in ("WORLD_SIZE", *launcher.SIZES))
    starter(stand_in, f'echo "$1 ${{*: -2}} $CUDA_VISIBLE_DEVICES <{left}>" > "$SEEN"')
    env = {"WORLD_SIZE": "8", **dict.fromkeys(launcher.SIZES, "8")}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    result = call(script_of("llama-8b"), stand_in, "superoffload", "4", "--lr", "1", **env)
    assert result.returncode == 0
    assert (stand_in.parent / "seen").read_text() == f"{REPOSITORY}/finetune_zero3.py --lr 1 {device} <>\n"


def test_a_python_without_deepspeed_leaves_one_rank_to_the_launcher(stand_in: Path) -> None:
    program(stand_in / "python3", "exit 1")
    assert call(script_of("llama-8b"), stand_in, "superoffload").returncode == 7
    assert seen(stand_in)[0] == ["--num_gpus", "1", "--quiet"]


def allocator(stand_in: Path, **env: str) -> list[str]:
    """Return what the launcher finds in the two variables of torch's allocator, "unset" if it finds none."""
    program(stand_in / "deepspeed", 'echo "${PYTORCH_ALLOC_CONF-unset} ${PYTORCH_CUDA_ALLOC_CONF-unset}" > "$SEEN"')
    assert call(script_of("llama-70b"), stand_in, "superoffload", **env).returncode == 0
    return (stand_in.parent / "seen").read_text().splitlines()[0].split(" ")


def test_the_allocator_gets_the_options_that_torch_knows(stand_in: Path) -> None:
    library = stand_in.parent / "lib" / "libc10.so"
    library.parent.mkdir()
    program(stand_in / "python3", f"echo {stand_in.parent}/__init__.py")
    library.write_bytes(b"\0expandable_segments\0")
    assert allocator(stand_in) == ["expandable_segments:True"] * 2
    library.write_bytes(b"\0expandable_segments\0pinned_max_round_threshold_mb\0")  # alone it is not safe
    assert allocator(stand_in) == ["expandable_segments:True"] * 2
    library.write_bytes(b"\0expandable_segments\0pinned_max_round_threshold_mb\0pinned_max_cached_size_mb\0")
    all_of_them = "expandable_segments:True,pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"
    assert allocator(stand_in) == [all_of_them] * 2
    program(stand_in / "python3", "exit 1")  # no torch to be found
    assert allocator(stand_in) == ["expandable_segments:True"] * 2


def test_the_installed_torch_accepts_the_allocators_options(stand_in: Path) -> None:
    options, _ = allocator(stand_in)
    code = "import sys, torch; torch._C._accelerator_setAllocatorSettings(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, options], check=True, timeout=60)


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize("value", ["backend:native", ""])
def test_the_users_own_allocator_options_stay(name: str, value: str, stand_in: Path) -> None:
    expected = [value, "unset"] if name == "PYTORCH_ALLOC_CONF" else ["unset", value]
    assert allocator(stand_in, **{name: value}) == expected


def test_nodes_reached_by_ssh(stand_in: Path) -> None:
    hosts = stand_in.parent / "hosts"
    hosts.write_text("# two nodes\nalpha slots=4\nbeta slots=4\n\n")
    call(script_of("llama-70b"), stand_in, "superoffload", "8", HOSTFILE=str(hosts), MASTER_ADDR="alpha")
    words, flags = seen(stand_in)
    assert words[-2:] == ["--hostfile", str(hosts)]
    assert cli.parse(flags).training.batch_size == 1
    result = call(script_of("llama-70b"), stand_in, "superoffload", HOSTFILE="/no/such/file")
    assert (result.returncode, result.stderr) == (2, "Error: HOSTFILE=/no/such/file: no such file\n")


def test_nodes_without_ssh(stand_in: Path) -> None:
    node = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    call(script_of("llama-8b"), stand_in, "superoffload", OUTPUT_DIR="out", **node)
    words, flags = seen(stand_in)
    assert words == [
        "--num_gpus", "1", "--quiet", "--hostfile", "out/hostfile_1", "--no_ssh", "--node_rank", "1",
        "--master_addr", "10.0.0.1", "--master_port", "29501",
    ]  # fmt: skip
    assert (stand_in.parent / "elsewhere/out/hostfile_1").read_text() == "node-0 slots=1\nnode-1 slots=1\n"
    assert cli.parse(flags).training.batch_size == 2
    result = call(script_of("llama-8b"), stand_in, "superoffload", NUM_NODES="2")
    assert result.stderr.startswith("Error: NUM_NODES=2 also needs NODE_RANK (0 to 1) and MASTER_ADDR")


def test_a_dry_run_of_a_node_writes_nothing(stand_in: Path) -> None:
    node = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "DRY_RUN": "1", "OUTPUT_DIR": "out"}
    result = call(script_of("llama-8b"), stand_in, "superoffload", **node)
    assert result.returncode == 0 and "--hostfile out/hostfile_1" in result.stdout
    assert list((stand_in.parent / "elsewhere").iterdir()) == []


def test_saves_during_the_run_are_checked_as_well(stand_in: Path) -> None:
    script = changed("llama-8b", stand_in.parent, "SAVE_STEPS=0", "SAVE_STEPS=100")
    call(script, stand_in, "superoffload", OUTPUT_DIR="out")
    words = (stand_in.parent / "seen").read_text().splitlines()
    assert words[words.index("--save_steps") + 1] == "100"
    assert "--fail_on_checkpoint_error" in words and "--save_checkpoint" not in words


def test_a_slurm_job_starts_the_recipe_on_each_node(stand_in: Path) -> None:
    program(stand_in / "scontrol", '[[ "$*" == "show hostnames node[3-4]" ]] && printf "node3\\nnode4\\n"')
    program(
        stand_in / "srun",
        'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; cat "$SEEN" >> "$SEEN.all"; done',
    )
    job = {"SLURM_JOB_NODELIST": "node[3-4]", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "2"}
    recipe = str(script_of("llama-70b"))
    result = call(
        SCRIPTS / "slurm.sh", stand_in, recipe, "superoffload", "8", "--max_steps", "3", OUTPUT_DIR="out", **job
    )
    assert result.returncode == 0, result.stderr
    words = (stand_in.parent / "seen.all").read_text().splitlines()
    values = [[words[at + 1] for at, word in enumerate(words) if word == flag] for flag in NODE_FLAGS]
    port = str(15000 + 1234567 % 15000)
    assert values == [["0", "1"], ["node3"] * 2, [port] * 2, ["1"] * 2, ["3"] * 2]


def test_a_slurm_job_without_a_recipe_shows_the_usage(stand_in: Path) -> None:
    for arguments in ([], ["superoffload", "4"], ["missing.sh", "superoffload"]):
        result = call(SCRIPTS / "slurm.sh", stand_in, *arguments)
        assert (result.returncode, result.stderr[:14]) == (2, "Usage: sbatch ")


def test_without_deepspeed_the_setup_command_is_named(tmp_path: Path) -> None:
    copy = tmp_path / "repository" / "scripts"
    copy.mkdir(parents=True)
    for name in ("_launch.sh", "finetune_phi-4_1gpu.sh"):
        (copy / name).write_text((SCRIPTS / name).read_text())
    result = subprocess.run(
        ["bash", str(copy / "finetune_phi-4_1gpu.sh"), "superoffload"],
        capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("Error: deepspeed is not installed; run: bash ")
    assert result.stderr.endswith("scripts/setup.sh\n")


@pytest.mark.parametrize(
    ("commands", "status", "tools"),
    [
        ("exit 0", 0, ["tiny write out/start", "tiny score out/start out"]),
        ("exit 7", 7, ["tiny write out/start"]),
        # stopped by a signal, which the recipe forwards
        ("trap 'exit 0' TERM; kill -TERM $PPID; while :; do sleep 0.1; done", 0, ["tiny write out/start"]),
    ],
)
def test_the_example_is_scored_after_a_complete_run(
    commands: str, status: int, tools: list[str], stand_in: Path
) -> None:
    starter(stand_in, commands)
    program(stand_in / "superoffload", 'echo "$@" >> "$SEEN"')
    result = call(TINY, stand_in, "superoffload", OUTPUT_DIR="out")
    assert result.returncode == status, result.stderr
    assert (stand_in.parent / "seen").read_text().splitlines() == tools
