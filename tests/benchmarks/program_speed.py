"""Measure what the program adds to the engine, what that adds to the model, and how well the model uses the machine.

    python tests/benchmarks/program_speed.py --data alpaca_en_demo.json

In both modes, three loops take turns on the same batches: the steps of the program itself; a bare loop of the same
engine calls (loss, backward, step) in the same process; forward and backward of the same model without DeepSpeed, in
another process. Where their memory lies differs from start to start, and so does their speed, by several percent: both
processes are restarted --starts times. Their first passes over the batches are left out: in these the heap still
grows, by several hundred thousand pages. Then forward and backward at hidden size 512 and 1024 take turns with a large
product of bf16 matrices, whose rate is what the machine reaches. Writes program_speed.md and program_speed.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import program_turns, whole_runs
from tests.benchmarks.offload_speed import STEADY_ALLOCATOR
from tests.benchmarks.program_turns import process
from tests.benchmarks.rounds import Bar, Spread, bars_table, ratio, spread, turns, write

MODES = ("superoffload", "zerooffload")
PROGRAM_BAR, ENGINE_BAR, OPTIMIZER_SHARE = 1.03, 1.08, 0.1
RATE_BARS = {1: 0.7, 2: 0.8}  # by how many times the hidden size is
# A waiting thread sleeps. By default it spins, at length only in a process with no more threads than cores: in that of
# the model alone but not in the program. On cores that others use too, this doubles the time of the model.
STEADY = {**STEADY_ALLOCATOR, "OMP_WAIT_POLICY": "PASSIVE"}
LOOPS = ("program", "bare loop", "without DeepSpeed")
Loops = dict[str, list[list[float]]]  # the seconds of the steps of each loop, by round
WARM_UP = 2  # passes over the batches before the first turn


def flags_of(options: argparse.Namespace, model: Path, mode: str, output: Path) -> list[str]:
    """Return the flags of the program; its epochs suffice for any number of turns."""
    flags = {
        "model_name": model,
        "dataset_name": options.data,
        "output_dir": output,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "num_train_epochs": 1000,
        "deepspeed_config": whole_runs.ds_config_of(mode),
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def compare_loops(program: program_turns.Turn, alone: program_turns.Turn, folder: str, rounds: int) -> Loops:
    """Let the loops take turns; return the times of their steps by round, and those of the optimizer.

    The first step of each turn is left out: in the program's loop, it includes the start of the loop.
    """
    times: Loops = {name: [] for name in (*LOOPS, "optimizer")}
    for name in turns(LOOPS, rounds):
        if name == "program":
            times[name].append(program.ask("whole")[1:])
        elif name == "bare loop":
            steps = program.ask("bare_loop")[1:]
            times[name].append([step for step, _ in steps])
            times["optimizer"].append([optimizer for _, optimizer in steps])
        else:
            times[name].append(alone.ask("forward_backward", folder)[1:])
        print(f"{name}: {' '.join(f'{t:.3f}' for t in times[name][-1])} s", file=sys.stderr, flush=True)
    return times


def shares_of_rate(alone: program_turns.Turn, folders: dict[int, str], rounds: int) -> dict[str, Any]:
    """Let the models take turns, the matrix product before and after each; return rates in FLOP/s, by round."""
    rates: dict[str, Any] = {"product": [], **{str(hidden): [] for hidden in folders}}
    shares: dict[str, list[float]] = {str(hidden): [] for hidden in folders}
    for name in turns([str(hidden) for hidden in folders], rounds):
        folder = folders[int(name)]
        before = alone.ask("product_flops_per_s")
        times, flops = alone.ask("forward_backward", folder), alone.ask("flops", folder)
        product = (before + alone.ask("product_flops_per_s")) / 2
        rates["product"].append(product)
        rates[name].append(sum(flops[1:]) / sum(times[1:]))
        shares[name].append(rates[name][-1] / product)
        print(f"hidden {name}: {shares[name][-1]:.1%} of {product / 1e12:.3f} TFLOP/s", file=sys.stderr, flush=True)
    return {"flops_per_s": rates, "shares": shares}


def loops_of(options: argparse.Namespace, folder: str, mode: str, output: Path) -> tuple[Loops, bytes]:
    """Start both processes and let the loops of a mode take turns; return their times, and facts for another model."""
    with process(program_turns.program, flags_of(options, Path(folder), mode, output), options.steps + 1) as program:
        facts = program.ask("facts")
        with process(program_turns.without_deepspeed, [folder], facts) as alone:
            for _ in range(WARM_UP):
                alone.ask("forward_backward", folder), program.ask("bare_loop")
            return compare_loops(program, alone, folder, options.rounds), facts


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Measure both modes in turns, start by start, then the shares of the machine's rate."""
    shape = whole_runs.shape_of(options)
    folders: dict[int, str] = {}
    for hidden in (times * shape.hidden for times in RATE_BARS):
        made = whole_runs.write_model(work / f"model{hidden}", options.data, replace(shape, hidden=hidden))
        folders[hidden] = str(made)
    first = folders[shape.hidden]
    loops: dict[str, Loops] = {mode: {} for mode in MODES}
    for number, mode in enumerate(turns(MODES, options.starts)):
        print(mode, file=sys.stderr, flush=True)
        times, facts = loops_of(options, first, mode, work / f"output{number}")
        for name, rounds in times.items():
            loops[mode].setdefault(name, []).extend(rounds)
    with process(program_turns.without_deepspeed, list(folders.values()), facts) as alone:
        alone.ask("forward_backward", first)
        return {"step_times_s": loops, **shares_of_rate(alone, folders, options.rounds)}


def quotients(first: list[list[float]], second: list[list[float]]) -> Spread:
    """Return the spread of the quotients of the times of the same steps in the same rounds."""
    return ratio([t for turn in first for t in turn], [t for turn in second for t in turn])


def bars_of(found: dict[str, Any]) -> list[Bar]:
    """Return how the loops compare, and the shares of the machine's rate."""
    bars = []
    for mode, times in found["step_times_s"].items():
        program, loop, alone = (times[name] for name in LOOPS)
        bars.append(
            Bar(
                what=f"step of the program / bare loop of the engine calls, {mode}",
                limit=PROGRAM_BAR,
                found=quotients(program, loop),
                at_least=False,
                form=".3f",
            )
        )
        bars.append(
            Bar(
                what=f"engine calls / forward and backward without DeepSpeed, {mode}",
                limit=ENGINE_BAR,
                found=quotients(loop, alone),
                at_least=False,
                form=".3f",
            )
        )
    for (hidden, shares), limit in zip(found["shares"].items(), RATE_BARS.values(), strict=True):
        what = f"forward and backward / matrix product, FLOP/s, hidden {hidden}"
        bars.append(Bar(what=what, limit=limit, found=spread(shares), form=".0%"))
    return bars


def report(found: dict[str, Any]) -> list[str]:
    """Write the measurements as lines of Markdown."""
    product = spread([rate / 1e12 for rate in found["flops_per_s"]["product"]])
    lines = whole_runs.heading("What the program and DeepSpeed add to a step", found)
    lines += [
        f"{found['starts']} starts, {found['rounds']} rounds in turns in each, {found['steps']} steps each, on the "
        "same batches. FLOPs as counted by superoffload/model/flops.py. Product of bf16 matrices of "
        f"{program_turns.PRODUCT} x {program_turns.PRODUCT}: {product.show('.3f')} TFLOP/s. Ratios are those of the "
        "same step in the same round.",
        "",
        *bars_table(bars_of(found)),
        "",
        "| step in seconds | " + " | ".join(found["step_times_s"]) + " |",
        "| --- |" + " --- |" * len(found["step_times_s"]),
    ]
    for name in (*LOOPS, "optimizer"):
        cells = [spread([t for turn in times[name] for t in turn]) for times in found["step_times_s"].values()]
        lines.append(f"| {name} | {' | '.join(cell.show('.3f') for cell in cells)} |")
    shares = [quotients(times["optimizer"], times["without DeepSpeed"]) for times in found["step_times_s"].values()]
    largest = max(share.median for share in shares)
    side = "less" if largest < OPTIMIZER_SHARE else "**more**"
    return [
        *lines,
        "",
        f"The bar for the engine calls is meant for an optimizer that takes less than {OPTIMIZER_SHARE:.0%} of forward "
        f"and backward; here it takes {side}: `engine.step()` takes {largest:.1%}.",
    ]


def main() -> None:
    """Measure and write the results."""
    parser = whole_runs.parser(__doc__, rounds=2, steps=2)
    parser.add_argument("--starts", type=int, default=3, help="start the processes so many times, rounds in each")
    options = parser.parse_args()
    options.data = options.data.resolve()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(options.threads), **STEADY}
    with whole_runs.work_folder() as work:
        found = whole_runs.circumstances("program_speed.py", options)
        found |= {"command": f"{found['command']} --starts {options.starts}", "starts": options.starts}
        found |= measure(options, work)
    found["bars"] = [bar.as_dict() for bar in bars_of(found)]
    write(options.results, "program_speed", found, report(found))


if __name__ == "__main__":
    main()
