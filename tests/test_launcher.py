"""Ranks that Slurm or Open MPI start."""

import os

import pytest

from superoffload import launcher
from superoffload.errors import UserError

pytestmark = pytest.mark.unit

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "15007",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


def test_a_task_of_srun_is_a_rank() -> None:
    assert launcher.ranks_of_scheduler({**SRUN, "MASTER_ADDR": "node3"}) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node3", "MASTER_PORT": "15007"
    }  # fmt: skip


def test_tasks_of_one_node_need_no_address() -> None:
    one_node = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "8", "MASTER_PORT": "29501"}
    found = launcher.ranks_of_scheduler(one_node)
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("127.0.0.1", "29501")


@pytest.mark.parametrize("per_node", ["4(x2)", "5,3", ""])
def test_tasks_on_several_nodes_need_the_address_of_rank_0(per_node: str) -> None:
    with pytest.raises(UserError, match=r"^MASTER_ADDR: srun started 8 tasks on several nodes; export "):
        launcher.ranks_of_scheduler({**SRUN, "SLURM_STEP_TASKS_PER_NODE": per_node})


def test_a_task_of_mpirun_is_a_rank() -> None:
    found = launcher.ranks_of_scheduler(MPIRUN)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "1")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"},  # the shell of sbatch or salloc
    ],
)
def test_a_single_process_stays_alone(environment: dict[str, str]) -> None:
    assert launcher.ranks_of_scheduler(environment) == {}


def test_a_launcher_is_not_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**SRUN, "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    launcher.adopt_scheduler()
    assert (os.environ["WORLD_SIZE"], os.environ["RANK"]) == ("2", "0")
