"""The picture of the report in the documentation: `python -m superoffload.reporting.example docs/report.png`.

Needs Chromium. The numbers are made up, those of a run of Llama 3.1 8B on one device.
"""

import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superoffload import config, config_file
from superoffload.errors import UserError
from superoffload.reporting import records, report

GIB = 2**30
STEPS = 3000
STARTED_AT = 1.7955e9
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = (1200, 1085)


def write(folder: Path) -> None:
    """Write the records of the example to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(1)
    lines = [_step(step, dice) for step in range(10, STEPS + 1, 10)]
    lines += [_evaluation(step) for step in range(300, STEPS + 1, 300)]
    samples = [
        {"step": 300, "prompts": list(PROMPTS), "answers": ["The heat goes away because the air is", "Paris, France"]},
        {"step": STEPS, "prompts": list(PROMPTS), "answers": list(ANSWERS)},
    ]
    settings = {
        "model_name": "meta-llama/Llama-3.1-8B", "output_dir": folder.name, "lr": 1e-5, "max_length": 4096,
        "batch_size": 4, "activation_checkpointing": True, "num_train_epochs": 2, "eval_percentage": 2.0,
        "eval_steps": 300, "sample_prompts": "prompts.txt", "save_checkpoint": True, "export": True,
    }  # fmt: skip
    texts = {
        records.METRICS_FILE: "".join(json.dumps(line) + "\n" for line in lines),
        records.SAMPLES_FILE: "".join(json.dumps(line) + "\n" for line in samples),
        records.SETTINGS_FILE: config_file.write(config.build(settings)),
        records.RUN_FILE: json.dumps(_run(), indent=1),
        records.SUMMARY_FILE: json.dumps({"global_step": STEPS, "ended_at": STARTED_AT + 9420, "stopped_by": None}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    export = folder / f"model_step{STEPS}"
    export.mkdir(exist_ok=True)
    (export / "config.json").write_text("{}", encoding="utf-8")


PROMPTS = ("Why does tea get cold faster in a wide cup?", "Name the capital of France.")
ANSWERS = ("A wide cup exposes more of the tea's surface to the air, so it loses heat faster.", "Paris.")


def _loss(step: float) -> float:
    return 0.92 + 0.6 * math.exp(-step / 220) - 0.05 * step / STEPS


def _step(step: int, dice: random.Random) -> dict[str, Any]:
    time_s = 3.1 + dice.gauss(0, 0.02)
    norm = 0.72 + 0.9 * math.exp(-step / 150) + abs(dice.gauss(0, 0.12))
    parts = {"data": 0.01, "forward": 0.71, "loss": 0.12, "backward": 1.98, "optimizer": 0.21}
    return {
        "step": step, "epoch": step / 1500, "loss": _loss(step) + dice.gauss(0, 0.025),
        "lr": 1e-5 * min(1.0, step / 30) * (1 + math.cos(math.pi * step / STEPS)) / 2, "grad_norm": norm,
        "step_time_s": time_s, "tokens_per_s": 32270 / time_s, "target_tokens_per_s": 21170 / time_s,
        "padding_share": 0.01, "tflops_per_gpu": 521.4, "hardware_tflops_per_gpu": 695.2,
        **{f"{name}_s": part_s * time_s / 3.1 for name, part_s in parts.items()},
        "host_bytes": int((138 + 4 * min(1, step / 200) + dice.random()) * GIB), "host_total_bytes": int(503.6 * GIB),
        "device_bytes": int(71.2 * GIB), "device_peak_bytes": int((112 + 6.6 * min(1, step / 400)) * GIB),
        "device_total_bytes": int(139.8 * GIB),
    }  # fmt: skip


def _evaluation(step: int) -> dict[str, Any]:
    loss = _loss(step) + 0.03 + 0.02 * step / STEPS
    return {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_target_tokens": 88214}


def _run() -> dict[str, Any]:
    bins = (3120, 11830, 14210, 10060, 6270, 3310, 1480, 520, 160, 42)
    return {
        "model": {"name": "meta-llama/Llama-3.1-8B", "parameters": 8030261248, "trained_parameters": 8030261248},
        "mode": "superoffload", "device": "NVIDIA H200", "ranks": 1, "total_steps": STEPS,
        "starts": [{"at": STARTED_AT, "step": 0}],
        "planned_memory": {
            "device_bytes": int(121.3 * GIB), "host_bytes": int(129 * GIB), "host_available_bytes": int(487 * GIB),
        },
        "data": {
            "rows": 51002, "tokens": 26_780_000, "target_tokens": 17_560_000, "longest": 2470,
            "counts": {"given": 51002, "truncated": 0, "dropped": 0, "bad": 0},
            "histogram": [[247 * (number + 1), count] for number, count in enumerate(bins)],
            "packed": True, "packs": 6000, "fill": 0.985, "steps_per_epoch": 1500, "sources": [],
        },
        "environment": {"superoffload": {"version": "0.1.0"}, "packages": {"torch": "2.13.0", "deepspeed": "0.19.8"}},
    }  # fmt: skip


def browser() -> str | None:
    """Return the path of Chromium, None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def photograph(page: Path, picture: Path, size: tuple[int, int], flags: Sequence[str] = ()) -> None:
    """Write a picture of a page in a window of so many pixels. Raises `UserError` without Chromium."""
    program = browser()
    if program is None:
        raise UserError(f"{picture}: needs Chromium, under one of the names {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory(prefix="superoffload-browser-") as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags,
                   f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}",
                   f"--screenshot={picture.resolve()}", page.resolve().as_uri()]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(picture: Path) -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory(prefix="superoffload-report-") as folder:
        out = Path(folder) / "llama-8b_output"
        write(out)
        photograph(report.write(out, out / report.REPORT_FILE), picture, SIZE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
