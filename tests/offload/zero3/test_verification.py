"""The check of the first steps: what it compares, what it notices, and that it notices nothing in a sound run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam

from superoffload.offload.settings import OffloadSettings, VerificationError
from superoffload.offload.shared.messages import AdamHyper, Task, TaskKind
from superoffload.offload.shared.state import SubGroupState
from superoffload.offload.zero3.verification import Verification

NUMEL = 6 * 1024 + 100
TASK = Task(
    kind=TaskKind.STEP,
    step=1,
    hyper=AdamHyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1),
    factor=0.5,
)


class Steps:
    """One sub-group that is stepped as the offload engine does, in one process, by the op on the whole sub-group."""

    def __init__(self, folder: Path, steps: int = 2, *, adamw_mode: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(4, NUMEL, generator=generator)
        self.state = SubGroupState(
            parameters=values[0].clone(),
            gradients=values[1].clone(),
            exp_avg=values[2].clone(),
            exp_avg_sq=values[3].square(),
            staging=torch.zeros(NUMEL, dtype=torch.bfloat16),
        )
        self.weights = torch.zeros(NUMEL, dtype=torch.bfloat16)
        self.generator = generator
        self.step = 0
        self.adam: Any = DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))], adamw_mode=adamw_mode)
        settings = OffloadSettings(verify_steps=steps, report_folder=str(folder))
        self.verification = Verification(settings)
        assert self.verification.begin({0: self.state}, self.adam) == (steps > 0)

    def backward(self) -> None:
        """Hand over new gradients, in three parameters, the last of them in bf16."""
        gradient = torch.randn(NUMEL, generator=self.generator)
        for start, stop, dtype in (
            (0, 1500, torch.float32),
            (1500, 6000, torch.float32),
            (6000, NUMEL, torch.bfloat16),
        ):
            part = gradient[start:stop].to(dtype)
            self.verification.gradient(0, start, part)
            self.state.gradients[start:stop] = part

    def decide(self) -> bool:
        self.step += 1
        self.task = replace(TASK, step=self.step)
        return self.verification.decided({0: self.task})

    def update(self) -> None:
        state, h = self.state, self.task.hyper
        state.gradients.mul_(self.task.factor)
        self.adam.ds_opt_adam.adam_update(
            *(self.adam.opt_id, self.step, h.lr, h.beta1, h.beta2, h.eps, h.weight_decay, h.bias_correction),
            *(state.parameters, state.gradients, state.exp_avg, state.exp_avg_sq),
        )
        state.staging.copy_(state.parameters)

    def upload(self) -> None:
        self.weights.copy_(self.state.staging)
        self.verification.uploaded(0, self.weights)

    def run(
        self, before_upload: Callable[[], None] = lambda: None, after_upload: Callable[[], None] = lambda: None
    ) -> None:
        """Take one step; the arguments may do harm at their moments."""
        self.backward()
        self.decide()
        self.update()
        before_upload()
        self.upload()
        after_upload()


@pytest.fixture
def steps(one_rank: None, tmp_path: Path) -> Steps:
    return Steps(tmp_path)


def test_a_sound_run_is_checked_until_the_step_after_the_last(steps: Steps, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        steps.run()
        steps.run()
        steps.backward()
        assert steps.decide() is False
    assert "The first 2 steps are verified" in caplog.text
    steps.state.gradients.add_(1)  # after the last comparison
    steps.verification.gradient(0, 0, torch.zeros(NUMEL))
    steps.verification.uploaded(0, steps.weights)


def test_every_element_is_sampled_in_a_small_sub_group_and_the_end_of_a_large_one(steps: Steps) -> None:
    blocks = steps.verification._blocks[0]
    assert len(blocks) == 5 and blocks[-1] == slice(6 * 1024, NUMEL)
    assert all(b.start % 1024 == 0 and b.stop - b.start == 1024 for b in blocks[:-1])


def harm(tensor: torch.Tensor) -> None:
    """Change the last bit of every value."""
    bits: torch.Tensor = tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)
    bits.bitwise_xor_(1)


def stale(tensor: torch.Tensor) -> None:
    tensor.zero_()


@pytest.mark.parametrize(
    ("phase", "when", "name", "how"),
    [
        ("gradient", "before_decision", "gradients", stale),
        ("gradient", "before_decision", "gradients", harm),
        ("update", "before_upload", "staging", harm),
        ("update", "before_upload", "staging", stale),
        ("hold", "before_upload", "gradients", harm),
        ("upload", "after_copy", "weights", stale),
        ("commit", "after_upload", "parameters", harm),
        ("commit", "after_upload", "exp_avg", harm),
        ("commit", "after_upload", "exp_avg_sq", harm),
    ],
)
def test_a_mismatch_names_its_phase(
    steps: Steps, tmp_path: Path, phase: str, when: str, name: str, how: Callable[[torch.Tensor], None]
) -> None:
    tensor = steps.weights if name == "weights" else getattr(steps.state, name)
    steps.run()
    if when == "before_decision":
        steps.backward()
        how(tensor)
        at_fault = 2
    elif when == "after_copy":
        steps.backward()
        steps.decide()
        steps.update()
        how(tensor)
        steps.verification.uploaded(0, steps.weights)
        steps.backward()
        at_fault = 2
    else:
        steps.run(**{when: lambda: how(tensor)})
        steps.backward()
        at_fault = 2
    with pytest.raises(VerificationError) as raised:
        steps.decide()
    text = str(raised.value)
    assert text.startswith(f"SuperOffload failed the check of step {at_fault} on rank 0: sub-group 0, {phase}: ")
    assert "sampled values differ" in text and "train in zerooffload mode" in text and "\n" not in text
    report = torch.load(tmp_path / "verify_rank0.pt", weights_only=False)
    assert report["phase"] == phase and not torch.equal(report["expected"], report["found"])


def test_the_line_says_when_the_report_cannot_be_written(one_rank: None, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    steps = Steps(tmp_path / "file")
    steps.backward()
    stale(steps.state.gradients)
    with pytest.raises(VerificationError, match=r"the samples could not be written to .*file"):
        steps.decide()


def test_values_that_are_replaced_from_outside_are_not_compared(steps: Steps) -> None:
    steps.run()
    stale(steps.state.parameters)
    steps.backward()
    stale(steps.state.gradients)
    steps.verification.forget()
    assert steps.decide()


def test_a_dropped_batch_is_not_compared(steps: Steps) -> None:
    steps.backward()
    stale(steps.state.gradients)
    steps.verification.forget_gradients()
    assert steps.decide()


def test_each_engine_of_a_process_has_its_own_arithmetic(steps: Steps, tmp_path: Path) -> None:
    other = Steps(tmp_path, adamw_mode=False)
    for _ in range(2):
        steps.run()
        other.run()
    for engine in (steps, other):
        engine.backward()
        assert engine.decide() is False


def test_no_steps_on_the_cpu_unless_asked_for(one_rank: None, tmp_path: Path) -> None:
    verification = Verification(OffloadSettings())
    assert not verification.begin({}, DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(1))]))
