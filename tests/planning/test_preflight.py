import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from superoffload import config, distributed
from superoffload.ds_config import Merged, merge_flags, read_ds_config
from superoffload.errors import UserError
from superoffload.planning import preflight, ratio, sight
from superoffload.planning.budget import job
from superoffload.planning.budget.device import on_device, sub_groups
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.memory import budget
from superoffload.planning.budget.shape import built_in
from superoffload.planning.forecast import GIB, Forecast
from superoffload.planning.machine import Device, Machine
from superoffload.planning.remedies import Search
from superoffload.planning.sight import Sight
from tests.helpers.runs import make_checkpoint

pytestmark = pytest.mark.unit

SHAPE = built_in("llama-8b")
EMPTY_HOST = Machine(
    devices=(), host_bytes=500 * GIB, host_available_bytes=480 * GIB, cores=8, shm_bytes=0, shm_free_bytes=0,
    memlock_bytes=None, numa_nodes=1,
)  # fmt: skip


def settings(**flags: Any) -> Merged:
    asked = config.build(
        {"model_name": "m", "output_dir": "out", "batch_size": 1, "activation_checkpointing": True, **flags}
    )
    return merge_flags(read_ds_config(asked), asked, 1)


def view(
    host_name: str = "a",
    free: float | None = 79,
    available: float = 480,
    disk: float = 1000,
    held: float = 1,
    checkpoints: int = 0,
    rounding: bool = False,
) -> Sight:
    devices = () if free is None else (Device(name="d", total_bytes=80 * GIB, free_bytes=int(free * GIB)),)
    machine = replace(EMPTY_HOST, devices=devices, host_available_bytes=int(available * GIB))
    return Sight(
        host_name=host_name,
        machine=machine,
        held_bytes=int(held * GIB),
        disk_bytes=int(disk * GIB),
        checkpoints=checkpoints,
        pinned_rounding=rounding,
    )


def asked(**flags: Any) -> Job:
    merged = settings(**flags)
    return job.of(merged.config, merged.ds_config, 1, 1)


def test_the_capacity_is_the_least_that_any_rank_has() -> None:
    sights = [view("a"), view("a", free=60), view("b", available=100, disk=50), view("b", available=101, held=3)]
    found = sight.capacity(sights)
    assert found.device == 62 * GIB  # and what the rank's own context and buffers take of it, which the budget counts
    assert found.host == 104 * GIB  # and what both ranks of b hold
    assert found.disk == 50 * GIB
    assert sight.ranks_per_node(sights) == 2


def test_memory_that_a_rank_holds_adds_to_no_limit() -> None:
    found = sight.capacity([view(free=80, available=499, held=9)])
    assert (found.device, found.host) == (80 * GIB, 500 * GIB)
    assert sight.capacity([view(free=None)]).device is None


@pytest.mark.parametrize("free", [35.0, 40.0, 60.0, 79.0])
def test_auto_takes_the_largest_share_that_leaves_the_margin_free(free: float) -> None:
    wanted = asked(sub_group_size=2 * 10**8)
    found, why = ratio.auto(SHAPE, wanted, int(free * GIB))
    total = len(sub_groups(SHAPE, wanted))
    count = len(on_device(SHAPE, replace(wanted, ratio=found)))
    assert found == round(found, 2)
    assert why == f"which puts {count} of {total} sub-groups on the device"

    def peak(number: int) -> int:
        each = (step / 100 for step in range(100, -1, -1))
        jobs = (replace(wanted, ratio=step) for step in each)
        return next(budget(SHAPE, one).device_peak for one in jobs if len(on_device(SHAPE, one)) >= number)

    assert 0 < count < total
    assert peak(count) <= 0.95 * free * GIB < peak(count + 1)


def test_auto_takes_everything_where_it_fits_and_nothing_where_nothing_fits() -> None:
    everything, _ = ratio.auto(SHAPE, asked(), 2000 * GIB)
    assert on_device(SHAPE, replace(asked(), ratio=everything)) == sub_groups(SHAPE, asked())
    assert ratio.auto(SHAPE, asked(), 5 * GIB)[0] == 1
    assert ratio.auto(SHAPE, asked(), None) == (1.0, "because there is no GPU")


def test_a_resumed_run_keeps_its_ratio_if_that_fits() -> None:
    wanted = asked(sub_group_size=2 * 10**8)
    before, _ = ratio.auto(SHAPE, wanted, 40 * GIB)
    for there in (79 * GIB, None):
        assert ratio.auto(SHAPE, wanted, there, before) == (before, "as in the checkpoint")
    smallest, _ = ratio.auto(SHAPE, wanted, 79 * GIB)
    now, why = ratio.auto(SHAPE, wanted, 40 * GIB, smallest)
    assert now == before
    assert why.endswith(f"; the checkpoint was saved with {smallest}, and rounds differently")


Check = Callable[..., tuple[Merged, Forecast | None]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Check:
    """Run the preflight on what the ranks of a job see; one of them may have failed."""
    monkeypatch.setattr(logging.getLogger("superoffload"), "propagate", True)
    caplog.set_level(logging.INFO)

    def run(
        *found: Any, checkpoints: Any = (), longest: int | None = None, **flags: Any
    ) -> tuple[Merged, Forecast | None]:
        caplog.clear()
        nothing: Any = SimpleNamespace(skeleton=None, frozen=frozenset())
        monkeypatch.setattr(sight, "see", lambda folder: view())
        monkeypatch.setattr("superoffload.planning.budget.shape.of_model", lambda *known: SHAPE)
        ranks = [(each, SHAPE) if isinstance(each, Sight) else each for each in found]
        monkeypatch.setattr(distributed, "all_gather_objects", lambda own: ranks)
        merged = settings(**flags)
        return preflight.check(merged, nothing, longest or merged.config.data.max_length, checkpoints)

    return run


def test_rows_that_are_not_packed_count_with_the_length_of_the_longest(check: Check) -> None:
    _, short = check(view(), longest=100, packing=False)
    _, full = check(view(), packing=False, preflight=False)
    assert short and full
    assert short.plan.job.length == 100 < full.plan.job.length
    assert short.plan.budget.device["activations"] < full.plan.budget.device["activations"]


def test_a_run_that_fits_is_one_line(check: Check, caplog: pytest.LogCaptureFixture) -> None:
    check(view())
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().startswith("Memory: device ")
    assert " of 80.0 GiB, host " in record.getMessage()


def test_what_is_within_the_margin_is_a_warning(check: Check, caplog: pytest.LogCaptureFixture) -> None:
    _, found = check(view())
    assert found is not None
    for share in (0.97, 1.0, 1.03):
        check(view(free=found.plan.budget.device_peak / GIB * share - 1))
        assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("kind", ["device", "host", "disk"])
def test_what_is_clearly_over_stops_the_run_unless_told_otherwise(
    kind: str, check: Check, caplog: pytest.LogCaptureFixture
) -> None:
    little = {"device": {"free": 10}, "host": {"available": 50}, "disk": {"disk": 1}}[kind]
    flags: dict[str, Any] = {"save_checkpoint": True}
    with pytest.raises(
        UserError, match=rf"^--model_name llama-8b: this run needs more than there is: {kind} .* GiB.*--no_pre"
    ):
        check(view(), view(**little), **flags)  # type: ignore[arg-type]
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "\n" in caplog.records[0].getMessage()
    check(view(), view(**little), preflight=False, **flags)  # type: ignore[arg-type]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_little_too_little_of_the_host_stops_nothing(check: Check) -> None:
    _, found = check(view())
    assert found is not None
    check(view(available=found.plan.budget.host_peak / GIB * 1.05 - 2.5, held=0))


def test_nothing_that_the_preflight_does_not_understand_stops_a_run(
    check: Check, caplog: pytest.LogCaptureFixture
) -> None:
    failed = "AttributeError: no such thing"
    for ranks in ((failed, view()), (view(), failed)):
        merged, found = check(*ranks, offload_ratio="auto")
        assert found is None
        assert merged.config.offload.offload_ratio == 1.0
        assert caplog.messages[0] == f"Memory is not known beforehand: LookupError: {failed}"


def test_an_error_of_any_kind_in_the_arithmetic_stops_no_run(
    check: Check, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(ratio, "auto", fail)
    merged, found = check(view(), offload_ratio="auto")
    assert (merged.config.offload.offload_ratio, found) == (1.0, None)
    assert caplog.messages[0] == "Memory is not known beforehand: AssertionError: Torch not compiled with CUDA enabled"
    saved: Any = SimpleNamespace(manifest={"config": {"offload_ratio": 0.9}})
    merged, _ = check(view(), offload_ratio="auto", checkpoints=[saved])
    assert merged.config.offload.offload_ratio == 0.9


def test_a_run_that_saves_at_its_end_needs_no_space_for_more_checkpoints(check: Check) -> None:
    _, first = check(view(), save_checkpoint=True)
    assert first is not None
    one = first.plan.budget.checkpoint
    assert first.plan.budget.disk == one
    check(view(disk=1.1 * one / GIB), save_checkpoint=True)
    for there, most in ((1, 2), (2, 3), (7, 3)):
        _, again = check(view(), view(checkpoints=there), save_checkpoint=True)
        assert again is not None
        assert again.plan.budget.disk == most * one
    for often in ({"save_steps": 100}, {"save_minutes": 1.0}):
        _, many = check(view(), save_checkpoint=True, **often)
        assert many is not None
        assert many.plan.budget.disk == 3 * one


def test_ranks_whose_allocators_differ_come_to_the_same_result(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ("", "pinned_max_round_threshold_mb:64"):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", options)
        _, found = check(view(), view("b", rounding=True))
        assert found is not None
        assert found.plan.job.pinned_rounding


def test_the_ratio_of_auto_is_that_of_the_settings_and_of_the_ds_config(
    check: Check, caplog: pytest.LogCaptureFixture
) -> None:
    merged, found = check(view(free=40), offload_ratio="auto")
    chosen = merged.config.offload.offload_ratio
    assert isinstance(chosen, float)
    assert 0 < chosen < 1
    assert merged.ds_config["zero_optimization"]["offload_optimizer"]["ratio"] == chosen
    assert found is not None
    assert found.plan.job.ratio == chosen
    assert caplog.messages[0].startswith(f"--offload_ratio auto: {chosen}, ")
    saved: Any = SimpleNamespace(manifest={"config": {"offload_ratio": 0.97}})
    kept, _ = check(view(free=40), offload_ratio="auto", checkpoints=[saved])
    assert kept.config.offload.offload_ratio == 0.97


def test_the_advice_is_three_flags_each_of_which_is_enough(check: Check) -> None:
    _, found = check(view(free=40), batch_size=2, max_length=8192, preflight=False, offload_ratio=0.5)
    assert found is not None
    enough = [" ".join(remedy.flags) for remedy in found.plan.remedies]
    assert len(enough) >= 3
    assert found.advice() == f"use {', or '.join(enough[:3])}"


def test_advice_after_memory_ran_out_saves_a_tenth_of_the_plan(check: Check) -> None:
    _, found = check(view())
    assert found is not None
    assert found.plan.fits
    for place, peak in (("device", found.plan.budget.device_peak), ("host", found.plan.budget.host_peak)):
        flags = found.advice(place).removeprefix("use ").split(", or ")
        less = replace(found.plan.capacity, **{place: int(peak * 0.9)})
        remedies, _ = Search(shape=SHAPE, capacity=less).remedies(found.plan.job)
        assert flags == [" ".join(remedy.flags) for remedy in remedies[:3]]
        assert flags


def test_resuming_counts_for_a_run_that_resumes(check: Check) -> None:
    _, fresh = check(view())
    assert fresh is not None
    peaks = {"saving": 2 * GIB, "resuming": 9 * GIB}
    costly = replace(fresh, plan=replace(fresh.plan, budget=replace(fresh.plan.budget, host_peaks=peaks)))
    assert costly.phase == "saving"
    assert replace(costly, resumes=True).phase == "resuming"


def test_a_rank_sees_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "device", lambda: SimpleNamespace(type="cpu"))
    found = sight.see(str(tmp_path / "new"))
    assert found.machine.devices == ()
    assert 2**20 < found.held_bytes < found.machine.host_bytes
    assert found.disk_bytes > 0
    device = Device(name="d", total_bytes=80 * GIB, free_bytes=70 * GIB)
    monkeypatch.setattr(distributed, "device", lambda: SimpleNamespace(type="cuda"))
    monkeypatch.setattr("superoffload.planning.machine.current_device", lambda: device)
    assert sight.see(str(tmp_path)).machine.devices == (device,)
    with (make_checkpoint(tmp_path, 3, 1.0) / "big").open("wb") as file:
        file.truncate(2**41)  # takes no space
    found = sight.see(str(tmp_path))
    assert found.disk_bytes > 2**41
    assert found.checkpoints == 1
