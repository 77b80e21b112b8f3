"""The measurements on a GPU: what a call runs, repeats and reports; and the whole of it, rehearsed on the CPU."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from superoffload import cli
from tests.benchmarks import on_gpu
from tests.benchmarks.gpu import machine, parts, report
from tests.benchmarks.gpu.programs import Bench, Outcome, PartError
from tests.benchmarks.gpu.report import Row
from tests.benchmarks.offload_speed import added, growth, kept
from tests.helpers.ranks import REPOSITORY, run

GPU: dict[str, Any] = {
    "device": "a GPU", "devices": 1, "capability": [9, 0], "device_gib": 80.0, "device_free_gib": 79.0, "cores": 16,
    "host_gib": 120.0, "torch": "2.13", "cuda": "13.0", "deepspeed": "0.19.8", "transformers": "5", "flash_attn": False,
    "liger": False,
    "pytest": "9", "pytest-timeout": "2",
}  # fmt: skip
Call = Callable[..., int]


def make_bench(work: Path, limit_s: float = 60.0) -> Bench:
    return Bench(part="part", rehearse=True, work=work, machine=GPU, deadline=time.monotonic() + limit_s)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the parts by two, of which the second fails, and the machine by one with a GPU; list what runs."""
    calls: list[str] = []

    def good(bench: Bench) -> parts.Found:
        calls.append("good")
        return [Row("rate", "3 | 4", "more\nthan 2")], {"rate": 3}

    def bad(bench: Bench) -> parts.Found:
        calls.append("bad")
        raise PartError("it broke\nhere")

    def faulty(bench: Bench) -> parts.Found:
        raise KeyError("no such number")

    listed = (
        parts.Part(name="bad", what="fails", run=bad),
        parts.Part(name="faulty", what="is wrong itself", run=faulty),
        parts.Part(name="good", what="works", run=good),
        parts.Part(name="two", what="needs two devices", run=good, devices=2),
    )
    monkeypatch.setattr(on_gpu, "PART_LIST", listed)
    monkeypatch.setattr(on_gpu, "NAMES", [part.name for part in listed])
    monkeypatch.setattr(on_gpu, "describe_machine", lambda: GPU)
    monkeypatch.setattr(machine, "DISK_GIB", 0)
    monkeypatch.setattr(Bench, "run", lambda self, *command: calls.append(command[-1]))
    return calls


@pytest.fixture
def call(tmp_path: Path) -> Call:
    return lambda *flags: on_gpu.main(
        [*flags, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    )


@pytest.mark.unit
def test_a_part_that_fails_is_reported_and_does_not_stop_the_others(
    ran: list[str], call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call() == 1
    assert ran == ["tests.helpers.operators", "bad", "good"]  # the operators come first
    table = (tmp_path / "results" / "on_gpu.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert table.splitlines()[-5:] == [
        "| bad | fails | **failed in 0 s**: it broke |  |",
        "| faulty | is wrong itself | **failed in 0 s**: the part itself failed: KeyError: 'no such number' |  |",
        "| good | works | **ok in 0 s** |  |",
        "|  | rate | 3 \\| 4 | more than 2 |",
        "| two | needs two devices | **skipped**: needs 2 devices, there is 1 |  |",
    ]
    found = json.loads((tmp_path / "results" / "on_gpu.json").read_text(encoding="utf-8"))
    assert [part["result"] for part in found["parts"]] == ["failed", "failed", "ok", "skipped"]
    assert found["parts"][0]["why"] == "it broke\nhere" and found["parts"][2]["data"] == {"rate": 3}


@pytest.mark.unit
def test_the_next_call_repeats_only_what_is_not_finished(
    ran: list[str], call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call("good") == 0
    assert call() == 1
    assert ran == ["tests.helpers.operators", "good", "tests.helpers.operators", "bad"]
    table = (tmp_path / "results" / "on_gpu.md").read_text(encoding="utf-8")
    assert "| good | works | **ok in 0 s** |  |" in table  # that of the first call
    del ran[:]
    assert call("good", "--again") == 0 and ran[1:] == ["good"]
    monkeypatch.setattr(report, "fingerprint", lambda *_: "other code")
    del ran[:]
    assert call("good") == 0 and ran[1:] == ["good"]


@pytest.mark.unit
def test_without_a_device_or_a_compiler_nothing_runs(
    ran: list[str], call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(on_gpu, "describe_machine", lambda: {**GPU, "device": "", "devices": 0})
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert call() == 2 and ran == []
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("Error: no CUDA device: ")
    assert errors[1].startswith("Error: no C++ compiler: no-such-compiler is not on PATH")
    monkeypatch.setattr(on_gpu, "describe_machine", lambda: {**GPU, "capability": [7, 5], "deepspeed": ""})
    monkeypatch.delenv("CXX")
    assert call() == 2
    error = capsys.readouterr().err
    assert "has no bf16" in error and "no deepspeed: `pip install deepspeed`" in error


@pytest.mark.unit
def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        on_gpu.main(["step-times"])
    assert stop.value.code == 2 and "unknown part step-times; one of attention, " in capsys.readouterr().err


@pytest.mark.unit
def test_what_a_part_lacks_is_said() -> None:
    part = parts.PART_LIST[0]
    assert part.skipped_because(GPU, False) is None
    assert replace(part, flash_attn=True).skipped_because(GPU, True) == "flash-attn is not installed"
    assert replace(part, liger=True).skipped_because(GPU, False) == "liger-kernel is not installed"
    assert replace(part, liger=True).skipped_because(GPU, True) is None
    lacks = replace(part, host_gib=200)
    assert lacks.skipped_because(GPU, False) == "needs 200 GiB of host memory, 120 GiB are available"
    assert lacks.skipped_because(GPU, True) is None


@pytest.mark.unit
def test_the_code_and_the_machine_are_in_the_fingerprint() -> None:
    first = report.fingerprint(GPU, False)
    assert first == report.fingerprint(GPU, False)
    assert len({first, report.fingerprint(GPU, True), report.fingerprint({**GPU, "torch": "2.12"}, False)}) == 3


@pytest.mark.unit
def test_results_of_cases_that_are_not_measured_again_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "offload_speed.json"
    assert kept(path, ["wide"]) == []
    cases = [{"case": "wide 512"}, {"case": "wide"}, {"case": "small-groups"}]
    path.write_text(json.dumps({"cases": cases}))
    assert kept(path, ["wide"]) == [{"case": "small-groups"}]


@pytest.mark.unit
def test_statistics_are_those_of_the_measured_steps() -> None:
    before = {"steps": 3, "wait_s": 1.0, "commit_wait_s": 0.25, "busy_s": {"ready": 0.5}}
    after = {"steps": 7, "wait_s": 1.5, "commit_wait_s": 0.25, "busy_s": {"ready": 0.5, "stepped": 2.0}}
    grown = growth(before, after)
    assert grown == {"steps": 4, "wait_s": 0.5, "commit_wait_s": 0.0, "busy_s": {"ready": 0.0, "stepped": 2.0}}
    assert added(grown, {**grown, "busy_s": {"ready": 1.0, "stepped": 1.0}})["busy_s"] == {"ready": 1.0, "stepped": 3.0}
    (row,) = parts.exposed_rows("here", grown)
    assert row.value == "125.0 ms in step(), 0.0 ms for commits"
    assert row.compare == "optimizer process busy: stepped 500.0 ms"


@pytest.mark.unit
def test_memory_is_compared_with_a_budget() -> None:
    case = {"shape": {"batch": 1, "length": 8192, "hidden": 3072, "sub_group": 400_000_000}}
    peaks = {"peak_device_bytes": 18 * 2**30, "peak_host_bytes": 80 * 2**30}
    row = parts.memory_row("ours", peaks, 3_200_000_000, 28, case)
    assert row.value == "device 18.00 GiB, host 80.00 GiB"
    assert row.compare == "device within the budget of 18.1 GiB; host **above** the budget of 61.6 GiB"


class Stop(Exception):
    """Ends a part at its first command."""


@pytest.mark.unit
@pytest.mark.parametrize("part", parts.PART_LIST, ids=lambda part: part.name)
def test_the_first_command_on_a_device_has_known_flags(
    part: parts.Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[tuple[str, ...]] = []

    def record(self: Bench, *command: str, env: Any = None) -> str:
        if "write" not in command and "tests.benchmarks.gpu.models" not in command:
            commands.append(command)
            raise Stop
        return ""

    monkeypatch.setattr(Bench, "run", record)
    (tmp_path / "tiny").mkdir()
    with pytest.raises(Stop):
        part.run(replace(make_bench(tmp_path), rehearse=False))
    (command,) = commands
    (script,) = [w for w in command if w.endswith("finetune_zero3.py") or w.startswith("tests/benchmarks/")] or [
        "pytest"
    ]
    if script.endswith("finetune_zero3.py"):
        assert cli.parse(list(command[command.index(script) + 1 :])).output.output_dir.startswith(str(tmp_path))
    elif script == "pytest":
        assert all((REPOSITORY / word).exists() for word in command if word.startswith("tests/"))
    else:
        known = (REPOSITORY / script).read_text(encoding="utf-8")
        assert [word for word in command if word.startswith("--") and f'"{word}"' not in known] == []
        assert "--rehearse" not in command


def outcome(out: Path, losses: list[float], weights: bytes) -> Outcome:
    """Write what a run leaves behind; its last step is step 4."""
    (out / "model_step4").mkdir(parents=True)
    (out / "model_step4" / "model.safetensors").write_bytes(weights)
    first = 5 - len(losses)
    lines = [{"step": first + i, "loss": loss, "step_time_s": time.monotonic()} for i, loss in enumerate(losses)]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return Outcome(out=out, text="", summary={})


@pytest.mark.unit
def test_two_runs_are_compared_in_numbers_and_weights(tmp_path: Path) -> None:
    whole = outcome(tmp_path / "whole", [4.0, 3.0, 2.0, 1.0], b"weights")
    assert parts.differences(whole, outcome(tmp_path / "same", [4.0, 3.0, 2.0, 1.0], b"weights")) == []
    assert parts.differences(whole, outcome(tmp_path / "resumed", [2.0, 1.0], b"weights")) == []
    found = parts.differences(whole, outcome(tmp_path / "other", [2.0, 1.5], b"Weights"))
    assert len(found) == 2 and found[0].startswith("step 4: ") and found[1] == "the exported weights"


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_program_that_fails_or_takes_too_long_ends_the_part(tmp_path: Path) -> None:
    with pytest.raises(PartError, match=r"(?s)^-c ended with status 3; see .*part.log\nlast words$"):
        make_bench(tmp_path).run("-c", "print('last words'); raise SystemExit(3)")
    spawn = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    with pytest.raises(PartError, match="took too long") as stop:
        make_bench(tmp_path, limit_s=3).run("-c", f"{spawn}; print('child', p.pid, flush=True); time.sleep(99)")
    child = int(str(stop.value).rpartition("child ")[2])
    deadline = time.monotonic() + 30
    while is_running(child):  # until the signal has arrived
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_flash_attn_can_be_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site" / "flash_attn").mkdir(parents=True)
    (tmp_path / "site" / "flash_attn" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    bench = make_bench(tmp_path)
    look = "import importlib.util; print(importlib.util.find_spec('flash_attn') is None)"
    assert bench.run("-c", look).strip() == "False"
    assert bench.run("-c", look, env=bench.without_flash_attn()).strip() == "True"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_part_can_be_rehearsed(tmp_path: Path) -> None:
    script = str(REPOSITORY / "tests/benchmarks/on_gpu.sh")
    command = ["bash", script, "--rehearse", "--part-limit-s", "1800", "--work", str(tmp_path)]
    done = run(command, timeout_s=2300, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "on_gpu.json").read_text(encoding="utf-8"))
    assert [part["name"] for part in found["parts"]] == [part.name for part in parts.PART_LIST]
    flash_attn = found["machine"]["flash_attn"]
    for part in found["parts"]:
        skips = part["name"] == "train-flash-attn" and not flash_attn
        assert part["result"] == ("skipped" if skips else "ok"), part["why"]
        assert bool(part["rows"]) != skips
    assert (tmp_path / "on_gpu.md").read_text(encoding="utf-8") in done.stdout
