"""What the optimizer process is started with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from superoffload.offload.settings import OffloadSettings
from superoffload.offload.shared.affinity import CoreSplit
from superoffload.offload.trainer.process import _environment
from superoffload.offload.zero3 import service

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("shares_cores", [True, False])
def test_a_step_gets_all_cores_that_the_trainer_computes_on(
    monkeypatch: pytest.MonkeyPatch, shares_cores: bool
) -> None:
    split = CoreSplit(trainer=(2, 3, 4), optimizer=(0, 1))
    monkeypatch.setattr(service, "_split_cores_of_this_rank", lambda _: split)
    op = SimpleNamespace(__name__="cpu_adam", __file__="cpu_adam.so")
    zero: Any = SimpleNamespace(optimizer=SimpleNamespace(ds_opt_adam=op, adam_w_mode=True), dtype=None)
    partitions: Any = SimpleNamespace(arena=SimpleNamespace(layout=SimpleNamespace(to_json=dict)))
    made = service.OptimizerService(OffloadSettings(chunk_numel_per_thread=1024), 0.4)
    setup = made._worker_setup(zero, partitions, shares_cores=shares_cores)
    assert setup.cores == ((0, 1, 2, 3, 4) if shares_cores else (0, 1))
    assert setup.threads_beside_trainer == 2
    assert setup.to_json()["niceness"] == (10 if shares_cores else 0)


def test_threads_that_wait_sleep_only_where_they_would_take_the_trainers_cores() -> None:
    assert _environment(4, shares_cores=True)["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in _environment(4, shares_cores=False)
    assert _environment(4, shares_cores=True)["OMP_NUM_THREADS"] == "4"
