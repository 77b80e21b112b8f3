"""Runs for tests of checkpoints: their flags, their logs and their engine, and checkpoints made by hand."""

import json
import os
from pathlib import Path
from typing import Any

from superoffload import config
from superoffload.checkpoint import manifest
from superoffload.config import Config
from superoffload.protocols import Engine, Tokenizer
from superoffload.training.step_parts import PARTS

TIMES = {
    "step_time_s",
    "tokens_per_s",
    "target_tokens_per_s",
    "tflops_per_gpu",
    "hardware_tflops_per_gpu",
    "host_bytes",
    *(f"{part}_s" for part in PARTS),
}


def flags(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    """Return the flags of a short run that clips, accumulates, evaluates and resumes."""
    return [
        "--model_name", str(model), "--dataset_name", str(rows), "--output_dir", str(out), "--max_length", "128",
        "--batch_size", "1", "--gradient_accumulation_steps", "2", "--lr", "3e-3", "--warmup", "0.2",
        "--max_grad_norm", "1.75", "--num_train_epochs", "2", "--deterministic", "--resume", "auto",
        "--eval_percentage", "10", "--eval_steps", "4", *more,
    ]  # fmt: skip


def logged(out: Path) -> list[dict[str, Any]]:
    """Read the metrics of a run without what depends on its speed."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def make_engine(model: str, output_dir: str, **values: Any) -> tuple[Engine, Tokenizer, Config]:
    """Build a run's engine, tokenizer and settings (collective)."""
    from superoffload import distributed, ds_config
    from superoffload.model import load
    from superoffload.model.tokenizer import load_tokenizer
    from superoffload.training import engine

    asked = config.build({"model_name": model, "output_dir": output_dir, **values})
    merged = ds_config.merge_flags(ds_config.read_ds_config(asked), asked, distributed.world_size())
    sharded = load.load_model(merged.config.model, load.load_architecture(merged.config.model), merged.ds_config, None)
    wrapped = engine.create(sharded, merged.ds_config, merged.config, 10)
    return wrapped, load_tokenizer(model), merged.config


def random_steps(engine: Engine, count: int) -> list[float]:
    """Take steps on random tokens, the same for each engine; return their losses (collective)."""
    import torch

    losses = []
    for seed in range(count):
        ids = torch.randint(5, 100, (1, 16), generator=torch.Generator().manual_seed(seed))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def make_checkpoint(out: Path, step: int, saved_at: float, **values: Any) -> Path:
    """Write what looks like a complete checkpoint of one rank: one file of random bytes and its manifest."""
    folder = out / f"global_step{step}"
    folder.mkdir(parents=True)
    path = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    path.write_bytes(os.urandom(1000))
    settings = config.flat(config.build({"model_name": "m", "output_dir": str(out), **values}))
    described = {"saved_at": saved_at, "world_size": 1, "files": {path.name: manifest.describe(path)},
                 "progress": {"step": step}, "config": settings}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(described))
    (out / "latest").write_text(folder.name)
    return folder


def damage(folder: Path, how: str) -> None:
    """Damage the file of a checkpoint made by hand: `short`, `flipped` or `gone`."""
    (path,) = folder.glob("*.pt")
    data = bytearray(path.read_bytes())
    if how == "short":
        path.write_bytes(data[:500])
    elif how == "flipped":
        data[700] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
