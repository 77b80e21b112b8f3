"""The arithmetic on one sub-group: a speculation equals the step that follows, and chunks change nothing."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder

from superoffload.offload.shared.messages import AdamHyper, Task, TaskKind
from superoffload.offload.shared.state import SubGroupState
from superoffload.offload.worker import fused
from superoffload.offload.worker.adam import _SAMPLE_TASK, SubGroupAdam, Threads, _sample
from tests.helpers.ranks import REPOSITORY

HYPER = AdamHyper(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)


def state(numel: int, master: torch.dtype, weights: torch.dtype) -> SubGroupState:
    generator = torch.Generator().manual_seed(numel)
    parameters, gradients, exp_avg, exp_avg_sq = (torch.rand(numel, generator=generator) for _ in range(4))
    return SubGroupState(
        parameters=parameters.to(master),
        gradients=(gradients - 0.5).to(master),
        exp_avg=exp_avg - 0.5,
        exp_avg_sq=exp_avg_sq,
        staging=torch.zeros(numel, dtype=weights),
    )


def task(kind: TaskKind, factor: float) -> Task:
    return Task(kind=kind, step=4, hyper=HYPER, factor=factor)


@pytest.mark.parametrize("numel", [1, 15, 1024, 1025, 5000])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize(("master", "weights"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float32)])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_a_speculation_equals_the_step(
    numel: int, factor: float, master: torch.dtype, weights: torch.dtype, adamw_mode: bool
) -> None:
    op = CPUAdamBuilder().load()
    chunked = SubGroupAdam(op, adamw_mode=adamw_mode, chunk_numel=1024)
    before, speculated, stepped, committed, whole = (state(numel, master, weights) for _ in range(5))
    assert chunked.speculate(task(TaskKind.SPECULATE, factor), speculated, lambda: False)
    for name in ("parameters", "gradients", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(speculated, name), getattr(before, name)), name
    chunked.step(task(TaskKind.STEP, factor), stepped, stage=True)
    chunked.step(task(TaskKind.COMMIT, factor), committed, stage=False)
    SubGroupAdam(op, adamw_mode=adamw_mode, chunk_numel=1 << 20).step(task(TaskKind.STEP, factor), whole, stage=True)
    assert torch.equal(speculated.staging, stepped.staging)
    assert torch.equal(stepped.staging, stepped.parameters.to(weights))
    assert committed.staging.eq(0).all()
    for field in fields(SubGroupState):
        assert torch.equal(getattr(stepped, field.name), getattr(whole, field.name)), field.name
        if field.name != "staging":
            assert torch.equal(getattr(stepped, field.name), getattr(committed, field.name)), field.name


def test_an_abandoned_speculation_returns_false() -> None:
    adam = SubGroupAdam(CPUAdamBuilder().load(), adamw_mode=True, chunk_numel=1024)
    where = state(5000, torch.float32, torch.bfloat16)
    answers = iter([False, False, True])
    assert not adam.speculate(task(TaskKind.SPECULATE, 1.0), where, lambda: next(answers))
    assert not list(answers)


@pytest.fixture(scope="module")
def kernel() -> str:
    path = fused.build()
    assert path is not None
    return path


def kernels(path: str, adamw_mode: bool) -> list[fused.FusedAdam]:
    return [fused.FusedAdam(path, adamw_mode=adamw_mode, arithmetic=a) for a in fused.Arithmetic]


@pytest.mark.parametrize("numel", [1, 16, 1000, 5000])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_the_fused_kernel_gives_the_same_bits(
    numel: int, factor: float, weight_decay: float, adamw_mode: bool, kernel: str
) -> None:
    op = CPUAdamBuilder().load()
    plain, adam = (SubGroupAdam(op, adamw_mode=adamw_mode, chunk_numel=1024) for _ in range(2))
    assert adam.adopt(*kernels(kernel, adamw_mode))
    where = state(numel, torch.float32, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 60):
        hyper = replace(HYPER, lr=1e-3 * step, weight_decay=weight_decay, bias_correction=step % 7 != 0)
        asked = Task(kind=TaskKind.SPECULATE, step=step, anchor_step=0 if step < 40 else 40, hyper=hyper, factor=factor)
        where.gradients.copy_(torch.randn(numel, generator=generator))
        staging = []
        for one in (plain, adam):
            where.staging.zero_()
            assert one.speculate(asked, where, lambda: False)
            staging.append(where.staging.clone())
        assert torch.equal(*staging)
        adam.step(replace(asked, kind=TaskKind.COMMIT), where, stage=False)
        assert torch.equal(staging[0], where.parameters.to(torch.bfloat16))


@pytest.mark.parametrize("numel", [1, 16, 1000, 5000])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("stage", [True, False])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_a_fused_step_leaves_the_state_that_the_op_leaves(
    numel: int, factor: float, stage: bool, adamw_mode: bool, kernel: str
) -> None:
    op = CPUAdamBuilder().load()
    plain, adam = (SubGroupAdam(op, adamw_mode=adamw_mode, chunk_numel=1024) for _ in range(2))
    assert adam.adopt(*kernels(kernel, adamw_mode))
    stepped, expected = (state(numel, torch.float32, torch.bfloat16) for _ in range(2))
    asked = task(TaskKind.STEP, factor)
    plain.step(asked, expected, stage=stage)
    with mock.patch.object(SubGroupAdam, "_update", autospec=True, side_effect=SubGroupAdam._update) as update:
        adam.step(asked, stepped, stage=stage)
    assert update.call_count == (numel % 16 > 0)  # the op computes the remainder alone
    for field in fields(SubGroupState):
        assert torch.equal(getattr(stepped, field.name), getattr(expected, field.name)), field.name


def test_steps_in_which_the_kernel_computes_all_leave_the_running_products_right(kernel: str) -> None:
    op = CPUAdamBuilder().load()
    adam = SubGroupAdam(op, adamw_mode=True, chunk_numel=1024)
    assert adam.adopt(*kernels(kernel, adamw_mode=True))
    whole, rest, expected = (state(numel, torch.float32, torch.bfloat16) for numel in (64, 5, 5))
    for step in range(1, 8):
        asked = replace(task(TaskKind.STEP, 1.0), step=step, anchor_step=0)
        adam.step(asked, whole, stage=True)
        if step > 4:  # until now, the op has computed nothing
            adam.step(asked, rest, stage=True)
    fresh = SubGroupAdam(op, adamw_mode=True, chunk_numel=1024)
    for step in range(5, 8):
        fresh.step(replace(task(TaskKind.STEP, 1.0), step=step, anchor_step=0), expected, stage=True)
    assert all(torch.equal(getattr(rest, field.name), getattr(expected, field.name)) for field in fields(SubGroupState))


def test_a_step_uses_all_threads_while_the_trainer_waits() -> None:
    before = torch.get_num_threads()
    threads = Threads(beside_trainer=1, while_trainer_waits=2)
    adam = SubGroupAdam(CPUAdamBuilder().load(), adamw_mode=True, chunk_numel=1024, threads=threads)
    where, used = state(64, torch.float32, torch.bfloat16), []
    try:
        for compute in (
            lambda: adam.speculate(task(TaskKind.SPECULATE, 1.0), where, lambda: False),
            lambda: adam.step(task(TaskKind.STEP, 1.0), where, stage=True),
            lambda: adam.step(task(TaskKind.COMMIT, 1.0), where, stage=False),
        ):
            compute()
            used.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert used == [1, 2, 1]


def test_a_kernel_with_different_results_is_not_adopted(kernel: str) -> None:
    adam = SubGroupAdam(CPUAdamBuilder().load(), adamw_mode=True, chunk_numel=1024)
    assert not adam.adopt(*kernels(kernel, adamw_mode=False))
    where, plain = state(64, torch.float32, torch.bfloat16), state(64, torch.float32, torch.bfloat16)
    adam.speculate(task(TaskKind.SPECULATE, 1.0), where, lambda: False)
    adam.step(task(TaskKind.STEP, 1.0), plain, stage=True)
    assert torch.equal(where.staging, plain.staging)


class SveOp:
    """A stand-in for the compiled op: DeepSpeed's source of its SVE loop, without an SVE processor."""

    def __init__(self, folder: Path) -> None:
        source = REPOSITORY / "tests/helpers/sve/update.cpp"
        includes = [source.parent, Path(deepspeed.__file__).parent / "ops/csrc/includes"]
        built = folder / "update.so"
        command: list[str | Path] = [
            "c++",
            "-O2",
            "-std=c++17",
            "-march=native",
            "-ffp-contract=off",
            "-shared",
            "-fPIC",
            "-o",
            built,
        ]
        subprocess.run([*command, *(f"-I{folder}" for folder in includes), source], check=True)
        self._update = ctypes.CDLL(str(built)).update
        self._update.restype = None
        self._adamw_mode = True

    def create_adam(self, optimizer: int, *defaults: float) -> None:
        self._adamw_mode = bool(defaults[5])

    def adam_update(self, optimizer: int, step: int, *arguments: Any) -> None:
        *floats, bias_correction, parameters, gradients, exp_avg, exp_avg_sq = arguments
        tensors = (parameters, gradients, exp_avg, exp_avg_sq)
        self._update(
            ctypes.c_int64(step), *map(ctypes.c_float, floats), bias_correction, self._adamw_mode,
            ctypes.c_int64(parameters.numel()), *(ctypes.c_void_p(t.data_ptr()) for t in tensors),
        )  # fmt: skip


@pytest.fixture(scope="module")
def sve_op(tmp_path_factory: pytest.TempPathFactory) -> SveOp:
    return SveOp(tmp_path_factory.mktemp("sve"))


@pytest.mark.parametrize("numel", [1, 1000, 5000])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("adamw_mode", [True, False])
def test_the_fused_kernel_gives_the_bits_of_the_sve_loop(
    numel: int, factor: float, weight_decay: float, adamw_mode: bool, kernel: str, sve_op: SveOp
) -> None:
    adam = SubGroupAdam(sve_op, adamw_mode=adamw_mode, chunk_numel=1024)
    avx, sve = kernels(kernel, adamw_mode)
    assert not adam.adopt(avx)
    assert adam.adopt(avx, sve)
    where, stepped = (state(numel, torch.float32, torch.bfloat16) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 20):
        hyper = replace(HYPER, lr=1e-3 * step, weight_decay=weight_decay, bias_correction=step % 7 != 0)
        asked = Task(kind=TaskKind.SPECULATE, step=step, hyper=hyper, factor=factor)
        for one in (where, stepped):
            one.gradients.copy_(torch.randn(numel, generator=generator.manual_seed(step)))
        assert adam.speculate(asked, where, lambda: False)
        written = sve.step(asked, stepped, stage=False)
        adam.step(replace(asked, kind=TaskKind.COMMIT), where, stage=False)
        assert torch.equal(where.staging, where.parameters.to(torch.bfloat16))
        for name in ("parameters", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(stepped, name)[:written], getattr(where, name)[:written]), (step, name)
            getattr(stepped, name).copy_(getattr(where, name))


def test_the_other_arithmetic_is_told_apart_by_the_state_and_not_by_the_weights_in_bf16(kernel: str) -> None:
    adam = SubGroupAdam(CPUAdamBuilder().load(), adamw_mode=True, chunk_numel=1024)
    _, sve = kernels(kernel, adamw_mode=True)
    speculated, stepped, expected = (_sample() for _ in range(3))
    sve.speculate(_SAMPLE_TASK, speculated, slice(0, 4096))
    sve.step(_SAMPLE_TASK, stepped, stage=False)
    adam.step(_SAMPLE_TASK, expected, stage=True)
    assert torch.equal(speculated.staging[:4096], expected.staging[:4096])
    assert stepped.exp_avg[:4096].ne(expected.exp_avg[:4096]).float().mean() > 0.1
    assert not adam.adopt(sve)


def test_a_kernel_that_does_not_compile_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fused, "FUSED", "superoffload_fused_broken")
    monkeypatch.setattr(fused, "_FLAGS", ["-no-such-flag"])
    assert fused.build() is None
    assert "The fused kernel cannot be compiled" in caplog.text
