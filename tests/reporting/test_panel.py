import io
import math

import pytest
from rich.console import Console

from superoffload.reporting.panel import EVENTS, Panel, sparkline
from superoffload.training.metrics import Rates, StepMetrics

pytestmark = pytest.mark.unit

GIB = 2**30
RATES = Rates(
    step_time_s=2.0,
    tokens_per_s=2000.0,
    target_tokens_per_s=1234.0,
    padding_share=0.1,
    tflops_per_gpu=98.7,
    hardware_tflops_per_gpu=130.0,
)
MEMORY = {
    "device_bytes": 20 * GIB, "device_peak_bytes": 60 * GIB, "device_total_bytes": 80 * GIB,
    "host_bytes": 100 * GIB, "host_total_bytes": 500 * GIB,
}  # fmt: skip


def numbers(step: int, loss: float) -> StepMetrics:
    return StepMetrics(step=step, epoch=0.5, loss=loss, lr=1e-5, grad_norm=0.75, rates=RATES)


def drawn(panel: Panel, width: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=file, width=width, force_terminal=True, color_system=None).print(panel)
    file.seek(0)
    return file.read().splitlines()


def in_the_middle() -> Panel:
    now_s = [0.0]
    panel = Panel("org/model | superoffload | 1 x CPU", 100, 0, lambda: now_s[0])
    for step in range(1, 41):
        now_s[0] += 2
        panel.advance(step)
        panel.show(numbers(step, 4 - step / 20), MEMORY)
    panel.add_event("03:04:05", "Checkpoint saved in out/global_step40")
    return panel


@pytest.mark.parametrize("width", [80, 200])
def test_everything_is_on_it_in_the_width_of_the_terminal(width: int) -> None:
    lines = drawn(in_the_middle(), width)
    assert {len(line) for line in lines} == {width}
    text = "\n".join(lines)
    for part in (
        "org/model | superoffload | 1 x CPU", "40/100", "40%", "0:01:20 passed", "0:02:00 left", "2.0000", "1.00e-05",
        "gradient norm 0.750", "1,234 target tokens/s", "98.70 TFLOPS/GPU", "2 s/step",
        "device 20.0 of 80.0 GiB (peak 60.0)", "host 100.0 of 500.0 GiB",
        "03:04:05  Checkpoint saved in out/global_step40", "█", "▁",
    ):  # fmt: skip
        assert part in text


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert all(line.isascii() for line in drawn(in_the_middle(), 80, "ascii"))


def test_before_the_first_numbers_it_says_so() -> None:
    text = "\n".join(drawn(Panel("m", 10, 0), 80))
    assert "0/10" in text and "after the first steps" in text and "left" not in text


def test_the_time_left_of_a_resumed_run_counts_its_own_steps_only() -> None:
    now_s = [0.0]
    panel = Panel("m", 100, 90, lambda: now_s[0])
    assert panel.left_s() is None
    now_s[0] = 3.0
    panel.advance(91)
    assert panel.left_s() == 27


def test_the_smoothed_loss_starts_without_bias_and_leaves_out_nan() -> None:
    panel = Panel("m", 10, 0)
    panel.show(numbers(1, 3.0), {})
    assert panel.smoothed_loss() == pytest.approx(3.0)
    panel.show(numbers(2, math.nan), {})
    panel.show(numbers(3, 2.0), {})
    assert panel.smoothed_loss() == pytest.approx((0.9 * 3 + 2) / 1.9)
    assert "×" in "\n".join(drawn(panel, 80))


def test_the_last_events_stay_each_on_one_line() -> None:
    panel = in_the_middle()
    for number in range(EVENTS + 1):
        panel.add_event("03:04:05", f"event {number}\nmore of it", "red")
    text = "\n".join(drawn(panel, 80))
    assert "event 0" not in text and "event 1" in text and f"event {EVENTS}" in text
    assert "more of it" not in text and "Checkpoint" not in text


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([1, 2, 3], 9, "▁▅█"),
        ([5, 1, 2, 3], 3, "▁▅█"),
        ([2, 2], 5, "▁▁"),
        ([1, math.inf, 2], 5, "▁×█"),
        ([math.nan], 5, "×"),
        ([], 5, ""),
        ([1.0], 0, ""),
        ([1.0], -3, ""),
    ],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected
