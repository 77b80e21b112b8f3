"""The time of a step: by hand for a model of 10^9 parameters, and what must make it longer or shorter."""

from dataclasses import replace
from typing import Any

import pytest

from superoffload.model.flops import hardware_flops, model_flops
from superoffload.planning import speed
from superoffload.planning.machine import Rates
from superoffload.planning.speed import Hardware, in_mode, step_time
from tests.helpers.planning import job_of, plain_shape, recipe
from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.unit

# Round numbers: forward of 1,000 tokens is 2e12 FLOPs, 2 s; a copy of one byte per parameter takes 0.1 s in either
# direction, and a byte of Adam 0.01 s.
MACHINE = Hardware(device="H100", link="pcie5", flops=1e12, down=1e10, up=1e10, host_memory=1e11)
SHAPE = plain_shape()
FLAGS: dict[str, Any] = {"max_length": 1000, "sub_group_size": 10**8}
RATES = Rates(
    adam_parameters_per_s=2e9,
    host_copy_bytes_per_s=1e11,
    to_device_bytes_per_s=21e9,
    from_device_bytes_per_s=22e9,
    device_bf16_flops_per_s=700e12,
    disk_write_bytes_per_s=1e9,
)


def test_superoffload_by_hand() -> None:
    """Everything hides: only the last of ten sub-groups has nothing left to run beside."""
    step = step_time(SHAPE, job_of(**FLAGS), MACHINE)
    assert step.compute_s == pytest.approx(6.0)
    assert step.gradients_s == pytest.approx(0.4)
    assert step.weights_s == pytest.approx(0.2)
    assert step.adam_s == pytest.approx(0.18 + 0.28)  # speculate, then again in place
    assert step.step_s == pytest.approx(6.0 + (0.4 + 0.18 + 0.2) / 10)
    assert step.tokens_per_s == pytest.approx(1000 / step.step_s)


def test_zerooffload_by_hand() -> None:
    """Copies go through the accumulation buffer, and nothing hides."""
    step = step_time(SHAPE, job_of(mode="zerooffload", **FLAGS), MACHINE)
    assert step.gradients_s == pytest.approx(0.2 + 0.2 + 0.4)
    assert step.adam_s == pytest.approx(0.28 + 0.06)
    assert step.exposed_s == pytest.approx(0.8 + 0.34 + 0.2)


def test_recomputation_adds_a_forward() -> None:
    wanted = job_of(activation_checkpointing=True, **FLAGS)
    assert step_time(SHAPE, wanted, MACHINE).compute_s == pytest.approx(8.0)
    slow = replace(MACHINE, host_memory=28e9 / 2.5)  # 2.5 s in place, beside a forward of 2 s; backward takes 6 s
    speculation = 18 * 2.5 / 28
    assert step_time(SHAPE, wanted, slow).step_s == pytest.approx(2.5 + 6 + (0.4 + speculation + 0.2) / 10)


def test_copies_of_inputs_hide_unless_the_link_is_slow() -> None:
    """Of 1000 tokens, 32 layers and 4096 numbers in bf16, 0.262 GB: beside a forward of 2 s and a backward of 6 s."""
    full, offload = (job_of(activation_checkpointing=where, **FLAGS) for where in ("full", "offload"))
    assert step_time(SHAPE, offload, MACHINE).step_s == step_time(SHAPE, full, MACHINE).step_s
    slow = replace(MACHINE, down=0.1e9)  # also of the gradients, 4 GB
    forward = 2 * 4096 * 32 * 1000 / 0.1e9
    assert step_time(SHAPE, offload, slow).step_s - step_time(SHAPE, full, slow).step_s == pytest.approx(forward - 2)


def test_a_slow_host_shows_in_the_step() -> None:
    """Speculation beside backward, of 4 s, and the commit beside forward, of 2 s."""
    slow = replace(MACHINE, host_memory=1e9)  # speculate 18 s, in place 28 s
    step = step_time(SHAPE, job_of(**FLAGS), slow)
    assert step.step_s == pytest.approx(18 + 28 + (0.4 + 18 + 0.2) / 10)
    assert step.step_s > step_time(SHAPE, job_of(mode="zerooffload", **FLAGS), slow).step_s


def test_micro_batches_by_hand() -> None:
    """The commit may also run beside the first micro-batches; copies of sums hide in each backward."""
    step = step_time(SHAPE, job_of(gradient_accumulation_steps=3, **FLAGS), replace(MACHINE, host_memory=2e9))
    first, others, last = 2.0 + 0.0, 2 * 2.0 + 2 * 4.0, 9.0  # in place: 14 - 2 * 6 = 2 s, as long as a forward
    assert step.gradients_s == pytest.approx(3 * 0.4 + 0.4)
    assert step.step_s == pytest.approx(first + others + last + (0.8 + 9 + 0.2) / 10)


def test_without_an_optimizer_on_the_host_both_modes_take_as_long() -> None:
    wanted = job_of(offload_ratio=0.0, **FLAGS)
    times = [in_mode(SHAPE, wanted, MACHINE, mode) for mode in ("superoffload", "zerooffload")]
    assert [time.step_s for time in times] == [times[0].compute_s] * 2
    assert times[0].adam_s == times[0].gradients_s == 0


def test_ranks_share_the_memory_of_their_host_and_gather() -> None:
    one, two = (step_time(SHAPE, job_of(ranks, **FLAGS), MACHINE) for ranks in (1, 2))
    assert two.adam_s == pytest.approx(one.adam_s)  # half the parameters each, at the same time
    assert two.gradients_s == pytest.approx(one.gradients_s / 2)  # each over its own link
    assert two.tokens == 2 * one.tokens
    assert two.gathers_s == pytest.approx(3 * 1e9 / speed.NODE_GATHER)
    apart = step_time(SHAPE, job_of(1, nodes=2, **FLAGS), MACHINE)
    assert apart.adam_s == pytest.approx(one.adam_s / 2)
    assert apart.gathers_s == pytest.approx(3 * 1e9 / speed.NETWORK_GATHER)


def test_bf16_state_moves_half_the_bytes() -> None:
    step = step_time(SHAPE, job_of(optimizer_state="bf16", **FLAGS), MACHINE)
    assert step.gradients_s == pytest.approx(0.2)
    assert step.adam_s == pytest.approx(0.10 + 0.14)


def test_offloaded_weights_are_copied_for_forward_and_backward() -> None:
    slow = replace(MACHINE, up=2.5e8)  # the weights take 8 s
    step = step_time(SHAPE, job_of(offload_params=True, **FLAGS), slow)
    assert step.step_s == pytest.approx(8 + 8 + (0.4 + 0.18 + 8) / 10)


@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
@pytest.mark.parametrize("rate", ["flops", "down", "up", "host_memory"])
def test_a_faster_machine_is_never_slower(mode: str, rate: str) -> None:
    for name in ("llama-8b", "llama-70b"):
        shape, wanted = recipe(name, mode=mode)
        times = [
            step_time(shape, wanted, replace(MACHINE, **{"flops": 5e14, rate: 10.0**exponent})).step_s  # type: ignore[arg-type]
            for exponent in (9, 10, 11, 12)
        ]
        assert times == sorted(times, reverse=True)
        assert times[0] > times[-1]


@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
def test_more_work_takes_longer(mode: str) -> None:
    shape, wanted = recipe("qwen3-14b", mode=mode)
    base = step_time(shape, wanted, MACHINE).step_s
    for change in ({"batch": 8}, {"length": 8192}, {"accumulation": 2}):
        assert step_time(shape, replace(wanted, **change), MACHINE).step_s > base  # type: ignore[arg-type]
    slow = replace(MACHINE, flops=5e14, host_memory=1e10)
    assert step_time(shape, replace(wanted, ratio=0.5), slow).step_s < step_time(shape, wanted, slow).step_s


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", ("H100", 989e12, "pcie5")),
        ("NVIDIA H100 PCIe", ("H100 PCIe", 756e12, "pcie5")),
        ("NVIDIA GH200 480GB", ("GH200", 989e12, "c2c")),
        ("NVIDIA GB200", ("GB200", 2.5e15, "c2c")),
        ("NVIDIA B200", ("B200", 2.25e15, "pcie5")),
        ("NVIDIA H200", ("H200", 989e12, "pcie5")),
        ("NVIDIA H20", ("H20 ", 148e12, "pcie5")),
        ("NVIDIA A100-SXM4-80GB", ("A100", 312e12, "pcie4")),
        ("Some Other", None),
    ],
)
def test_devices_are_known_by_their_names(name: str, found: tuple[str, float, str] | None) -> None:
    assert speed.known(name) == found


def test_rates_are_measured_or_assumed() -> None:
    assumed = speed.hardware(None, None, 4, None)
    assert (assumed.device, assumed.flops, assumed.down, assumed.measured) == ("H100", 494.5e12, 50e9, ())
    assert assumed.assumed and speed.hardware("Some Other", None, 4, None).assumed
    measured = speed.hardware("NVIDIA H100 PCIe", None, 1, RATES)
    assert (measured.flops, measured.down, measured.up) == (700e12 * speed.SHARE_OF_PRODUCT, 22e9, 21e9)
    assert measured.host_memory == 2e9 * 28
    assert measured.measured == ("flops", "copies", "adam") and not measured.assumed


def test_another_link_means_another_machine() -> None:
    other = speed.hardware("NVIDIA H100 PCIe", "c2c", 4, RATES)
    assert (other.down, other.machine_memory(4), other.measured) == (330e9, 4 * 300e9, ("flops",))


def test_each_superchip_brings_the_memory_of_its_host() -> None:
    """A remedy may be more devices: the rate is for as many as the remedy has."""
    for name, link, rates, grows in (
        ("NVIDIA GH200 480GB", None, None, True),
        ("NVIDIA GH200 480GB", None, RATES, True),
        ("NVIDIA H100", "pcie5", None, False),
    ):
        found = speed.hardware(name, link, 1, rates)
        adam = [step_time(SHAPE, job_of(ranks, **FLAGS), found).adam_s for ranks in (1, 4)]
        assert adam[0] / adam[1] == pytest.approx(4 if grows else 1)


@pytest.mark.parametrize(("length", "tflops", "published"), [(8192, 174, 141), (32768, 371, 324), (131072, 476, 420)])
def test_the_comparison_in_the_documentation(length: int, tflops: int, published: int) -> None:
    shape, wanted = recipe("llama-8b", mode="zerooffload", ranks=8, ranks_per_node=8, batch=1, length=length, ratio=1.0)
    step = step_time(shape, wanted, speed.hardware("NVIDIA H200", "pcie5", 8, None))
    flops = hardware_flops(model_flops(shape.flops, [length]), recomputed=True)
    assert round(flops / step.step_s / 1e12) == tflops == pytest.approx(published, rel=0.3)
    text = (REPOSITORY / "docs/planning.md").read_text(encoding="utf-8")
    assert str(tflops) in text and str(published) in text


def test_a_superchip_reaches_about_what_upstream_reports() -> None:
    """500 to 600 TFLOPS with recomputation counted, and 1.5 times ZeRO-Offload, with 4 packs of 4,096 tokens."""
    shape, wanted = recipe("llama-8b")
    machine = speed.hardware("NVIDIA GH200 480GB", None, 1, None)
    steps = [in_mode(shape, wanted, machine, mode).step_s for mode in ("superoffload", "zerooffload")]
    flops = hardware_flops(model_flops(shape.flops, [4096] * 4), recomputed=True)
    assert 430e12 < flops / steps[0] < 600e12
    assert 1.3 < steps[1] / steps[0] < 1.8
