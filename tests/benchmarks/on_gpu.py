"""Test and measure on a CUDA device; see on_gpu.sh."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu import report
from tests.benchmarks.gpu.machine import DEVICE_GIB, problems
from tests.benchmarks.gpu.parts import PART_LIST, Part
from tests.benchmarks.gpu.programs import Bench, PartError
from tests.benchmarks.gpu.report import FAILED, OK, SKIPPED, Result
from tests.helpers.ranks import REPOSITORY

RESULTS = Path(__file__).parent / "results"
NAMES = [part.name for part in PART_LIST]
COMPILE_LIMIT_S = 3600.0


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="on_gpu.sh", description="Test and measure on a CUDA device.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one or more of {', '.join(NAMES)}; default all")
    parser.add_argument("--rehearse", action="store_true", help="run every part small, on the CPU")
    parser.add_argument("--again", action="store_true", help="repeat parts that an earlier call has finished")
    parser.add_argument("--work", type=Path, help="folder of models, logs and finished parts (default on_gpu_output)")
    parser.add_argument(
        "--results", type=Path, help="folder of on_gpu.md and on_gpu.json (default: that of all results)"
    )
    parser.add_argument("--part-limit-s", type=float, default=600.0, help="end a part after this many seconds")
    options = parser.parse_args(argv)
    unknown = [name for name in options.parts if name not in NAMES]
    if unknown:
        parser.error(f"unknown part {unknown[0]}; one of {', '.join(NAMES)}")
    options.work = options.work or REPOSITORY / ("rehearsal_output" if options.rehearse else "on_gpu_output")
    options.work = options.work.resolve()
    options.results = options.results or (options.work if options.rehearse else RESULTS)
    return options


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def describe_machine() -> dict[str, Any]:
    """Return what the machine has, asked by a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.gpu.machine"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_part(part: Part, bench: Bench) -> Result:
    """Run a part; a failure of any kind is its result."""
    skipped = part.skipped_because(bench.machine, bench.rehearse)
    if skipped:
        return Result(name=part.name, what=part.what, result=SKIPPED, time_s=0.0, why=skipped)
    started = time.monotonic()
    rows: list[report.Row] = []
    data: dict[str, Any] = {}
    why = ""
    try:
        rows, data = part.run(bench)
    except PartError as error:
        why = str(error)
    except Exception:
        why = (
            "the part itself failed: " + traceback.format_exc().strip().splitlines()[-1] + "\n" + traceback.format_exc()
        )
    outcome, time_s = FAILED if why else OK, time.monotonic() - started
    return Result(name=part.name, what=part.what, result=outcome, time_s=time_s, why=why, rows=rows, data=data)


def main(argv: list[str]) -> int:
    """Run the parts; return 0 if none failed, 1 if one did, 2 if the machine lacks something."""
    options = parse(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    found = problems(machine, options.work, options.rehearse)
    if found:
        print("\n".join(f"Error: {problem}" for problem in found), file=sys.stderr)
        return 2
    if not options.rehearse and machine["device_free_gib"] < DEVICE_GIB:
        say(
            f"Warning: {machine['device_free_gib']:.0f} GiB of device memory are free; some parts need {DEVICE_GIB} GiB"
        )

    def bench(name: str, limit_s: float = options.part_limit_s) -> Bench:
        deadline = time.monotonic() + limit_s
        return Bench(part=name, rehearse=options.rehearse, work=options.work, machine=machine, deadline=deadline)

    started = time.monotonic()
    try:
        bench("operators", COMPILE_LIMIT_S).run("-m", "tests.helpers.operators")
    except PartError as error:
        print(f"Error: the operators cannot be compiled: {error}", file=sys.stderr)
        return 2
    say(f"operators: compiled in {time.monotonic() - started:.0f} s")

    mark = report.fingerprint(machine, options.rehearse)
    finished = options.work / "parts"
    wanted = options.parts or NAMES
    results: dict[str, Result] = {}
    for part in PART_LIST:
        earlier = report.kept(finished, mark, part.name)
        if earlier and not (options.again and part.name in wanted):
            results[part.name] = earlier
            if part.name in wanted:
                say(f"{part.name}: finished earlier")
        elif part.name in wanted:
            say(f"{part.name}: {part.what} ...")
            result = results[part.name] = run_part(part, bench(part.name))
            say(f"{part.name}: {result.result} in {result.time_s:.0f} s{': ' + result.why if result.why else ''}")
            if result.result == OK:
                report.keep(finished, mark, result)
        report.write(options.results, machine, options.rehearse, list(results.values()))
    say((options.results / "on_gpu.md").read_text(encoding="utf-8"))
    return int(any(result.result == FAILED for result in results.values()))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("Interrupted; the same command continues with the part that was not finished", file=sys.stderr)
        sys.exit(130)
