"""Time steps with and without speculation in one process, in turns of a few steps.

    python tests/benchmarks/trials_speed.py

Two processes of the same code differ by several percent on a small machine, which is more than the two ways do; one
process does not. Uses the models of offload_speed.py, with a threshold that few steps exceed. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.offload import operators
from superoffload.offload.trainer.trials import BLOCK_ROUNDS, TRIAL, SpeculationTrials
from tests.benchmarks.offload_speed import PARTS, PRESETS, STEADY_ALLOCATOR, Bench
from tests.helpers.ranks import free_port

OPTIONS = {"accumulation": 1, "overlap_comm": False, "ratio": 1.0, "cores_perc": 0.8, "loss": "plain"}


class Turns(SpeculationTrials):
    """Speculate when told to."""

    now = True

    @property
    def speculate(self) -> bool:
        """Return what was set."""
        return self.now


def measure(preset: str, seconds: float) -> None:
    """Print the medians of both ways for one model; the first step of each turn is left out."""
    operators.prepare()
    bench = Bench("ours", PRESETS[preset], OPTIONS)
    turns = bench.engine.optimizer._service.coordinator.trials = Turns()
    bench.steps(4)
    bench.clip("rare")
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for way in TRIAL:
            turns.now = way
            bench.step()
            found[way] += [bench.step() for _ in range(BLOCK_ROUNDS - 1)]
    for way, steps in found.items():
        times = " | ".join(f"{1000 * statistics.median(step[part] for step in steps):.0f}" for part in PARTS)
        sys.stdout.write(f"| {preset} | {'during backward' if way else 'after backward'} | {times} |\n")
    sys.stdout.flush()
    bench.engine.destroy()


def main() -> None:
    """Measure the models named on the command line, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=list(PRESETS)[:4])
    parser.add_argument("--seconds", type=float, default=15.0, help="for each model")
    options = parser.parse_args()
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {**ranks, **STEADY_ALLOCATOR}
    sys.stdout.write("| case | Adam | forward | backward | optimizer | step |\n| --- | --- | --- | --- | --- | --- |\n")
    sys.stdout.flush()
    for preset in options.preset:
        os.environ["MASTER_PORT"] = str(free_port())
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(preset, options.seconds))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
