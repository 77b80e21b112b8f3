"""`superoffload bench`: real configurations of a tiny shape."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from superoffload import commands
from superoffload.bench.grid import STOCK
from superoffload.errors import UserError
from superoffload.training.step_parts import PARTS
from tests.helpers.ranks import REPOSITORY

TINY = ("--layers", "2", "--hidden", "64", "--vocabulary", "512", "--max_length", "128", "--batch_size", "2")
SHORT = ("--rounds", "2", "--steps", "1", "--warmup_steps", "2")


def bench(*words: str) -> Any:
    return commands.group.main(["bench", *words], prog_name="superoffload", standalone_mode=False)


def configurations(folder: Path) -> dict[str, dict[str, Any]]:
    return {one["name"]: one for one in json.loads((folder / "bench.json").read_text())["configurations"]}


def test_a_configuration_goes_through_the_code_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert bench(*TINY, *SHORT, "--out", str(tmp_path)) == 0
    (ran,) = configurations(tmp_path).values()
    assert ran["failure"] is None and ran["optimizer"] == "SharedMemorySuperOffload"
    assert (ran["attention"], ran["loss"], ran["steps"], len(ran["turns"])) == ("sdpa_varlen", "chunked", 2, 2)
    assert list(ran["parts_s"]) == [*PARTS, "rest"]
    assert all(seconds > 0 for part, seconds in ran["parts_s"].items() if part != "rest")
    for turn in ran["turns"]:
        assert 0 <= turn["step_time_s"] - sum(turn["parts"].values()) < 0.5 * turn["step_time_s"]
        assert 0 < turn["target_tokens_per_s"] < turn["tokens_per_s"]
    assert ran["peak_host_bytes"] > 2**27 and ran["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    text = (tmp_path / "bench.md").read_text()
    assert capsys.readouterr().out == text and text.startswith("# Benchmark\n")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.md", "bench.json", "bench.png"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_and_the_alternatives_in_the_same_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tmp_path / "before"
    flags = (*TINY, *SHORT, "--gpus", "2", "--no_picture")
    assert bench(*flags, "--alone", "--mode", "zerooffload", "superoffload", "--out", str(before)) == 0
    after = tmp_path / "after"
    more = ("--against", "deepspeed", "upstream-shape", "--compare", str(before / "bench.json"))
    assert bench(*flags, *more, "--out", str(after)) == 0
    found = list(configurations(after).values())
    assert [one["settings"]["mode"] for one in found] == ["superoffload", STOCK, "superoffload"]
    assert [one["optimizer"] for one in found[:2]] == ["SharedMemorySuperOffload", "SuperOffloadOptimizer_Stage3"]
    assert found[2]["settings"]["layout"] == "max_length" and found[2]["padding_share"] > 0
    text = (after / "bench.md").read_text()
    assert "DeepSpeed's SuperOffload requires CUDA" in text and "taking turns" in text
    assert "zerooffload: only in the benchmark before" in text and "The machine's bf16 matrix product" in text
    assert "one configuration after the other (--alone)" in (before / "bench.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_with_its_weights_is_measured_on_the_rows_of_a_data_set(
    tmp_path: Path, model_folder: Path, rows_file: Path
) -> None:
    """Two configurations take turns; those that fail are named, and their logs are kept."""
    model = ("--model_name", str(model_folder), "--dataset_name", str(rows_file), "--max_length", "64")
    kernels = ("--attn_implementation", "auto", "flash_attention_2")
    grid = ("--layout", "packed", "padded", "--activation_checkpointing", "offload", "--tiled_mlp", "2", *kernels)
    assert bench(*model, *grid, *SHORT, "--no_picture", "--out", str(tmp_path)) == 1
    packed, failed, padded, _ = configurations(tmp_path).values()
    assert failed["failure"].startswith("--attn_implementation flash_attention_2: the package flash-attn")
    assert {path.name for path in tmp_path.glob("*.log")} == {"configuration_2.log", "configuration_4.log"}
    assert packed["settings"]["activation_checkpointing"] == "offload" and padded["settings"]["layout"] == "padded"
    assert packed["settings"]["tiled_mlp"] == 2
    assert packed["hardware_tflops_per_gpu"]["median"] > packed["tflops_per_gpu"]["median"]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["rows"] == str(rows_file) and not report["model"]["random_weights"]


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_prints_what_there_is(tmp_path: Path) -> None:
    """Started from another folder than the repository."""
    words = ["bench", *TINY, "--rounds", "1000", "--steps", "1", "--warmup_steps", "1", "--out", "out", "--no_picture"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-m", "superoffload.commands", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert process.stdout and process.stderr
    started = []
    for line in process.stderr:
        if line.startswith("round 2 "):
            started = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            break
    text, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert text.endswith("* Interrupted: this is what had been measured by then.\n") and "| superoffload |" in text
    assert (tmp_path / "out" / "bench.md").read_text() == text
    assert len(started) >= 3 and psutil.wait_procs(started, timeout=10)[1] == []


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "--model_name: no model is given"),
        (("--shape", "llama-8b", "--layers", "2"), "--shape and --layers: give only one model"),
        (("--shape", "llama-9b"), "--shape llama-9b: not a known shape; .* llama-1b, llama-3b"),
        (("--layers", "2"), "--layers: a shape by hand needs at least --layers and --hidden"),
        (("--layers", "2", "--hidden", "60", "--heads", "7"), "--heads 7: must divide --hidden 60"),
        (
            ("--shape", "llama-1b", "--dataset_name", "rows.jsonl"),
            "--dataset_name rows.jsonl: its rows need a tokenizer",
        ),
        ((*TINY, "--max_length", "4"), "--max_length 4: must be 8 <= value"),
        ((*TINY, "--batch_size", "0", "1"), "--batch_size 0: must be 1 <= value"),
        ((*TINY, "--compare", "missing.json"), "--compare missing.json: cannot be read"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("superoffload.planning.machine.look", lambda **_: Machine())
    with pytest.raises(UserError, match=expected):
        bench(*words)


class Machine:
    """A machine without devices."""

    devices = ()


@pytest.mark.unit
def test_another_file_than_a_report_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="not the bench.json of a benchmark"):
        bench(*TINY, "--compare", str(path))


@pytest.mark.unit
def test_without_matplotlib_the_picture_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--out: the picture needs matplotlib"):
        bench(*TINY, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.unit
def test_a_folder_that_takes_no_file_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match=r"--out /proc/self: cannot be written \(No such file or directory\)"):
        bench(*TINY, "--no_picture", "--out", "/proc/self")


@pytest.mark.unit
def test_a_package_without_the_program_cannot_be_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("superoffload.commands.bench.REPOSITORY", tmp_path)
    with pytest.raises(UserError, match=r"finetune_zero3.py, which is not installed; run `pip install -e \.`"):
        bench(*TINY)
