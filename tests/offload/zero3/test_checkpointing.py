"""Checkpoints: DeepSpeed's own files, complete in every sub-group, readable in both modes, exact."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload.offload.shared.messages import Reply, Task, TaskKind
from superoffload.offload.trainer.bookkeeping import Stage
from superoffload.offload.zero3.checkpointing import PRODUCT_HISTORY_KEY
from tests.helpers.offload_training import Case, Trainer, make_engine, snapshot
from tests.helpers.ranks import run_ranks

ONE_CYCLE = {
    "type": "OneCycle",
    "params": {
        "cycle_min_lr": 1e-4,
        "cycle_max_lr": 4e-3,
        "cycle_first_step_size": 4,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.95,
    },
}
CASES = {
    "plain": Case(clip=2.1),
    "group-betas": Case(clip=2.1, group_betas=True),
    "one-cycle": Case(scheduler=ONE_CYCLE),
    "device-share": Case(clip=2.1, ratio=0.5, device_share=True),
    "bf16-state": Case(low_precision_state=True),
}
QUICK, SLOW = ("plain", "device-share"), ("one-cycle", "group-betas", "bf16-state")
HALF, WHOLE = 3, 6


def run(case: Case, super_offload: bool, steps: tuple[int, int], folder: str, *, save: bool = False) -> dict[str, Any]:
    """Train steps [first, last), resuming from `folder` if first > 0, saving there at the end if asked."""
    first, last = steps
    engine = make_engine(case, super_offload)
    if first:
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
    trainer = Trainer(engine, case)
    trainer.run(first, last)
    result = {"losses": trainer.losses, **snapshot(engine)}
    if save:
        engine.save_checkpoint(folder)
    engine.destroy()
    return result


def resume_all(folder: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Run every case uninterrupted and interrupted, on one rank in all combinations of modes."""
    results: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        result = {"whole": run(case, True, (0, WHOLE), "")}
        # ZeRO-Offload does not save the device share's moments, so there is nothing to compare
        mixed = not case.device_share and torch.distributed.get_world_size() == 1
        for first, mode in (("ours", True), ("zero", False))[: 1 + mixed]:
            where = f"{folder}/{name}-{first}"
            result[f"{first} at half"] = run(case, mode, (0, HALF), where, save=True)
            for second, mode2 in (("ours", True), ("zero", False)):
                if second == "ours" or mixed:
                    result[f"{first} then {second}"] = run(case, mode2, (HALF, WHOLE), where)
                if mixed and first != second:
                    result[f"{first} loaded by {second}"] = run(case, mode2, (HALF, HALF), where)
        results[name] = result
    return results


Results = tuple[list[Any], Path]


def launch(factory: pytest.TempPathFactory, names: tuple[str, ...], world_size: int) -> Results:
    """Return the results of the named cases on every rank, and where the checkpoints lie."""
    folder = factory.mktemp("resume")
    return run_ranks(world_size, resume_all, str(folder), names, timeout_s=200), folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(tmp_path_factory, QUICK, 1)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(tmp_path_factory, SLOW, 1)


@pytest.fixture
def results(request: pytest.FixtureRequest, name: str) -> Results:
    """Return the launch that holds the case `name`."""
    launched: Results = request.getfixturevalue("quick" if name in QUICK else "slow")
    return launched


def cases(*names: str) -> list[Any]:
    """Return the names as test parameters, with those of the slow launch marked."""
    return [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in names]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launch(tmp_path_factory, ("plain", "device-share"), 2)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["steps"] == b["steps"]
    assert not [n for n, t in a["tensors"].items() if not torch.equal(t, b["tensors"][n])]


def without_gradients(result: dict[str, Any]) -> dict[str, Any]:
    """Leave out the gradients, which no checkpoint of ZeRO holds."""
    tensors = {n: t for n, t in result["tensors"].items() if not n.startswith("gradients")}
    return {"steps": result["steps"], "tensors": tensors}


@pytest.mark.parametrize("name", cases(*CASES))
def test_resume_is_the_same_run_bit_for_bit(results: Results, name: str) -> None:
    result = results[0][0][name]
    assert result["ours then ours"]["losses"] == result["whole"]["losses"][HALF:]
    assert_same(result["ours then ours"], result["whole"])


@pytest.mark.slow  # tests/checkpoint/test_resume.py covers one whole run on two ranks
@pytest.mark.parametrize("name", ["plain", "device-share"])
def test_resume_is_the_same_run_on_two_ranks(two_ranks: Results, name: str) -> None:
    for result in two_ranks[0]:
        assert_same(result[name]["ours then ours"], result[name]["whole"])


@pytest.mark.parametrize("name", cases(*(n for n in CASES if n != "device-share")))
def test_a_zero_offload_checkpoint_loads_completely(results: Results, name: str) -> None:
    result = results[0][0][name]
    assert_same(without_gradients(result["zero loaded by ours"]), without_gradients(result["zero at half"]))


@pytest.mark.parametrize("name", cases("plain", "group-betas", "bf16-state"))
def test_a_zero_offload_run_resumes_as_if_uninterrupted(results: Results, name: str) -> None:
    result = results[0][0][name]
    assert_same(result["zero then ours"], result["whole"])


@pytest.mark.parametrize("name", cases("plain", "group-betas", "one-cycle", "bf16-state"))
def test_zero_offload_loads_our_checkpoint_completely(results: Results, name: str) -> None:
    result = results[0][0][name]
    assert_same(without_gradients(result["ours loaded by zero"]), without_gradients(result["ours at half"]))
    theirs, whole = result["ours then zero"]["losses"], result["whole"]["losses"][HALF:]
    assert theirs == pytest.approx(whole, abs=2e-3)  # its beta products are rounded differently after a load


def optimizer_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*optim_states.pt"))


def structure(value: Any) -> Any:
    """Return dtypes and shapes in place of tensors, types in place of other leaves."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.untyped_storage().nbytes()
    if isinstance(value, dict):
        return {k: structure(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [structure(v) for v in value]
    return type(value).__name__


@pytest.mark.parametrize("name", cases("plain", "group-betas", "bf16-state"))
def test_format_is_that_of_zero_offload(results: Results, name: str) -> None:
    _, folder = results
    (ours,), (zero,) = (optimizer_files(folder / f"{name}-{mode}") for mode in ("ours", "zero"))
    states = [torch.load(f, weights_only=False)["optimizer_state_dict"] for f in (ours, zero)]
    assert len(states[0].pop(PRODUCT_HISTORY_KEY)) == 4
    assert structure(states[0]) == structure(states[1])


def test_device_share_is_in_the_checkpoint(quick: Results) -> None:
    _, folder = quick
    (file,) = optimizer_files(folder / "device-share-ours")
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]
    groups = state["fp32_flat_groups"]
    entries = state["optimizer_state_dict"]["state"]
    assert set(entries) == set(range(len(groups)))
    for i, entry in entries.items():
        assert entry["step"] == HALF
        assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == groups[i].shape
        assert entry["exp_avg"].abs().sum() > 0


def special(folder: str) -> dict[str, Any]:
    """Save while commits are held back; load a checkpoint without moments; load between backward and step."""
    case = CASES["plain"]
    results: dict[str, Any] = {}

    engine = make_engine(replace(case, clip=0.0), True)
    trainer = Trainer(engine, case)
    trainer.run(0, 2)
    decide_after_all_speculations(engine.optimizer._service.coordinator)
    hold_commits_back(engine.optimizer._service.process)
    trainer.run(2, 3)
    results["pending at save"] = engine.optimizer._service.coordinator.has_uncommitted
    engine.save_checkpoint(folder)
    results["saved late"] = snapshot(engine)
    engine.destroy()
    results["loaded"] = run(case, False, (3, 3), folder)

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("superoffload.offload").addHandler(handler)
    (file,) = optimizer_files(Path(folder))
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"] = {}
    torch.save(content, file)
    engine = make_engine(case, True)
    Trainer(engine, case).run(0, 2)
    engine.load_checkpoint(folder)
    results["stock"] = snapshot(engine)
    results["stock messages"] = messages
    Trainer(engine, case).run(3, 5)
    results["after stock"] = snapshot(engine)["steps"]

    engine.save_checkpoint(folder, tag="again")
    before = snapshot(engine)
    batch = trainer._batch(6, 0)
    engine.backward(engine(batch))  # the load replaces what these speculations read
    engine.load_checkpoint(folder, tag="again")
    engine.optimizer.zero_grad()
    results["before"], results["reloaded"] = before, snapshot(engine)
    Trainer(engine, case).run(5, 6)
    results["continued"] = snapshot(engine)
    engine.load_checkpoint(folder, tag="again")
    Trainer(engine, case).run(5, 6)
    results["continued again"] = snapshot(engine)
    engine.destroy()
    return results


def decide_after_all_speculations(coordinator: Any) -> None:
    """Let every speculation finish before its round is decided; on a busy machine the decision may be faster."""

    def settle() -> None:
        while any(work.stage is Stage.SPECULATING for work in coordinator._work.values()):
            coordinator._receive_one("waiting for a speculation", time.perf_counter())

    coordinator.settle = settle


def hold_commits_back(process: Any) -> None:
    """Keep every COMMIT from the optimizer process until the trainer waits for one."""
    send, receive = process.send, process.receive
    held: list[Task] = []

    def hold(task: Task, relieve: Callable[[], None] | None = None) -> None:
        if task.kind is TaskKind.COMMIT:
            held.append(task)
        else:
            send(task, relieve)

    def release(timeout_s: float, doing: str) -> Reply | None:
        while timeout_s > 0 and held and "commit" in doing:
            send(held.pop(0))
        reply: Reply | None = receive(timeout_s, doing)
        return reply

    process.send, process.receive = hold, release


@pytest.fixture(scope="module")
def special_results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("special")
    results: list[dict[str, Any]] = run_ranks(1, special, str(folder / "saved"), timeout_s=200)
    return results[0]


def test_saving_waits_for_pending_commits(special_results: dict[str, Any]) -> None:
    assert special_results["pending at save"]
    assert_same(without_gradients(special_results["loaded"]), without_gradients(special_results["saved late"]))


def test_a_checkpoint_without_moments_loads_with_a_warning(special_results: dict[str, Any]) -> None:
    assert [m for m in special_results["stock messages"] if "no Adam moments for 6 of 6 sub-groups" in m]
    stock = special_results["stock"]
    assert set(stock["steps"].values()) == {0} and set(special_results["after stock"].values()) == {2}
    moments = [t for n, t in stock["tensors"].items() if n.startswith("exp_avg")]
    assert moments and all(t.abs().max() == 0 for t in moments)


def test_loading_voids_speculations(special_results: dict[str, Any]) -> None:
    r = special_results
    assert_same(without_gradients(r["reloaded"]), without_gradients(r["before"]))
    assert_same(r["continued again"], r["continued"])
