"""Runs in which memory runs out: what is said, the exit status, the checkpoint, and the other ranks."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superoffload import distributed
from superoffload.errors import UserError
from superoffload.offload.trainer.process import OptimizerProcess, OptimizerProcessError
from superoffload.planning import exhaustion
from superoffload.planning.exhaustion import DEVICE, EITHER, HOST, PROBABLY_HOST
from tests.helpers.ranks import REPOSITORY, free_port, run
from tests.helpers.runs import make_checkpoint

# Trains as finetune_zero3.py does, but in its third step memory runs out on one rank: WHERE is that rank and `device`
# (torch's own error, raised by hand) or `host` (a limit of the system, and an allocation that exceeds it).
PROGRAM = f"""
import os, resource, sys
sys.path.insert(0, {str(REPOSITORY)!r})
import finetune_zero3
from superoffload import cli
step = finetune_zero3.train_step

def run_out(run, micro_batches):
    rank, where = os.environ["WHERE"].split()
    if run.progress.step == 2 and os.environ["RANK"] == rank:
        import torch
        if where == "device":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has none. More words.")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
        torch.empty(2**30)
    return step(run, micro_batches)

finetune_zero3.train_step = run_out
cli.run(finetune_zero3.main)
"""


@pytest.mark.parametrize(
    ("ranks", "where", "words"),
    [
        pytest.param(1, "0 device", "device memory ran out (tried to allocate 2.00 GiB)", marks=pytest.mark.slow),
        pytest.param(1, "0 host", "host memory ran out (tried to allocate 4294967296 bytes)", marks=pytest.mark.slow),
        pytest.param(2, "0 host", "host memory ran out (tried to allocate 4294967296 bytes)", marks=pytest.mark.slow),
        (2, "1 device", "device memory ran out (tried to allocate 2.00 GiB)"),
    ],
)
def test_a_run_out_of_memory(
    ranks: int, where: str, words: str, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    out = tmp_path / "out"
    result = run(
        ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), str(tmp_path / "program.py"),
         "--model_name", str(model_folder), "--dataset_name", str(rows_file), "--output_dir", str(out),
         "--max_length", "128", "--save_steps", "1", "--keep_checkpoints", "1"],
        WHERE=where,
    )  # fmt: skip
    assert result.returncode == 4, result.stderr[-4000:]
    errors = [line for line in result.stderr.splitlines() if "Error: " in line and "default_pg" not in line]
    (line,) = errors
    rank = where[0]
    assert line.startswith(f"{'' if rank == '0' else f'[rank {rank}] '}Error: {words}")
    assert "; use --" in line or "; no two flags save a tenth of what was planned; " in line  # of so small a model
    assert f"the last complete checkpoint is {out / 'global_step2'} (step 2)" in line
    assert json.loads((out / "global_step2" / "manifest.json").read_text())["progress"]["step"] == 2
    assert "Traceback" not in result.stderr
    for text in (
        "The plan was:",
        "One machine's host memory, GiB",
        "In use at that moment:",
        f"  rank {ranks - 1}, process ",
    ):
        assert text in result.stderr


@pytest.mark.unit
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), DEVICE),
        (MemoryError(), HOST),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), HOST),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                      "you tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"), HOST),
        (RuntimeError("unable to mmap 4096 bytes from file <f>: Cannot allocate memory (12)"), HOST),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), EITHER),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), EITHER),
        (OptimizerProcessError("the SuperOffload optimizer process (pid 1) failed in STEP (MemoryError())."), HOST),
        (OptimizerProcessError("the SuperOffload optimizer process (pid 1) exited with status 1"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)  # fmt: skip
def test_which_memory_an_error_means(error: BaseException, expected: str | None) -> None:
    assert exhaustion.kind(error) == expected


@pytest.mark.unit
@pytest.mark.parametrize(
    ("status", "expected"), [(-9, PROBABLY_HOST), (-7, PROBABLY_HOST), (-11, None), (1, None), (None, None)]
)
def test_an_optimizer_process_that_was_killed_means_host_memory(
    status: int | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    process: Any = object.__new__(OptimizerProcess)
    process._child = SimpleNamespace(pid=1, poll=lambda: status)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("time.monotonic", iter(range(9)).__next__)
    assert exhaustion.kind(process._death("waiting")) == expected


@pytest.mark.unit
def test_what_torch_holds_on_a_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "device", lambda: SimpleNamespace(type="cuda"))
    for number, name in enumerate(("memory_allocated", "max_memory_allocated", "memory_reserved"), 1):
        monkeypatch.setattr(torch.cuda, name, lambda number=number: number * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 80 * 2**30))
    expected = (
        "  device: allocated 1.00 GiB, allocated at the most 2.00 GiB, reserved by torch 3.00 GiB, free 0.50 GiB, "
        "in all 80.00 GiB"
    )
    assert expected in exhaustion.measured()

    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    found = exhaustion.measured()
    assert not any(line.startswith("  device: ") for line in found)
    assert any(line.startswith("  host: available ") for line in found)


@pytest.mark.unit
def test_torch_itself_says_what_the_host_lacks() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**58, dtype=torch.uint8)
    assert exhaustion.kind(caught.value) == HOST


@pytest.mark.unit
def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, exhaustion.explained(None, str(tmp_path)):
        raise error
    assert caught.value is error


@pytest.mark.unit
def test_an_error_of_the_user_stays_unless_memory_is_its_cause(tmp_path: Path) -> None:
    def fail(cause: Exception | None) -> None:
        with exhaustion.explained(None, str(tmp_path)):
            raise UserError("--model_name m: no such file") from cause

    for other in (None, OSError(errno.ENOENT, "No such file or directory")):
        with pytest.raises(UserError, match="^--model_name m: no such file$") as caught:
            fail(other)
        assert caught.value.status == 2
    with pytest.raises(exhaustion.MemoryRanOut, match="^host memory ran out") as ran_out:
        fail(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert ran_out.value.status == 4


@pytest.mark.unit
def test_a_rank_that_loses_another_waits_to_be_ended_and_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="another rank has ended; see its error") as caught:
        with exhaustion.explained(None, str(tmp_path)):
            raise RuntimeError("[../third_party/gloo/x.cc:525] Connection closed by peer [127.0.0.1]:1234")
    assert waited == [5.0]
    assert caught.value.status == 2
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not distributed.lost_another_rank(RuntimeError("Connection closed by peer"))


@pytest.mark.unit
def test_the_last_checkpoint_is_named(tmp_path: Path) -> None:
    assert exhaustion.last_checkpoint(str(tmp_path)) == "there is no checkpoint to resume from"
    make_checkpoint(tmp_path, 3, 1.0)
    folder = make_checkpoint(tmp_path, 6, 2.0)
    assert f"{folder} (step 6)" in exhaustion.last_checkpoint(str(tmp_path))
