"""Measure how much memory grows while a checkpoint of several gigabytes is exported.

    python tests/benchmarks/export_memory.py --kind llama
    python tests/benchmarks/export_memory.py --kind qwen3_moe

Makes a checkpoint in the layout of DeepSpeed 0.19.8 (two ranks, float32 weights and both Adam moments), exports it in
a process of its own, and compares the peak memory of that process, including mapped file pages (VmHWM), with its
memory before. The limit is twice the largest tensor in float32 plus one shard. A small export runs first, so that
imports are not measured. The checkpoint is removed at the end; the numbers go to tests/benchmarks/results/.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

RESULTS = Path(__file__).resolve().parent / "results"
RANKS = 2
SUB_GROUP = 40_000_000  # parameters, as --sub_group_size: a rank file holds several flat tensors
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 14},
    "qwen3_moe": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3,
        "num_experts": 64, "num_experts_per_tok": 4, "moe_intermediate_size": 448,
    },
}  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "moe_intermediate_size": 16,
}  # fmt: skip
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}


def flat_groups(shapes: list[Any], generator: Any) -> list[Any]:
    """Make one rank's flat float32 tensors: its partition of each parameter, padded to the same size on every rank."""
    import torch

    groups: list[int] = []
    size = 0
    for shape in shapes:
        size += math.ceil(shape.numel() / RANKS)
        if size >= SUB_GROUP / RANKS:
            groups, size = [*groups, size], 0
    return [torch.rand(size, generator=generator) - 0.5 for size in [*groups, size] if size]


def make_checkpoint(folder: Path, kind: str, shape: dict[str, Any]) -> None:
    """Write a checkpoint of random weights, and the files that a run writes to its output folder."""
    import torch
    import transformers

    from superoffload.checkpoint.save import save_model_config, save_tokenizer
    from tests.helpers.models import make_tokenizer

    config = transformers.AutoConfig.for_model(kind, **{**HEADS, **shape})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = OrderedDict((name, parameter.shape) for name, parameter in model.named_parameters())
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(rank)
        weights = flat_groups(list(shapes.values()), generator)
        moments = {i: {"exp_avg": group.clone(), "exp_avg_sq": group.clone()} for i, group in enumerate(weights)}
        optimizer = {
            "zero_stage": 3,
            "partition_count": RANKS,
            "optimizer_state_dict": {"state": moments},
            "fp32_flat_groups": weights,
        }
        torch.save({"optimizer_state_dict": optimizer}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        state = {
            "module": {},
            "buffer_names": [],
            "param_shapes": [shapes],
            "shared_params": {},
            "dp_world_size": RANKS,
        }
        torch.save({**state, "progress": {"step": 1}}, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    save_model_config(model, folder)
    save_tokenizer(make_tokenizer(), folder)
    (folder / "latest").write_text("global_step1")


def status_bytes(key: str) -> int:
    """Read a size of this process from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(big: Path, small: Path, max_shard_size: str) -> dict[str, Any]:
    """Export the small checkpoint, then the big one, and return how much memory grew."""
    import torch

    from superoffload.checkpoint import rank_files
    from superoffload.export import weights

    weights.export(small, small / "export")
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = time.perf_counter()
    weights.export(big, big / "export", max_shard_size=max_shard_size)
    wall_s = time.perf_counter() - start
    growth = status_bytes("VmHWM") - before
    tensors = rank_files.read(big).tensors
    largest = max(tensor.shape.numel() * 4 for tensor in tensors.values())
    shards = [path.stat().st_size for path in (big / "export").glob("*.safetensors")]
    limit = 2 * largest + max(shards)
    return {
        "parameters": sum(tensor.shape.numel() for tensor in tensors.values()),
        "checkpoint_bytes": sum(path.stat().st_size for path in big.glob("global_step1/*")),
        "export_bytes": sum(shards),
        "shards": len(shards),
        "largest_tensor_float32_bytes": largest,
        "largest_shard_bytes": max(shards),
        "limit_bytes": limit,
        "peak_growth_bytes": growth,
        "share_of_limit": round(growth / limit, 3),
        "memory_before_bytes": before,
        "wall_s": round(wall_s, 1),
        "torch": torch.__version__,
    }


def in_a_process(*arguments: str) -> str:
    """Run one part of this script in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.export_memory", *arguments]
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Make the checkpoints, measure, write the results, and remove the checkpoints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=SHAPES, default="llama")
    parser.add_argument("--max_shard_size", default="150MB")
    parser.add_argument("--folder", help="Parent of the checkpoint, about 4 GB; default: the temporary folder.")
    parser.add_argument("--part", choices=["make", "measure"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "make":
        make_checkpoint(Path(options.folder) / "big", options.kind, SHAPES[options.kind])
        make_checkpoint(Path(options.folder) / "small", options.kind, {**SHAPES[options.kind], **SMALL})
        return
    if options.part == "measure":
        folder = Path(options.folder)
        print(json.dumps(measure(folder / "big", folder / "small", options.max_shard_size)))
        return
    scratch = tempfile.mkdtemp(prefix="export_memory_", dir=options.folder)
    try:
        common = ("--folder", scratch, "--kind", options.kind, "--max_shard_size", options.max_shard_size)
        in_a_process("--part", "make", *common)
        result = {
            "kind": options.kind,
            "max_shard_size": options.max_shard_size,
            **json.loads(in_a_process("--part", "measure", *common).splitlines()[-1]),
            "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.release()}",
        }
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2)
    (RESULTS / f"export_memory_{options.kind}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    if result["peak_growth_bytes"] >= result["limit_bytes"]:
        sys.exit("memory grew beyond the limit")


if __name__ == "__main__":
    main()
