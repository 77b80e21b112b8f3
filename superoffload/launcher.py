"""Which rank this process is, if no launcher says so but Slurm or Open MPI does. Imports no library."""

import os
from collections.abc import Mapping

from superoffload.errors import UserError

# How srun and mpirun number the tasks that they start: rank, number of tasks, rank on the node, tasks on the node.
# sbatch and salloc also set SLURM_NTASKS and SLURM_PROCID, in a shell that is one process; only tasks have a step.
_SCHEDULERS = {
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}
SIZES = tuple(size for _, size, _, _ in _SCHEDULERS.values())
"""The variables without which a process joins no other tasks."""
_FIRST_PORT, _PORTS = 15000, 15000


def adopt_scheduler() -> None:
    """Let a task of srun or mpirun join the other tasks, as a rank of one job.

    Does nothing if a launcher has set WORLD_SIZE, or if the task is alone. Raises `UserError` if tasks run on several
    nodes and MASTER_ADDR, the node of rank 0, is not set.
    """
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(ranks_of_scheduler(os.environ))


def ranks_of_scheduler(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch and DeepSpeed read, derived from the scheduler's; empty for a single task."""
    for command, (rank, size, local_rank, local_size) in _SCHEDULERS.items():
        if int(environment.get(size, "1")) == 1:
            continue
        address = environment.get("MASTER_ADDR")
        # Slurm writes the number of tasks of every node, e.g. `4(x2)` or `4,3`.
        one_node = environment.get(local_size) == environment[size]
        if address is None and not one_node:
            raise UserError(
                f"MASTER_ADDR: {command} started {environment[size]} tasks on several nodes; export the name of the "
                "node of rank 0, as scripts/slurm.sh does"
            )
        job = int(environment.get("SLURM_JOB_ID", "0"))  # jobs that share a node must not share a port
        return {
            "RANK": environment[rank],
            "WORLD_SIZE": environment[size],
            "LOCAL_RANK": environment[local_rank],
            "MASTER_ADDR": address or "127.0.0.1",
            "MASTER_PORT": environment.get("MASTER_PORT", str(_FIRST_PORT + job % _PORTS)),
        }
    return {}
