"""Compare the speed of the program with that of TRL's packed SFT, under the same launcher and DeepSpeed settings.

    python tests/benchmarks/trl_speed.py --data alpaca_en_demo.json

Whole runs take turns. Both train a random Llama on the same tokenised rows, on the same targets (the answers), packed,
in bf16, with ZeRO-3 and DeepSpeed's Adam on the host. TRL is installed into an environment of its own, which is kept in
.versions. Writes trl_speed.md and trl_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import whole_runs
from tests.benchmarks.rounds import Bar, bars_table, ratio, spread, turns, write
from tests.helpers.ranks import REPOSITORY, free_port, run

TRL = "trl==1.16.0"
BAR = 5.0
MODES = ("superoffload", "zerooffload")
LR = 1e-5
NAMES = {"trl": "TRL's packed SFT", **{mode: f"this program, {mode}" for mode in MODES}}


def environment() -> Path:
    """Install TRL and the pinned versions of what both programs use, once; return the environment's interpreter."""
    folder = REPOSITORY / ".versions" / TRL
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        pins = REPOSITORY / "scripts" / "constraints.txt"
        torch = next(line for line in pins.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
        install = [
            str(python),
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--constraint",
            str(pins),
        ]
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        # torch first, and without CUDA if there is such a build, as in scripts/setup.sh
        if subprocess.run([*install, f"{torch}+cpu"], stderr=subprocess.DEVNULL, check=False).returncode:
            subprocess.run([*install, torch], check=True)
        subprocess.run([*install, TRL, "deepspeed", "ninja"], check=True)
        (folder / "installed").touch()
    return python


def write_ds_configs(work: Path, options: argparse.Namespace) -> None:
    """Write the ds_config of each mode as the program resolves it, and that of zerooffload for TRL.

    TRL's names its optimizer, for which the Trainer then takes DeepSpeed's Adam.
    """
    from superoffload import cli
    from superoffload.ds_config import merge_flags, read_ds_config

    for mode in MODES:
        flags = ["--model_name", "m", "--dataset_name", "d", "--output_dir", "o", "--lr", str(LR)]
        flags += ["--batch_size", str(options.batch_size), "--deepspeed_config", str(whole_runs.ds_config_of(mode))]
        config = cli.parse(flags)
        resolved = merge_flags(read_ds_config(config), config, 1).ds_config
        (work / f"{mode}.json").write_text(json.dumps(resolved), encoding="utf-8")
    optimizer = {"type": "AdamW", "params": {"lr": LR, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}}
    (work / "trl.json").write_text(json.dumps({**resolved, "optimizer": optimizer}), encoding="utf-8")


def train_with_trl(python: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL under the launcher; return what tests/benchmarks/trl_sft.py found."""
    out = work / "found.json"
    port = free_port()
    command = [str(python.parent / "deepspeed"), "--num_gpus", "1", "--master_port", str(port)]
    command += [str(REPOSITORY / "tests/benchmarks/trl_sft.py"), "--model", str(work / "model")]
    command += ["--rows", str(work / "rows.parquet"), "--ds_config", str(work / "trl.json"), "--out", str(out)]
    command += ["--max_length", str(options.max_length), "--batch_size", str(options.batch_size)]
    command += ["--steps", str(options.steps + 1), "--lr", str(LR)]
    env = {"PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": str(options.threads)}
    if python != Path(sys.executable):  # nothing from this environment
        env |= {"PYTHONPATH": "", "TORCH_EXTENSIONS_DIR": str(python.parents[1] / "operators")}
    done = run(command, whole_runs.TIMEOUT_S, None, **env)
    # DeepSpeed leaves its buffer behind, 69 MB
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_0").unlink(missing_ok=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def measure(python: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Let the contenders take turns; return their step times, one per round, and their rates."""
    shape = whole_runs.shape_of(options)
    model = whole_runs.write_model(work / "model", options.data, shape)
    rows = whole_runs.tokenised(model, options.data, shape.max_length)
    rows.table.select_columns(["input_ids", "labels"]).to_parquet(str(work / "rows.parquet"))
    write_ds_configs(work, options)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    details: dict[str, Any] = {}
    for name in turns(list(NAMES), options.rounds):
        if name == "trl":
            details = train_with_trl(python, work, options)
            times[name].append(statistics.median(details["step_times_s"][1:]))
        else:
            timed = whole_runs.train(model, options, "--lr", str(LR), ds_config=work / f"{name}.json")
            times[name].append(timed.step_time_s)
        print(f"{NAMES[name]}: {times[name][-1]:.2f} s a step", file=sys.stderr, flush=True)
    ours = whole_runs.targets_per_step(rows, shape, packs=True)
    targets = {name: details["targets_per_step"] if name == "trl" else ours for name in NAMES}
    rates = {name: [targets[name] / time_s for time_s in times[name]] for name in NAMES}
    return {"targets_per_step": targets, "step_times_s": times, "target_tokens_per_s": rates, "trl": details}


def bars_of(found: dict[str, Any]) -> list[Bar]:
    """Return how the program's modes compare with TRL."""
    rates = found["target_tokens_per_s"]
    return [
        Bar(what=f"target tokens/s, {mode} / TRL", limit=BAR, found=ratio(rates[mode], rates["trl"])) for mode in MODES
    ]


def report(found: dict[str, Any]) -> list[str]:
    """Write the measurements as lines of Markdown."""
    trl = found["trl"]
    lines = whole_runs.heading("Speed compared with TRL's packed SFT", found)
    lines += [
        f"TRL {trl['trl']}, packing `{trl['packing_strategy']}` (its default), attention `{trl['attention']}`: the "
        f"documents of a pack {'do not see' if trl['documents_isolated'] else '**see**'} each other. In this program "
        "they never do. Both train on the same tokenised rows and targets, the answers, with the same settings of "
        "DeepSpeed (ZeRO-3, its Adam on the host), and without recomputation of activations.",
        "",
        *whole_runs.method(found),
        "| program | target tokens/s | step in seconds | target tokens in a step |",
        "| --- | --- | --- | --- |",
    ]
    for name, title in NAMES.items():
        rates, times = spread(found["target_tokens_per_s"][name]), spread(found["step_times_s"][name])
        lines.append(f"| {title} | {rates.show('.0f')} | {times.show('.2f')} | {found['targets_per_step'][name]:.0f} |")
    return [*lines, "", *bars_table(bars_of(found))]


def main() -> None:
    """Measure and write the results."""
    parser = whole_runs.parser(__doc__, rounds=3, steps=1)
    parser.add_argument("--python", type=Path, help="interpreter of an environment with TRL and DeepSpeed")
    options = parser.parse_args()
    options.data = options.data.resolve()
    python = options.python or environment()
    with whole_runs.work_folder() as work:
        found = whole_runs.circumstances("trl_speed.py", options)
        found |= measure(python, work, options)
    found["bars"] = [bar.as_dict() for bar in bars_of(found)]
    write(options.results, "trl_speed", found, report(found))


if __name__ == "__main__":
    main()
