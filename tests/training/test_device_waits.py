"""Between two log lines the program does not wait for the device, and yet acts on every step's counts at once.

The device is the CPU: its arithmetic happens in program order, but copies to the host arrive only when an event is
waited for.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

import finetune_zero3
from superoffload import config, distributed
from superoffload.data.collate import Batch, TargetsBySource
from superoffload.model.head import PlainLoss
from superoffload.training import metrics, tracking
from superoffload.training.progress import Progress
from superoffload.training.run import Run
from superoffload.training.run_control import RunControl
from tests.training.test_metrics import SHAPE

STEPS, LOG_INTERVAL, STOP_AFTER = 8, 3, 7
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Device:
    """An asynchronous device, and how often it was waited for: by reading from it or by copying to it at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waits: Counter[str] = Counter()
        self.arriving: list[Callable[[], Any]] = []
        self.on_host: list[torch.Tensor] = []
        real = get_accelerator()
        fake = SimpleNamespace(
            is_synchronized_device=lambda: False,
            Event=self.make_event,
            current_device_name=real.current_device_name,
            device_name=real.device_name,
        )
        monkeypatch.setattr(distributed, "get_accelerator", lambda: fake)
        monkeypatch.setattr(torch.Tensor, "pin_memory", self.pin_memory())
        monkeypatch.setattr(torch.Tensor, "copy_", self.copy_(torch.Tensor.copy_))
        monkeypatch.setattr(torch.Tensor, "to", self.to(torch.Tensor.to))
        monkeypatch.setattr(torch, "tensor", self.tensor(torch.tensor))
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self.counting(name, getattr(torch.Tensor, name)))

    def pin_memory(self) -> Callable[[torch.Tensor], torch.Tensor]:
        def pin(tensor: torch.Tensor) -> torch.Tensor:
            self.on_host.append(tensor.clone())
            return self.on_host[-1]

        return pin

    def copy_(self, copy: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def late(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if not (non_blocking and self.is_on_host(target)):
                return copy(target, source, non_blocking)
            copied = source.clone()
            self.arriving.append(lambda: copy(target, copied))
            return target.fill_(torch.nan)

        return late

    def to(self, move: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def moved(tensor: torch.Tensor, device: Any, *, non_blocking: bool = False) -> torch.Tensor:
            self.waits["to"] += not non_blocking
            return move(tensor, device, non_blocking=non_blocking)

        return moved

    def tensor(self, make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(values: Any, *, dtype: torch.dtype, device: Any = None) -> torch.Tensor:
            self.waits["tensor"] += device is not None
            return make(values, dtype=dtype, device=device)

        return made

    def make_event(self, enable_timing: bool = False) -> Any:
        arrive = (lambda: None) if enable_timing else self.arrive  # a mark of time is read once it has been passed
        return SimpleNamespace(record=lambda: None, synchronize=arrive, elapsed_time=lambda later: 1.0)

    def arrive(self) -> None:
        while self.arriving:
            self.arriving.pop()()

    def is_on_host(self, tensor: torch.Tensor) -> bool:
        return any(tensor is other for other in self.on_host)

    def counting(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self.waits[name] += not self.is_on_host(tensor)
            return read(tensor, *arguments, **options)

        return counted


class Engine:
    """A model of one table, without an optimizer."""

    device = torch.device("cpu")
    module = SimpleNamespace(training=True)

    def __init__(self) -> None:
        self.weight = torch.zeros(8, 8, requires_grad=True)
        self.losses: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.weight[input_ids])

    def backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.detach())
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        pass

    def get_lr(self) -> list[float]:
        return [1e-3]

    def get_global_grad_norm(self) -> float:
        return 1.0


@pytest.mark.parametrize("sources", [(), ("a", "b")], ids=["one source", "two sources"])
def test_steps_between_two_log_lines_do_not_wait_for_the_device(
    sources: tuple[str, ...], one_rank: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"model_name": "m", "output_dir": str(tmp_path), "log_interval": LOG_INTERVAL}
    chosen = config.build(values)
    waits_of_step: list[int] = []
    by_source = TargetsBySource(torch.tensor([5, 6, 0, 1, 2, 3, 4]), (2, 5)) if sources else None

    def epoch(*_: int) -> Iterator[list[Batch]]:
        for step in range(STEPS):
            ids = torch.arange(8)[None]
            device.waits.clear()
            yield [
                Batch(
                    inputs={"input_ids": ids, "labels": ids}, lengths=(5 + step,), target_tokens=7, by_source=by_source
                )
            ] * 2
            waits_of_step.append(device.waits.total())

    def votes() -> tuple[float, float]:
        return float(len(waits_of_step) == STOP_AFTER - 1), 0.0

    batches: Any = SimpleNamespace(epoch=epoch, total_steps=STEPS, packs_in=lambda epoch: STEPS, packs_per_step=1)
    evaluated: list[int] = []

    def evaluate(*given: Any) -> dict[str, float]:
        evaluated.append(given[-1])
        return {}

    evaluation: Any = SimpleNamespace(due=lambda *_: True, run=evaluate, samples=dict)
    engine: Any = Engine()
    control = RunControl(chosen, is_rank_0=True)
    monkeypatch.setattr(control, "votes", votes)
    run = Run(
        config=chosen,
        engine=engine,
        tokenizer=engine,
        batches=batches,
        progress=Progress(),
        meter=metrics.Meter(chosen, SHAPE, sources=sources),
        trackers=tracking.Trackers({}),
        evaluation=evaluation,
        control=control,
        loss=PlainLoss(),
    )
    device = Device(monkeypatch)
    finetune_zero3.train(run)
    assert [waits > 0 for waits in waits_of_step] == [step % LOG_INTERVAL == 0 for step in range(1, STOP_AFTER)]
    assert run.stopped and run.progress.step == STOP_AFTER  # in the step of the vote
    assert evaluated == list(range(1, STOP_AFTER))  # the save does not wait for the evaluation of that step
    assert run.progress.tokens == sum(2 * (5 + step) for step in range(STOP_AFTER))
    monkeypatch.undo()
    of_half_the_targets = float(torch.tensor(8.0).log()) / 2
    assert [float(loss) for loss in engine.losses] == pytest.approx([of_half_the_targets] * 2 * STOP_AFTER)
