import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from superoffload import cli, config
from tests.ranks import REPOSITORY

SCRIPTS = REPOSITORY / "scripts"
TINY = SCRIPTS / "finetune_tiny_cpu.sh"
# The table of ARCHITECTURE: model, GPUs, max_length, sub-group, ratio, leaf module, attention.
RECIPES = {
    "llama-8b": ("meta-llama/Llama-3.1-8B", 1, 4096, 4e8, 0.8, None, "auto"),
    "phi-4": ("microsoft/phi-4", 1, 4096, 4e8, 0.9, None, "auto"),
    "qwen3-14b": ("Qwen/Qwen3-14B", 1, 4096, 4e8, 0.9, None, "auto"),
    "gpt-oss-20b": ("openai/gpt-oss-20b", 1, 8192, 8e8, 0.9, "GptOssExperts", "eager"),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", 2, 4096, 4e8, 0.9, "Qwen3MoeSparseMoeBlock", "auto"),
    "seed-oss-36b": ("ByteDance-Seed/Seed-OSS-36B-Instruct", 2, 4096, 4e8, 0.9, None, "auto"),
    "llama-70b": ("meta-llama/Llama-3.3-70B-Instruct", 4, 4096, 4e8, 0.9, None, "auto"),
}


def script_of(recipe: str) -> Path:
    return SCRIPTS / f"finetune_{recipe}_{RECIPES[recipe][1]}gpu.sh"


def program(path: Path, commands: str) -> None:
    path.write_text(f"#!/bin/bash\n{commands}\n")
    path.chmod(0o755)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """Put a `deepspeed` on PATH that writes its arguments down, one a line, and exits with 7."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder / "deepspeed", 'for word in "$@"; do printf "%s\\n" "$word"; done > "$SEEN"; exit 7')
    return folder


def call(script: Path, stand_in: Path, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    folder = stand_in.parent / "elsewhere"
    folder.mkdir(exist_ok=True)
    environment = {"PATH": f"{stand_in}:{os.environ['PATH']}", "SEEN": str(stand_in.parent / "seen"), **env}
    return subprocess.run(
        ["bash", str(script), *arguments], capture_output=True, text=True, env=environment, cwd=folder, timeout=60
    )


def seen(stand_in: Path) -> tuple[list[str], list[str]]:
    """Return what the stand-in got: the launcher's own words, and the training script's flags."""
    words = (stand_in.parent / "seen").read_text().splitlines()
    place = words.index(str(REPOSITORY / "finetune_zero3.py"))
    return words[:place], words[place + 1 :]


@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts_the_launcher_with_its_values(recipe: str, mode: str, stand_in: Path) -> None:
    model, gpus, max_length, sub_group, ratio, leaf, attention = RECIPES[recipe]
    result = call(script_of(recipe), stand_in, mode)
    assert result.returncode == 7, result.stderr  # the launcher's own status
    banner = result.stdout.splitlines()[1]
    assert banner == f"Fine-tuning {model} on {gpus} x GPU, {mode}"
    launcher, flags = seen(stand_in)
    assert launcher == ["--num_gpus", str(gpus), *(["--bind_cores_to_rank"] if gpus > 1 else [])]
    values = config.flat(cli.parse(flags))
    expected = {
        "model_name": model, "max_length": max_length, "sub_group_size": sub_group, "leaf_module": leaf,
        "attn_implementation": attention, "batch_size": 4 // gpus, "lr": 1e-5, "warmup": 0.05, "weight_decay": 0.01,
        "seed": 42, "num_train_epochs": 1, "dataset_name": "tatsu-lab/alpaca", "activation_checkpointing": True,
        "save_checkpoint": False, "fail_on_checkpoint_error": False, "use_wandb": False, "deterministic": False,
        "output_dir": f"./{recipe}_{mode}_output", "deepspeed_config": str(REPOSITORY / f"configs/{mode}.json"),
        "offload_ratio": ratio if mode == "superoffload" else 1.0,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected


def test_every_recipe_is_in_the_table() -> None:
    assert sorted(SCRIPTS.glob("finetune_*.sh")) == sorted([TINY, *(script_of(recipe) for recipe in RECIPES)])


def flipped(recipe: str, switch: str, folder: Path) -> Path:
    """Copy the scripts with one `NAME=false` of a recipe turned to `true`."""
    copy = folder / "repository" / "scripts"
    copy.mkdir(parents=True)
    text = script_of(recipe).read_text()
    assert text.count(f"\n{switch}=false\n") == 1
    (copy / "recipe.sh").write_text(text.replace(f"\n{switch}=false\n", f"\n{switch}=true\n"))
    (copy / "_launch.sh").write_text((SCRIPTS / "_launch.sh").read_text())
    return copy / "recipe.sh"


@pytest.mark.parametrize("recipe", RECIPES)
def test_flipping_save_checkpoint_adds_its_flags_and_nothing_else(recipe: str, stand_in: Path) -> None:
    script = flipped(recipe, "SAVE_CHECKPOINT", stand_in.parent)
    call(script_of(recipe), stand_in, "superoffload", OUTPUT_DIR="out")
    _, before = seen(stand_in)
    call(script, stand_in, "superoffload", OUTPUT_DIR="out")
    after = (stand_in.parent / "seen").read_text().splitlines()
    added = list(after[after.index("--model_name") :])
    for word in before[before.index("--model_name") :]:
        added.remove(word)
    assert added == ["--save_checkpoint", "--fail_on_checkpoint_error"]


def test_flipping_use_wandb(stand_in: Path) -> None:
    call(flipped("llama-8b", "USE_WANDB", stand_in.parent), stand_in, "zerooffload")
    words = (stand_in.parent / "seen").read_text().splitlines()
    start = words.index("--use_wandb")
    assert words[start : start + 5] == [
        "--use_wandb", "--wandb_project", "llama-8b", "--wandb_run_name", "llama-8b-zerooffload"
    ]  # fmt: skip


def test_the_batch_is_that_of_the_whole_job(stand_in: Path) -> None:
    call(script_of("llama-70b"), stand_in, "superoffload", "8", "--max_steps", "3", "--wandb_tags", "a b", "c")
    values = config.flat(cli.parse(seen(stand_in)[1]))
    assert (values["batch_size"], values["max_steps"], values["wandb_tags"]) == (2, 3, ("a b", "c"))
    result = call(script_of("llama-70b"), stand_in, "superoffload", "6")
    assert result.returncode == 2
    assert result.stderr == (
        "Error: batch size 6 cannot be shared out among 4 devices; take a multiple of 4\n"
    )  # fmt: skip


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


@pytest.mark.parametrize("size", ["0", "-4", "four", "4.5"])
def test_a_batch_size_that_is_none(size: str, stand_in: Path) -> None:
    result = call(script_of("llama-8b"), stand_in, "superoffload", size)
    if size == "-4":  # looks like a flag, and the parser names it
        assert result.returncode == 7
    else:
        assert (result.returncode, result.stderr) == (
            2,
            f"Error: BATCH_SIZE is '{size}', must be a whole number above 0\n",
        )


def test_a_switch_is_true_or_false(stand_in: Path) -> None:
    script = flipped("llama-8b", "SAVE_CHECKPOINT", stand_in.parent)
    script.write_text(script.read_text().replace("SAVE_CHECKPOINT=true", "SAVE_CHECKPOINT=yes"))
    result = call(script, stand_in, "superoffload")
    assert result.returncode == 2
    assert result.stderr == f"Error: SAVE_CHECKPOINT=yes in {script}: must be true or false\n"


def test_a_dry_run_prints_a_command_that_a_shell_reads_back(stand_in: Path) -> None:
    result = call(script_of("qwen3-30b-a3b"), stand_in, "superoffload", DRY_RUN="1", OUTPUT_DIR="my output")
    assert result.returncode == 0
    words = shlex.split(result.stdout.splitlines()[-1])
    assert words[:4] == ["deepspeed", "--num_gpus", "2", "--bind_cores_to_rank"]
    assert cli.parse(words[5:]).output.output_dir == "my output"
    assert not (stand_in.parent / "seen").exists()


def test_nodes_that_ssh_reaches(stand_in: Path) -> None:
    hosts = stand_in.parent / "hosts"
    hosts.write_text("# two nodes\nalpha slots=4\nbeta slots=4\n\n")
    call(script_of("llama-70b"), stand_in, "superoffload", "8", HOSTFILE=str(hosts), MASTER_ADDR="alpha")
    launcher, flags = seen(stand_in)
    assert launcher[-2:] == ["--hostfile", str(hosts)]
    assert cli.parse(flags).training.batch_size == 1
    result = call(script_of("llama-70b"), stand_in, "superoffload", HOSTFILE="/no/such/file")
    assert (result.returncode, result.stderr) == (2, "Error: HOSTFILE=/no/such/file: no such file\n")


def test_nodes_that_are_started_one_by_one(stand_in: Path) -> None:
    node = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    call(script_of("llama-8b"), stand_in, "superoffload", OUTPUT_DIR="out", **node)
    launcher, flags = seen(stand_in)
    assert launcher == [
        "--num_gpus", "1", "--hostfile", "out/hostfile_1", "--no_ssh", "--node_rank", "1", "--master_addr", "10.0.0.1",
        "--master_port", "29501",
    ]  # fmt: skip
    assert (stand_in.parent / "elsewhere/out/hostfile_1").read_text() == "node-0 slots=1\nnode-1 slots=1\n"
    assert cli.parse(flags).training.batch_size == 2
    result = call(script_of("llama-8b"), stand_in, "superoffload", NUM_NODES="2")
    assert result.stderr.startswith("Error: NUM_NODES=2 needs NODE_RANK (0 to 1) and MASTER_ADDR")


def test_without_deepspeed_the_way_out_is_named(tmp_path: Path) -> None:
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


def test_setup_is_done_once(tmp_path: Path) -> None:
    """A finished setup is recognised and costs nothing; an interpreter that is too old is named."""
    for path in ("pyproject.toml", "scripts/constraints.txt", "scripts/setup.sh"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text((REPOSITORY / path).read_text())
    state = subprocess.run(
        "cat pyproject.toml scripts/constraints.txt scripts/setup.sh | cksum",
        shell=True, cwd=tmp_path, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").write_text(state)
    done = subprocess.run(["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "")
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.8.1; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    refused = subprocess.run(
        ["bash", "scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=30,
        env={**os.environ, "PYTHON": str(old)},
    )  # fmt: skip
    assert refused.returncode == 2
    assert "is Python 3.8.1, Python 3.11 or newer is needed" in refused.stderr


def below(folder: Path) -> list[psutil.Process]:
    """List the processes that run a program of the folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.startswith(f"{folder}/") for word in process.info["cmdline"] or ())
    ]


def hears_everything() -> None:
    """Undo what a program in the background inherits: a shell cannot trap what is ignored when it starts."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(stand_in: Path) -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Start a recipe whose launcher has a rank below it, as DeepSpeed's has: neither passes signals on."""
    program(stand_in / "launch", f"trap '' INT; {stand_in}/rank --local_rank=0 & wait $!")
    program(stand_in / "deepspeed", f"{stand_in}/launch & wait $!")
    program(stand_in / "helper", "sleep 300")  # as one that tokenises, which nobody ends when its rank has been ended
    program(stand_in / "superoffload", ":")
    environment = {**os.environ, "PATH": f"{stand_in}:{os.environ['PATH']}", "SEEN": str(stand_in.parent / "seen")}
    saves = "trap 'sleep 0.5; echo saved > \"$SEEN\"; exit 5' TERM USR1"

    def recipe(script: Path, traps: str = saves) -> "subprocess.Popen[bytes]":
        program(stand_in / "rank", f'{stand_in}/helper & {traps}; echo started > "$SEEN"; while :; do sleep 0.1; done')
        process = subprocess.Popen(
            ["bash", str(script), "superoffload"], env=environment, stdout=subprocess.DEVNULL, cwd=stand_in,
            start_new_session=True, preexec_fn=hears_everything,
        )  # fmt: skip
        while not (stand_in.parent / "seen").exists():
            assert process.poll() is None
            time.sleep(0.05)
        return process

    yield recipe
    for left in below(stand_in):
        left.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("script", [script_of("llama-8b"), TINY], ids=lambda script: script.stem)
def test_signals_reach_the_ranks_and_their_status_comes_back(
    script: Path, number: signal.Signals, start: Any, stand_in: Path
) -> None:
    process = start(script)
    os.killpg(process.pid, number)  # as a terminal does
    assert process.wait(timeout=20) == 5
    assert (stand_in.parent / "seen").read_text() == "saved\n"
    psutil.wait_procs(below(stand_in), timeout=5)
    assert below(stand_in) == []


def test_ranks_are_waited_for_when_everything_is_signalled(start: Any, stand_in: Path) -> None:
    """A scheduler's signal ends the launcher at once, and the ranks while they save."""
    process = start(script_of("llama-8b"))
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # the rank's short sleep
            child.terminate()
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM  # the launcher's
    assert (stand_in.parent / "seen").read_text() == "saved\n"


def test_a_second_signal_seconds_later_ends_also_what_hangs(start: Any, stand_in: Path) -> None:
    process = start(script_of("llama-8b"), "trap '' TERM")
    for _ in range(2):
        process.terminate()
        time.sleep(0.2)
    assert process.poll() is None
    time.sleep(5)
    process.terminate()
    # The launcher's status, or that of waiting for it, which the signal ends.
    assert process.wait(timeout=20) in (128 + signal.SIGKILL, 128 + signal.SIGTERM)
    psutil.wait_procs(below(stand_in), timeout=5)
    assert below(stand_in) == []


@pytest.mark.parametrize(
    ("launcher", "status", "tools"),
    [
        ("exit 0", 0, ["tiny write out/start", "tiny score out/start out"]),
        ("exit 7", 7, ["tiny write out/start"]),
        ("trap : TERM; kill -TERM $PPID; sleep 1; exit 0", 0, ["tiny write out/start"]),  # stopped on the way
    ],
)
def test_the_example_is_scored_after_a_run_that_went_to_its_end(
    launcher: str, status: int, tools: list[str], stand_in: Path
) -> None:
    program(stand_in / "deepspeed", launcher)
    program(stand_in / "superoffload", 'echo "$@" >> "$SEEN"')
    result = call(TINY, stand_in, "superoffload", OUTPUT_DIR="out")
    assert result.returncode == status, result.stderr
    assert (stand_in.parent / "seen").read_text().splitlines() == tools
