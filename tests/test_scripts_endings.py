"""What a recipe says when a rank was killed: the stand-in for the launcher exits as DeepSpeed's does."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from superoffload.commands import plan
from tests.helpers.recipes import SCRIPTS, call, changed, program, script_of, starter
from tests.helpers.recipes import stand_in as stand_in

COUNT = "kills_before=$(oom_kills)"
TWO_LESS = "kills_before=$(($(oom_kills) - 2))"


@pytest.mark.parametrize(
    ("status", "line", "words"),
    [
        (247, COUNT, "signal 9 (SIGKILL), but not by the kernel for lack of memory"),  # DeepSpeed's launcher: -9
        (137, COUNT, "signal 9 (SIGKILL), but not by the kernel for lack of memory"),
        (249, COUNT, "signal 7 (SIGBUS): usually /dev/shm or host memory is too small. /dev/shm has "),
        (135, COUNT, "signal 7 (SIGBUS): usually /dev/shm or host memory is too small. /dev/shm has "),
        (247, TWO_LESS, "The kernel killed 2 process(es) for lack of host memory"),
        (249, TWO_LESS, "The kernel killed 2 process(es) for lack of host memory"),
        (0, TWO_LESS, "The kernel killed 2 process(es) for lack of host memory"),  # the launcher itself
        (1, TWO_LESS, "The kernel killed 2 process(es) for lack of host memory"),  # of a rank that lost another
    ],
)
def test_a_killed_rank_is_explained(status: int, line: str, words: str, stand_in: Path) -> None:
    starter(stand_in, f"exit {status}")
    more = ["--columns", "a=b c", "--max_length=99", "--verify_steps", "-1", "--revision", "a b"]
    script = changed("llama-8b", stand_in.parent, COUNT, line)
    result = call(script, stand_in, "superoffload", "8", *more)
    assert result.returncode == status
    assert words in result.stderr
    if "/dev/shm has" in words:
        assert "/dev/shm has nothing" not in result.stderr
    prefix = "What the run needs: "
    (command,) = [line for line in result.stderr.splitlines() if line.startswith(prefix)]
    arguments = shlex.split(command.removeprefix(prefix))
    assert arguments[:6] == ["superoffload", "plan", "--gpus", "1", "--nodes", "1"]
    assert arguments[-3:] == ["--max_length=99", "--revision", "a b"]
    values = plan.command.make_context("plan", arguments[2:]).params
    assert values["model_name"] == "meta-llama/Llama-3.1-8B"
    assert (values["batch_size"], values["offload_ratio"], values["max_length"]) == (8, 0.8, 99)
    assert values["deepspeed_config"].endswith("/configs/superoffload.json")


def test_the_flags_of_plan_are_known_to_the_recipes() -> None:
    (text,) = re.findall(r'^planned="([^"]*)"$', (SCRIPTS / "_launch.sh").read_text(), re.MULTILINE)
    taken = {flag for option in plan.command.params for flag in (*option.opts, *option.secondary_opts)}
    own = {"--recipe", "--gpus", "--nodes", "--gpu_memory", "--host_memory", "--link", "--tokens", "--json", "--plot"}
    assert set(text.replace("\\\n", "").split()) == taken - own


@pytest.mark.parametrize("status", [0, 1, 2, 3, 143])
def test_no_other_end_is_explained(status: int, stand_in: Path) -> None:
    starter(stand_in, f"exit {status}")
    result = call(script_of("llama-8b"), stand_in, "superoffload")
    assert (result.returncode, result.stderr) == (status, "")


def test_a_killed_launcher_is_no_complete_run(stand_in: Path) -> None:
    """`deepspeed` exits with 0 if its launcher is killed; the ranks, which it started, go on."""
    program(stand_in / "rank", 'sleep 1; touch "$SEEN"')
    program(stand_in / "deepspeed", f"{stand_in}/rank --local_rank=0 & sleep 0.2")
    script = changed("llama-70b", stand_in.parent, "LOG_INTERVAL=1", "LOG_INTERVAL=1; afterwards() { echo scored; }")
    result = call(script, stand_in, "superoffload")
    assert result.returncode == 137
    assert (stand_in.parent / "seen").exists()
    assert result.stderr.startswith("DeepSpeed's launcher was killed, and its ranks went on alone")
    assert "scored" not in result.stdout


def test_a_rank_without_a_launcher_may_leave_a_child_behind(stand_in: Path) -> None:
    program(stand_in / "child", 'sleep 0.5; touch "$SEEN"')
    starter(stand_in, f"{stand_in}/child --local_rank 0 & exit 0")  # a fork has the command line of its rank
    result = call(script_of("llama-8b"), stand_in, "superoffload")
    assert (result.returncode, result.stderr) == (0, "")
    assert (stand_in.parent / "seen").exists()  # it was waited for


def function_of(name: str, folder: Path) -> str:
    """Return a function of _launch.sh that looks for /proc and /sys in a folder."""
    text = (SCRIPTS / "_launch.sh").read_text()
    (body,) = re.findall(rf"^{name}\(\) {{\n.*?^}}$", text, re.MULTILINE | re.DOTALL)
    return f"set -euo pipefail\n{body}\n".replace("/proc/", f"{folder}/proc/").replace("/sys/", f"{folder}/sys/")


def bash(text: str, **env: str) -> str:
    result = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=20, env={**os.environ, **env})
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


V1, V2 = "9:name=systemd:/\n4:memory:/job\n0::/\n", "0::/job\n"
EVENTS = "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 0\n"


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (V2, {"job/memory.events": EVENTS}, "2"),
        (V2, {"memory.events": EVENTS.replace("oom_kill 2", "oom_kill 5")}, "5"),  # in a container: its own is the root
        (V1, {"memory/job/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}, "3"),
        (V1, {"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"}, "4"),
        (V2, {}, "11"),  # of the whole machine
    ],
)
def test_the_kernels_count_is_that_of_this_cgroup(
    group: str, files: dict[str, str], expected: str, tmp_path: Path
) -> None:
    for name, content in {
        "proc/self/cgroup": group,
        "proc/vmstat": "nr_free_pages 8\noom_kill 11\n",
        **{f"sys/fs/cgroup/{name}": content for name, content in files.items()},
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert bash(function_of("oom_kills", tmp_path) + "oom_kills") == expected


def test_without_a_count_nothing_was_killed(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(V2)
    assert bash(function_of("oom_kills", tmp_path) + 'echo "$(($(oom_kills) - 0))"') == "0"


def test_the_kernels_line_is_one_since_the_start(tmp_path: Path) -> None:
    lines = [
        "[  100.5] Out of memory: Killed process 1 (old)",
        "[ 4000.1] Memory cgroup out of memory: Killed process 22 (python) total-vm:9kB",
        "[ 4000.2] oom_reaper: reaped process 22 (python)",
    ]
    program(tmp_path / "dmesg", "\n".join(f"echo '{line}'" for line in lines))
    program(tmp_path / "journalctl", "exit 1")
    call = function_of("kernel_line", Path("/")).replace("//", "/") + "kernel_line"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "started_at_s": "0"}
    assert bash(call, started_at_uptime_s="3999.0", **env) == lines[1]
    assert bash(call, started_at_uptime_s="4001.0", **env) == ""
    program(tmp_path / "dmesg", "exit 1")  # not allowed
    program(tmp_path / "journalctl", "echo 'Out of memory: Killed process 5 (python)'")
    assert bash(call, started_at_uptime_s="0", **env) == "Out of memory: Killed process 5 (python)"
