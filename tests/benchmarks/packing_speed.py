"""Measure packing: speed compared with padding to the full length, equality of losses, memory for many rows.

    python tests/benchmarks/packing_speed.py --data alpaca_en_demo.json

The two speeds come from whole runs of the program under its launcher, which take turns: a random Llama of hidden size
512 and 8 layers, max_length 2048, batch size 4. Writes packing_speed.md and packing_speed.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks import whole_runs
from tests.benchmarks.rounds import Bar, bars_table, ratio, spread, turns, write

BAR = 15.0
PADDING = {"packing": (), "padding_max_length": ("--padding", "max_length")}
CURVE_LENGTH = 1024
CURVE_SHAPE = whole_runs.Shape(hidden=128, layers=2, max_length=CURVE_LENGTH, batch_size=1)
GIB = 2**30


def speed(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train packed and padded in turns; return their step times and rates, one per round, and their last summaries."""
    shape = whole_runs.shape_of(options)
    rows = whole_runs.tokenised(model, options.data, shape.max_length)
    targets = {name: whole_runs.targets_per_step(rows, shape, packs=not flags) for name, flags in PADDING.items()}
    times: dict[str, list[float]] = {name: [] for name in PADDING}
    summaries: dict[str, Any] = {}
    for name in turns(list(PADDING), options.rounds):
        timed = whole_runs.train(model, options, *PADDING[name], ds_config=options.deepspeed_config)
        times[name].append(timed.step_time_s)
        summaries[name] = timed.summary
        print(f"{name}: {timed.step_time_s:.2f} s a step", file=sys.stderr, flush=True)
    rates = {name: [targets[name] / time_s for time_s in times[name]] for name in PADDING}
    return {
        "targets_per_step": targets,
        "step_times_s": times,
        "target_tokens_per_s": rates,
        "summaries": summaries,
    }


def curves(model: Path, data: Path, steps: int) -> dict[str, Any]:
    """Train twice over the same rows in the same steps, packed and padded, and compare the losses."""
    packed, padded = (_curve(model, data, steps, packs) for packs in (True, False))
    return {
        "steps": steps,
        "first_loss": packed[0][0],
        "last_loss": packed[-1][0],
        "same_target_tokens": [targets for _, targets in packed] == [targets for _, targets in padded],
        "largest_difference": max(abs(a - b) for (a, _), (b, _) in zip(packed, padded, strict=True)),
        "packed": [loss for loss, _ in packed],
        "padded": [loss for loss, _ in padded],
    }


def _curve(model: Path, data: Path, steps: int, packs: bool) -> list[tuple[float, int]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from superoffload.config import DataSettings, TrainingSettings
    from superoffload.data import loader
    from superoffload.data.collate import Layout, collate
    from superoffload.model.head import summed_loss
    from superoffload.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    rows, _ = loader.load(tokenizer, DataSettings(dataset_name=(str(data),), max_length=CURVE_LENGTH), 0)
    layout = Layout(packs=True, full_length=False, max_length=CURVE_LENGTH, pad_token_id=0)
    batches = loader.Batches(rows, layout, TrainingSettings(), rank=0, world_size=1)
    members, bounds = batches.packs.rows(rows.lengths), batches.packs.bounds
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(**CURVE_SHAPE.llama()))
    network.config.use_cache = False
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    result = []
    for step in range(steps):
        documents = rows.read(members[bounds[step] : bounds[step + 1]].tolist())
        if packs:
            batch = collate([documents], 1, layout)
        else:
            single = Layout(packs=False, full_length=False, max_length=CURVE_LENGTH, pad_token_id=0)
            batch = collate([[row] for row in documents], len(documents), single)
        inputs = batch.on("cpu")
        labels = inputs.pop("labels")
        loss = summed_loss(network(**inputs).logits, labels) / batch.target_tokens
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        result.append((float(loss.detach()), batch.target_tokens))
    return result


def memory(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokenise and pack many rows in a process of its own, and return the peak growth of its memory."""
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder) / "rows.json"
        rng = random.Random(0)
        rows = json.loads(options.data.read_text(encoding="utf-8"))
        pool = [word for row in rows for text in row.values() for word in text.split()]
        likes = [rng.choice(rows) for _ in range(options.rows)]
        made = [{k: " ".join(rng.choices(pool, k=len(v.split()))) for k, v in like.items()} for like in likes]
        many.write_text(json.dumps(made), encoding="utf-8")
        command = [sys.executable, __file__, "--data", str(many), "--only_memory", str(model)]
        command += ["--max_length", str(options.max_length)]
        env = {**os.environ, "HF_DATASETS_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env, timeout=1800)
        return {"rows": options.rows, "file_bytes": many.stat().st_size, **json.loads(done.stdout.splitlines()[-1])}


def measure_memory(model: str, data: str, max_length: int) -> dict[str, Any]:
    """Prepare everything for training in this process; return its memory before and the peak growth, in bytes."""
    import resource
    import time

    import psutil

    from superoffload.config import DataSettings, TrainingSettings
    from superoffload.data import collate, loader
    from superoffload.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    tokenizer("warm")
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    settings = DataSettings(dataset_name=(data,), max_length=max_length)
    rows, _ = loader.load(tokenizer, settings, 0)
    layout = collate.choose_layout(settings, 0, False)
    batches = loader.Batches(rows, layout, TrainingSettings(batch_size=4), rank=0, world_size=1)
    next(batches.epoch(0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statistics = batches.statistics()
    return {
        "before_bytes": before,
        "growth_bytes": peak - before,
        "tokens": statistics.tokens,
        "packs": statistics.packs,
        "fill": statistics.fill,
        "time_s": time.perf_counter() - start,
    }


def bar_of(found: dict[str, Any]) -> Bar:
    """Return how packing compares with padding."""
    rates = found["target_tokens_per_s"]
    compared = ratio(rates["packing"], rates["padding_max_length"])
    return Bar(what="target tokens/s, packing / padding to max_length", limit=BAR, found=compared)


def report(found: dict[str, Any]) -> list[str]:
    """Write the measurements as lines of Markdown."""
    lines = whole_runs.heading("Packing", found)
    lines += [
        *whole_runs.method(found),
        "| rows | target tokens/s | step in seconds | target tokens in a step | padding |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in PADDING:
        rates, times = spread(found["target_tokens_per_s"][name]), spread(found["step_times_s"][name])
        lines.append(
            f"| {name} | {rates.show('.0f')} | {times.show('.2f')} | {found['targets_per_step'][name]:.0f} | "
            f"{found['summaries'][name]['padding_share']:.1%} |"
        )
    curve, grown = found["curves"], found["memory"]
    return [
        *lines,
        "",
        *bars_table([bar_of(found)]),
        "",
        f"Losses of packed and padded training on the same rows, with the same target tokens in each of "
        f"{curve['steps']} steps (fp32): from {curve['first_loss']:.4f} to {curve['last_loss']:.4f}, "
        f"largest difference {curve['largest_difference']:.1e}.",
        "",
        f"{grown['rows']:,} synthetic rows of the same lengths ({grown['tokens']:,} tokens, {grown['packs']:,} packs "
        f"{grown['fill']:.2%} full): tokenised, packed and ready in {grown['time_s']:.0f} s, memory grown by "
        f"{grown['growth_bytes'] / GIB:.2f} GiB at its peak.",
    ]


def main() -> None:
    """Run all measurements and write the results."""
    parser = whole_runs.parser(__doc__, rounds=3, steps=3)
    parser.add_argument("--curve_steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--deepspeed_config", type=Path, default=whole_runs.ds_config_of("zerooffload"))
    parser.add_argument("--only_memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.data = options.data.resolve()
    if options.only_memory:
        print(json.dumps(measure_memory(options.only_memory, str(options.data), options.max_length)))
        return
    with whole_runs.work_folder() as work:
        model = whole_runs.write_model(work / "model", options.data, whole_runs.shape_of(options))
        found = whole_runs.circumstances("packing_speed.py", options)
        found |= speed(model, options)
        found["curves"] = curves(model, options.data, options.curve_steps)
        found["memory"] = memory(model, options)
    found["bars"] = [bar_of(found).as_dict()]
    write(options.results, "packing_speed", found, report(found))


if __name__ == "__main__":
    main()
