"""Run the whole program, on one rank and on two, under the real launcher where that matters."""

import json
import math
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.forked import launch
from tests.helpers.ranks import REPOSITORY, free_port, run
from tests.helpers.ranks import launch as launch_with_deepspeed

KEYS = ["step", "epoch", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "target_tokens_per_s",
        "padding_share", "tflops_per_gpu", "hardware_tflops_per_gpu", "host_bytes", "host_total_bytes"]  # fmt: skip
PARTS = {"data_s", "forward_s", "loss_s", "backward_s", "optimizer_s"}  # and the upload, if it took time
LINE = re.compile(
    r"^\S+ \S+ INFO Step (\d+) \| Loss: [\d.]+ \| LR: [\d.e+-]+ \| Grad norm: [\d.]+ \| Time: \d+ms \| "
    r"TFLOPS/GPU: [\d.]+ \| Tokens/s: \d+ \| Target tokens/s: \d+$",
    re.MULTILINE,
)


def checkpoint_files(ranks: int) -> set[str]:
    return (
        {f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)}
        | {f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)}
        | {"manifest.json"}
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_whole_run(ranks: int, model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("Say <b>one</b> thing.\n")
    start = launch_with_deepspeed if ranks == 2 else launch
    result = start(
        ranks, "--model_name", str(model_folder), "--dataset_name", str(rows_file), "--output_dir", str(out),
        "--max_length", "128", "--batch_size", "2", "--gradient_accumulation_steps", "2", "--lr", "5e-3",
        "--num_train_epochs", "2", "--warmup", "0.1", "--save_checkpoint", "--activation_checkpointing",
        "--warmup_steps", "2", "--export", "--sample_prompts", str(tmp_path / "prompts.txt"), "--eval_steps", "10",
        "--use_wandb", "--wandb_project", "test",
        WANDB_MODE="offline", WANDB_DIR=str(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "lr_scheduler.step()" not in result.stderr  # torch would warn that it runs ahead of the optimizer
    steps = 2 * math.ceil(40 / (4 * ranks))

    tag = f"global_step{steps}"
    assert set(os.listdir(out)) == {
        tag, f"model_step{steps}", "config.json", "config.yaml", "generation_config.json", "latest", "metrics.jsonl",
        "report.html", "run.json", "run.log", "samples.jsonl", "special_tokens_map.json",
        "summary.json", "tokenizer.json", "tokenizer_config.json", "zero_to_fp32.py", "zero_to_torch.py",
    }  # fmt: skip
    assert set(os.listdir(out / tag)) == checkpoint_files(ranks)
    assert (out / "latest").read_text() == tag

    exported = set(os.listdir(out / f"model_step{steps}"))
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= exported

    logged = metrics(out)
    assert [[key for key in line if key not in {*PARTS, "upload_s"}] for line in logged] == [KEYS] * steps
    assert all(line.keys() >= PARTS for line in logged)
    assert [line["step"] for line in logged] == list(range(1, steps + 1))
    assert logged[-1]["loss"] < logged[0]["loss"] - 1
    assert logged[-1]["epoch"] == pytest.approx(2 - 2 / steps + 2 / steps)
    assert [int(step) for step in LINE.findall(result.stderr)] == list(range(1, steps + 1))  # each line once

    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["measured_steps"]) == (steps, steps - 2)
    assert summary["checkpoint"] == str(out / tag)
    assert summary["final_loss"] == logged[-1]["loss"]
    assert f"Checkpoint saved in {out / tag}" in result.stderr
    exported_line, report_line = [line for line in result.stderr.splitlines() if " INFO " in line][-2:]
    assert f"Exported {out / tag} to {out / f'model_step{steps}'}" in exported_line
    assert report_line.endswith(f"Report: {out / 'report.html'}")
    assert (summary["stopped_by"], summary["ended_at"] > 1.7e9) == (None, True)
    assert list(tmp_path.glob("wandb/offline-run-*")) != []

    recorded = json.loads((out / "run.json").read_text())
    assert (recorded["ranks"], recorded["total_steps"], recorded["data"]["rows"]) == (ranks, steps, 40)
    assert recorded["environment"]["packages"].keys() >= {"Python", "torch", "deepspeed"}
    assert recorded["model"]["parameters"] > 0 and recorded["planned_memory"]["host_bytes"] > 0
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == list(range(10, steps + 1, 10))
    assert all(line["prompts"] == ["Say <b>one</b> thing."] and len(line["answers"]) == 1 for line in samples)
    page = (out / "report.html").read_text()
    assert f"Finished after {steps} of {steps} steps" in page
    assert "Say &lt;b&gt;one&lt;/b&gt; thing." in page and "Host memory" in page and "Lengths of rows" in page


def test_a_failed_save_is_logged_and_sets_the_exit_status(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    (tmp_path / "latest.partial").mkdir()
    flags = ["--model_name", str(model_folder), "--dataset_name", str(rows_file), "--output_dir", str(tmp_path),
             "--max_length", "128", "--max_steps", "2", "--save_checkpoint"]  # fmt: skip
    strict = launch(2, *flags, "--fail_on_checkpoint_error")
    assert strict.returncode == 3
    assert "NO CHECKPOINT WAS SAVED" in strict.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["checkpoint"] is None
    assert not (tmp_path / "latest").exists()
    lenient = launch(1, *flags)
    assert lenient.returncode == 0
    assert "NO CHECKPOINT WAS SAVED" in lenient.stderr


def test_a_benchmark_stops_early_and_keeps_the_schedule(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    result = launch(
        1, "--model_name", str(model_folder), "--dataset_name", str(rows_file), "--output_dir", str(tmp_path),
        "--max_length", "128", "--batch_size", "4", "--bench_steps", "4", "--log_interval", "3", "--warmup", "0",
        "--lr_scheduler", "linear", "--lr", "1e-3", "--warmup_steps", "20", "--deterministic",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    logged = metrics(tmp_path)
    assert [line["step"] for line in logged] == [3, 4]
    assert [line["lr"] for line in logged] == pytest.approx([8e-4, 7e-4])  # of ten steps
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["measured_steps"] == 2
    assert "measured over the last half" in summary["note"]
    assert summary["checkpoint"] is None
    assert "--save_checkpoint was not given" in result.stderr
    assert not (tmp_path / "latest").exists()


def start_node(rank: int, port: int, flags: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    recipe = folder / "scripts" / "finetune_small_1gpu.sh"
    return run(
        ["bash", str(recipe), "zerooffload", "4", *flags], cwd=folder, OUTPUT_DIR=str(folder / "out"),
        NUM_NODES="2", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


@pytest.mark.slow
def test_two_nodes_without_ssh(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """Start a recipe on each of two nodes, here two launchers on the loopback interface."""
    (tmp_path / "scripts").mkdir()
    launcher = REPOSITORY / "scripts" / "_launch.sh"
    text = (REPOSITORY / "scripts" / "finetune_llama-8b_1gpu.sh").read_text()
    text = text.replace("meta-llama/Llama-3.1-8B", str(model_folder)).replace("tatsu-lab/alpaca", str(rows_file))
    text = text.replace('"$(dirname "${BASH_SOURCE[0]}")/_launch.sh"', f'"{launcher}"')
    (tmp_path / "scripts" / "finetune_small_1gpu.sh").write_text(text)
    port = free_port()
    flags = ["--max_steps", "2", "--no_packing", "--save_checkpoint"]
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(start_node, rank, port, flags, tmp_path) for rank in range(2)]
        first, second = [node.result() for node in nodes]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr[-2000:] + second.stderr[-2000:]
    assert "Finished after 2 steps" in first.stderr
    assert "Finished" not in second.stderr
    assert set(os.listdir(tmp_path / "out" / "global_step2")) == checkpoint_files(2)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        pytest.param(
            ["--model_name", "no/such-model"],
            "--model_name no/such-model: not a local path, and the hub cannot be reached",
            marks=pytest.mark.slow,
        ),
        (["--dataset_name", "./none.json"], "--dataset_name ./none.json: no such file or folder"),
        (
            ["--dataset_name", "./none.json", "--sample_prompts", "./no.txt"],
            "--sample_prompts ./no.txt: cannot be read",
        ),
        (["--output_dir", "/proc/none/at/all"], "--output_dir /proc/none/at/all: cannot be written"),
    ],
)
def test_a_mistake_is_one_line_on_rank_0(
    flags: list[str], text: str, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    good = ["--model_name", str(model_folder), "--dataset_name", str(rows_file), "--output_dir", str(tmp_path)]
    if "--model_name" in flags:  # the hub's address is read on import
        hub = f"http://127.0.0.1:{free_port()}"  # which cannot be reached
        result = launch_with_deepspeed(2, *good, *flags, HF_ENDPOINT=hub, NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="0")
    else:
        result = launch(2, *good, *flags)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if "Error" in line]
    assert line.startswith(f"Error: {text}")
    assert "Traceback" not in result.stderr
