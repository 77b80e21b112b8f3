"""Train small random models of many architectures for a step, and compare with plain transformers.

    python tests/benchmarks/architectures.py [FAMILY ...]

Compares loss and gradient norm of the first step, unpacked and packed, in float32, and an export with the trained
weights. Runs in processes of a few families each; a family that ends its process is reported, and the others go on.
Writes results/architectures.json and the table docs/architectures.md; with families named, only those are measured
again. Exits with status 1 if a family differs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
RESULTS = Path(__file__).parent / "results" / "architectures.json"
TABLE = REPOSITORY / "docs" / "architectures.md"
BATCH = 8  # families per process
TIMEOUT_S = 1800
MARK = "RESULT "
HEAD = """# Architectures

Small random models of {count} families, trained for one step in float32 on one rank. This page is written by
`python tests/benchmarks/architectures.py`, here with transformers {transformers}, torch {torch} and DeepSpeed
{deepspeed}. Loss and gradient norm of the first step are compared with plain transformers, which gets one document at a
time. *Equal* means that they differ by less than 0.02 %, and that every exported weight is the trained one, bit for
bit. *Refused* means that the test at the start finds that packed rows would see each other, or that the model does not
take packed rows; such models are trained with `--no_packing`.

| family | parameters | loss | gradient norm | unpacked | packed | export |
| --- | --- | --- | --- | --- | --- | --- |
"""


def work(kinds: list[str]) -> None:
    """Measure families in this process; print one line of JSON for each."""
    from superoffload import distributed
    from tests.helpers.architectures import measure

    distributed.init()
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                result: dict[str, Any] = measure(kind, Path(folder))
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(MARK + json.dumps({"kind": kind, **result}), flush=True)


def measure_all(kinds: list[str]) -> dict[str, Any]:
    """Measure families in processes of their own; return the results by family."""
    results: dict[str, Any] = {}
    waiting = list(kinds)
    while waiting:
        batch = waiting[:BATCH]
        command = [sys.executable, str(Path(__file__)), "--worker", *batch]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
            output, how = done.stdout, f"ended the process with status {done.returncode}"
        except subprocess.TimeoutExpired as late:
            output = (late.stdout or b"").decode()
            how = f"took longer than {TIMEOUT_S} s"
        lines = [json.loads(line[len(MARK) :]) for line in output.splitlines() if line.startswith(MARK)]
        found = {line.pop("kind"): line for line in lines}
        missing = [kind for kind in batch if kind not in found]
        if missing:
            found[missing[0]] = {"error": how}
        results |= found
        waiting = [kind for kind in waiting if kind not in found]
        for kind, result in found.items():
            sys.stderr.write(f"{kind}: {'; '.join(verdict(result)) or 'equal'}\n")
    return results


def verdict(result: dict[str, Any]) -> list[str]:
    """List what is wrong with a family; empty if nothing is."""
    from tests.helpers.architectures import differences

    return [result["error"]] if "error" in result else differences(result)


def table(results: dict[str, Any]) -> str:
    """Return docs/architectures.md."""
    from importlib.metadata import version

    versions = {name: version(name).partition("+")[0] for name in ("transformers", "torch", "deepspeed")}
    lines = [HEAD.format(count=len(results), **versions)]
    for kind, result in sorted(results.items()):
        if "error" in result:
            lines.append(f"| {kind} | | | | {result['error']} | | |\n")
            continue
        wrong = "; ".join(verdict(result))
        packed = "refused" if isinstance(result["packed"], str) else "equal"
        ways = (wrong, wrong, wrong) if wrong else ("equal", packed, "equal")
        frozen = f" ({result['frozen']:,} frozen)" if result["frozen"] else ""
        loss, norm = result["plain"]
        lines.append(f"| {kind} | {result['parameters']:,}{frozen} | {loss:.4f} | {norm:.4f} | {' | '.join(ways)} |\n")
    return "".join(lines)


def main() -> int:
    """Measure, write the results, and return the exit status."""
    from tests.helpers.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="families to measure; default: all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    kinds = options.families or list(FAMILIES)
    if unknown := [kind for kind in kinds if kind not in FAMILIES]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(FAMILIES)}")
    if options.worker:
        work(kinds)
        return 0
    before = json.loads(RESULTS.read_text()) if options.families and RESULTS.exists() else {}
    results = {**before, **measure_all(kinds)}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    TABLE.write_text(table(results), encoding="utf-8")
    return int(any(verdict(result) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
