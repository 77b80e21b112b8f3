"""Measure the time from the command to the end of the first step, by phase.

    python tests/benchmarks/startup.py
    python tests/benchmarks/startup.py --against main --rounds 3

Runs the program on the model and the rows of the quick start, after one run that fills the caches: as a recipe for one
device starts it, and under DeepSpeed's launcher, in turns; with `--against`, in turn with another revision too. Prints
the median of the rounds and writes startup.md and startup.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
MARKS = "STARTUP_MARKS"  # the file to which a rank writes; set in a rank only
PHASES = ("launcher", "imports", "architecture", "rows", "model", "engine", "first step")
Marks = dict[str, tuple[float, float]]
"""Phase -> wall and CPU time in seconds."""


def run_rank(path: Path) -> None:
    """Run the program as the launcher starts it, and write when each phase ended and the CPU time until then."""
    found = {"launcher": (time.time(), _cpu_s())}
    import finetune_zero3
    from superoffload import cli

    def mark(phase: str, module: Any, name: str, then: Callable[[], None] = lambda: None) -> None:
        function = getattr(module, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if phase not in found:
                found[phase] = (time.time(), _cpu_s())
                path.write_text(json.dumps(found), encoding="utf-8")
            then()
            return result

        setattr(module, name, marked)

    def mark_the_rest() -> None:  # modules that the program itself imports later
        from superoffload.model import load, loss_kernel
        from superoffload.training import inputs

        mark("architecture", load, "load_architecture")
        mark("rows", inputs, "load")
        mark("model", load, "load_model")
        mark("engine", loss_kernel, "choose")

    mark("imports", finetune_zero3, "merge_flags", mark_the_rest)  # the first call after the imports
    mark("first step", finetune_zero3, "train_step")
    cli.run(finetune_zero3.main)


def _cpu_s() -> float:
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(tree: Path, start: Path, output: Path, launcher: list[str]) -> Marks:
    """Start the program of a tree once, on the model and the rows in `start`; return the times of each phase.

    The CPU time of the launcher is the rest of the whole command's: its processes, and what comes after the step.
    """
    marks = output / "marks.json"
    flags = {
        "--model_name": start / "model",
        "--dataset_name": start / "train.json",
        "--output_dir": output,
        "--deepspeed_config": tree / "configs" / "superoffload.json",
        "--max_length": 64,
        "--batch_size": 4,
        "--max_steps": 1,
    }
    command = [*launcher, str(Path(__file__).resolve())]
    env = {**os.environ, MARKS: str(marks), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tree)}
    started_s, before_s = time.time(), _cpu_s()
    words = [str(word) for pair in flags.items() for word in pair]
    done = subprocess.run([*command, *words], env=env, cwd=tree, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-3000:])
    ends = json.loads(marks.read_text(encoding="utf-8"))
    whole_s = _cpu_s() - before_s
    result: Marks = {"launcher": (ends["launcher"][0] - started_s, whole_s - ends["first step"][1])}
    for earlier, phase in pairwise(PHASES):
        result[phase] = (ends[phase][0] - ends[earlier][0], ends[phase][1] - ends[earlier][1])
    return result


def report(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """Write the medians as a table in Markdown."""
    head = " | ".join(f"{name}: wall | CPU" for name in found)
    lines = [f"| phase | {head} |", "| --- " * (1 + 2 * len(found)) + "|"]
    for phase in (*PHASES, "sum"):
        cells = [f"{part[phase][kind]:.2f} s" for part in found.values() for kind in ("wall_s", "cpu_s")]
        lines.append(f"| {phase} | {' | '.join(cells)} |")
    return "\n".join(["# From the command to the end of the first step", "", *lines, ""])


def medians(rounds: list[Marks]) -> dict[str, dict[str, float]]:
    """Return the median of each phase over the rounds, and their sum."""
    result = {
        phase: {
            kind: statistics.median(found[phase][index] for found in rounds)
            for index, kind in enumerate(("wall_s", "cpu_s"))
        }
        for phase in PHASES
    }
    result["sum"] = {kind: sum(result[phase][kind] for phase in PHASES) for kind in ("wall_s", "cpu_s")}
    return result


def main() -> None:
    """Run the rounds and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="a git revision to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--port", type=int, default=29731)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        launcher = ["deepspeed", "--num_gpus", "1", "--master_port", str(options.port)]
        starts = {"one process": (REPOSITORY, [sys.executable]), "launcher": (REPOSITORY, launcher)}
        if options.against:
            starts[f"launcher, {options.against}"] = (folder / "tree", launcher)
            git = ["git", "-C", str(REPOSITORY), "worktree"]
            subprocess.run([*git, "add", "--detach", str(folder / "tree"), options.against], check=True)
        try:
            write = [sys.executable, "-m", "superoffload.commands", "tiny", "write", str(folder / "start")]
            subprocess.run(write, check=True, cwd=REPOSITORY)
            rounds: dict[str, list[Marks]] = {name: [] for name in starts}
            for number in range(options.rounds + 1):
                for name, (tree, command) in starts.items():
                    output = Path(tempfile.mkdtemp(dir=folder))
                    marks = measure(tree, folder / "start", output, command)
                    if number:  # the first run fills the caches
                        rounds[name].append(marks)
        finally:
            if options.against:
                subprocess.run([*git, "remove", "--force", str(folder / "tree")], check=True)
    found = {name: medians(list_) for name, list_ in rounds.items()}
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "startup.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (options.results / "startup.md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    if MARKS in os.environ:
        run_rank(Path(os.environ[MARKS]))
    else:
        main()
