"""Measure packing: speed compared with padding to the full length, equality of losses, memory for many rows.

    python tests/benchmarks/packing_speed.py --data alpaca_en_demo.json

The two speeds come from the program under its launcher, one run after the other: a random Llama of hidden size
512 and 8 layers, max_length 2048, batch size 4. Writes packing_speed.md and packing_speed.json.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers.ranks import launch

MAX_LENGTH = 2048
LLAMA: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": MAX_LENGTH,
    "eos_token_id": 0,
    "bos_token_id": None,
}
GIB = 2**30


def write_model(folder: Path, data: Path) -> None:
    """Write a random Llama and a byte-pair tokenizer trained on the rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=LLAMA["vocab_size"],
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rows = json.loads(data.read_text(encoding="utf-8"))
    inner.train_from_iterator([text for row in rows for text in row.values()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(str(folder))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA)).to(torch.bfloat16).save_pretrained(str(folder))


def speed(model: Path, data: Path, options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """Train a few steps under the launcher and return the run's summary."""
    with tempfile.TemporaryDirectory() as output:
        done = launch(
            1,
            *("--model_name", str(model), "--dataset_name", str(data), "--output_dir", output),
            *("--max_length", str(MAX_LENGTH), "--batch_size", "4", "--bench_steps", str(options.steps)),
            *("--warmup_steps", "2", "--deepspeed_config", options.deepspeed_config, *flags),
            timeout_s=1800,
            OMP_NUM_THREADS=str(options.threads),
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        return dict(json.loads((Path(output) / "summary.json").read_text(encoding="utf-8")))


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
    rows, _ = loader.load(tokenizer, DataSettings(dataset_name=(str(data),), max_length=1024), 0)
    layout = Layout(packs=True, full_length=False, max_length=1024, pad_token_id=0)
    batches = loader.Batches(rows, layout, TrainingSettings(), rank=0, world_size=1)
    members, bounds = batches.packs.rows(rows.lengths), batches.packs.bounds
    torch.manual_seed(0)
    small = {**LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    network = LlamaForCausalLM(LlamaConfig(**{**small, "num_key_value_heads": 4}))
    network.config.use_cache = False
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    result = []
    for step in range(steps):
        documents = rows.read(members[bounds[step] : bounds[step + 1]].tolist())
        if packs:
            batch = collate([documents], 1, layout)
        else:
            single = Layout(packs=False, full_length=False, max_length=1024, pad_token_id=0)
            batch = collate([[row] for row in documents], len(documents), single)
        inputs = batch.on("cpu")
        labels = inputs.pop("labels")
        loss = summed_loss(network(**inputs).logits, labels) / batch.target_tokens
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        result.append((float(loss.detach()), batch.target_tokens))
    return result


def memory(model: Path, data: Path, count: int) -> dict[str, Any]:
    """Tokenise and pack many rows in a process of its own, and return the peak growth of its memory."""
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder) / "rows.json"
        rng = random.Random(0)
        rows = json.loads(data.read_text(encoding="utf-8"))
        pool = [word for row in rows for text in row.values() for word in text.split()]
        likes = [rng.choice(rows) for _ in range(count)]
        made = [{k: " ".join(rng.choices(pool, k=len(v.split()))) for k, v in like.items()} for like in likes]
        many.write_text(json.dumps(made), encoding="utf-8")
        command = [sys.executable, __file__, "--data", str(many), "--only_memory", str(model)]
        env = {**os.environ, "HF_DATASETS_CACHE": str(Path(folder) / "cache")}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env, timeout=1800)
        return {"rows": count, "file_bytes": many.stat().st_size, **json.loads(done.stdout.splitlines()[-1])}


def measure_memory(model: str, data: str) -> dict[str, Any]:
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
    settings = DataSettings(dataset_name=(data,), max_length=MAX_LENGTH)
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


def report(found: dict[str, Any]) -> str:
    """Write the measurements as Markdown."""
    lines = [
        "# Packing",
        "",
        f"{found['machine']}. Llama of hidden size {LLAMA['hidden_size']} and {LLAMA['num_hidden_layers']} layers, "
        f"max_length {MAX_LENGTH}, batch size 4, bf16, {found['steps']} steps each (without the first two).",
        "",
        "| rows | target tokens/s | tokens/s | padding | median step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in ("packing", "padding_max_length"):
        run = found[name]
        lines.append(
            f"| {name} | {run['target_tokens_per_s']:.0f} | {run['tokens_per_s']:.0f} | "
            f"{run['padding_share']:.1%} | {run['median_step_time_s']:.2f} s |"
        )
    curve, grown = found["curves"], found["memory"]
    lines += [
        "",
        f"Packing trains **{found['ratio']:.1f} times** as many target tokens per second.",
        "",
        f"Losses of packed and padded training on the same rows, with the same target tokens in each of "
        f"{curve['steps']} steps (fp32): from {curve['first_loss']:.4f} to {curve['last_loss']:.4f}, "
        f"largest difference {curve['largest_difference']:.1e}.",
        "",
        f"{grown['rows']:,} synthetic rows of the same lengths ({grown['tokens']:,} tokens, {grown['packs']:,} packs "
        f"{grown['fill']:.2%} full): tokenised, packed and ready in {grown['time_s']:.0f} s, memory grown by "
        f"{grown['growth_bytes'] / GIB:.2f} GiB at its peak.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all measurements and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, such as alpaca_en_demo.json")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--curve_steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--deepspeed_config", default=str(Path(__file__).parents[2] / "configs" / "zerooffload.json"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only_memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_memory:
        print(json.dumps(measure_memory(options.only_memory, str(options.data))))
        return
    data = options.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(model, data)
        found: dict[str, Any] = {
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {options.threads} threads",
            "steps": options.steps,
            "packing": speed(model, data, options),
            "padding_max_length": speed(model, data, options, "--padding", "max_length"),
        }
        found["ratio"] = found["packing"]["target_tokens_per_s"] / found["padding_max_length"]["target_tokens_per_s"]
        found["curves"] = curves(model, data, options.curve_steps)
        found["memory"] = memory(model, data, options.rows)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "packing_speed.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (options.results / "packing_speed.md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
