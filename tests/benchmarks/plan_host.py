"""Compare the host memory that `superoffload.planning` predicts with that of runs.

    python tests/benchmarks/plan_host.py [--cases NAME ...] [--again]

Each case is a run of the program under its launcher on the CPU, where the host holds the device's part too. Memory is
that of all processes, sampled ten times a second from /proc/PID/smaps_rollup: private pages, and shared ones counted
once; the pages of files are not counted. Writes plan_host.md and plan_host.json after every case, and keeps the cases
that an earlier call has measured. Needs 6 GiB of memory.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.planning.budget import disk
from tests.helpers.host_memory import described, follow, predicted
from tests.helpers.models import write_model, write_rows
from tests.helpers.ranks import REPOSITORY

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 0.10
SIZES: dict[str, dict[str, Any]] = {
    "0.1 M": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
    "28 M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 2048},
    "124 M": {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 12, "vocab_size": 4096},
    "180 M": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 13, "vocab_size": 6144},
}
SAVE = ("--save_checkpoint",)
CASES: list[tuple[str, str, int, tuple[str, ...]]] = [
    *((size, mode, 1, ()) for size in SIZES for mode in ("superoffload", "zerooffload")),
    ("28 M", "superoffload", 2, ()),
    ("28 M", "zerooffload", 2, ()),
    ("124 M", "superoffload", 2, ()),
    ("28 M", "superoffload", 1, SAVE),
    ("28 M", "zerooffload", 1, SAVE),
    ("124 M", "superoffload", 1, ("--optimizer_state", "bf16")),
    ("124 M", "superoffload", 1, ("--gradient_accumulation_steps", "2")),
    ("124 M", "zerooffload", 1, ("--offload_ratio", "0.5")),
    ("28 M", "superoffload", 1, ("--offload_ratio", "0.5")),
]


def name_of(case: tuple[str, str, int, tuple[str, ...]]) -> str:
    size, mode, ranks, flags = case
    return ", ".join([size, mode, f"{ranks} rank{'s' if ranks > 1 else ''}", *([" ".join(flags)] if flags else [])])


def flags_of(work: Path, size: str, mode: str, *more: str) -> list[str]:
    """Return the flags of a run of three steps on short rows."""
    return [
        *("--model_name", str(work / size), "--dataset_name", str(work / "rows.json")),
        *("--output_dir", str(work / "out"), "--deepspeed_config", str(REPOSITORY / f"configs/{mode}.json")),
        *("--max_length", "64", "--batch_size", "1", "--no_packing", "--log_interval", "1", "--max_steps", "3"),
        *("--sub_group_size", "20e6", *more),
    ]


def run_case(work: Path, case: tuple[str, str, int, tuple[str, ...]]) -> dict[str, Any]:
    """Measure a case, and for one that saves also the run that resumes from its checkpoint."""
    size, mode, ranks, more = case
    flags = flags_of(work, size, mode, *more)
    trace = follow(ranks, *flags)
    if trace.returncode:
        sys.exit("\n".join(line for _, line in trace.lines[-40:]))
    found: dict[str, Any] = {"name": name_of(case), "measured": trace.phases(), "predicted": predicted(ranks, *flags)}
    full = [size for size in trace.shared if size > max(trace.shared) / 2]
    found["shared"] = int(statistics.median(full)) if full else 0
    if "--save_checkpoint" in more:
        (folder,) = (work / "out").glob("global_step*")
        found["checkpoint"] = sum(path.stat().st_size for path in folder.iterdir())
        found["checkpoint_predicted"] = disk.checkpoint_bytes(*described(ranks, *flags))
        longer = [*flags[: flags.index("3")], "5", *flags[flags.index("3") + 1 :], "--resume", "auto"]
        again = follow(ranks, *longer)
        if again.returncode:
            sys.exit("\n".join(line for _, line in again.lines[-40:]))
        found["measured"]["resuming"] = again.phases()["first step"]
    else:
        found["measured"].pop("saving", None)
    shutil.rmtree(work / "out")
    return found


def error(case: dict[str, Any], phase: str) -> float:
    """Return by what share the prediction exceeds the measurement."""
    return float(case["predicted"][phase] / case["measured"][phase] - 1)


def report(cases: list[dict[str, Any]]) -> str:
    """Return a table of all cases."""
    phases = ["loading", "first step", "steady", "saving", "resuming"]
    lines = [
        "# Host memory, predicted and measured",
        "",
        "By `python tests/benchmarks/plan_host.py`, with two CPU cores: predicted / measured, in GB, and by how much",
        "the prediction is above the measurement. Steady is the median over the steps, the others are peaks.",
        "",
        "Two kinds of numbers were taken from these runs: the memory of each process, from the smallest model, and the",
        "freed memory that the C library keeps where the CPU is the device (`FREED_BYTES` in",
        "`planning/budget/host.py`). The latter is up to 6 bytes per parameter and differs from run to run; it does",
        "not exist with a device.",
        "",
        "| case | " + " | ".join(phases) + " |",
        "| --- " * (len(phases) + 1) + "|",
    ]
    for case in cases:
        cells = []
        for phase in phases:
            if phase not in case["measured"]:
                cells.append("")
                continue
            guess, real = (case[key][phase] / 1e9 for key in ("predicted", "measured"))
            cells.append(f"{guess:.2f} / {real:.2f} ({100 * error(case, phase):+.0f} %)")
        lines.append(f"| {case['name']} | " + " | ".join(cells) + " |")
    lines += ["", "Checkpoints, predicted / real, in bytes:", ""]
    for case in cases:
        if "checkpoint" in case:
            lines.append(f"* {case['name']}: {case['checkpoint_predicted']:,} / {case['checkpoint']:,}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure what is missing; return 1 if a prediction is off by more than the limit."""
    parser = argparse.ArgumentParser(description="Compare predicted and measured host memory.")
    parser.add_argument("--cases", nargs="*", default=[], help="parts of the names of the cases to run")
    parser.add_argument("--again", action="store_true", help="repeat cases that have been measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    stored = options.out / "plan_host.json"
    known = {case["name"]: case for case in json.loads(stored.read_text())["cases"]} if stored.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_rows(work / "rows.json", 64)
        for case in CASES:
            name = name_of(case)
            if not (work / case[0]).exists():
                write_model(work / case[0], num_attention_heads=8, num_key_value_heads=8, **SIZES[case[0]])
            if name in known and not options.again:
                flags = flags_of(work, case[0], case[1], *case[3])
                known[name]["predicted"] = predicted(case[2], *flags)
            elif not options.cases or any(part in name for part in options.cases):
                known[name] = run_case(work, case)
                print(json.dumps(known[name]), flush=True)
            cases = [known[name_of(case)] for case in CASES if name_of(case) in known]
            stored.write_text(json.dumps({"cases": cases}, indent=1) + "\n", encoding="utf-8")
            (options.out / "plan_host.md").write_text(report(cases), encoding="utf-8")
    print(report(cases))
    return int(any(abs(error(case, phase)) > LIMIT for case in cases for phase in case["measured"]))


if __name__ == "__main__":
    sys.exit(main())
