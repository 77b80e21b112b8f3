"""Compare step times of this package's optimizer, DeepSpeed's own SuperOffload and ZeRO-Offload.

    python tests/benchmarks/offload_speed.py                      # on a CPU: small models, four cases
    python tests/benchmarks/offload_speed.py --preset llama-1b --length 4096     # on a GPU

Every mode runs in a process of its own. The processes take turns of a few steps each, so that a change in the
machine's load affects all of them, and only one runs at a time. A step is split into forward, backward and optimizer
(`engine.step()`, which is the exposed wait). Weights and tokens are random.

Clipping: "off"; "rare", a threshold of twice the usual norm; "always", half the usual norm.

DeepSpeed's own class requires CUDA. To compare it on a CPU, its benchmark process disables that check and adds
`synchronize` to its stream.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODES = ("ours", "stock", "zero")
MODE_NAMES = {"ours": "this package", "stock": "DeepSpeed SuperOffload", "zero": "ZeRO-Offload"}
CLIPPING = {"off": 0.0, "rare": 2.0, "always": 0.5}
# Without these, glibc decides in each process which large buffers it returns to the system. A backward takes 1.5 times
# as long in a process that returns them.
STEADY_ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
PARTS = ("forward_s", "backward_s", "optimizer_s", "step_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Describe a Llama model with random weights and how it is trained."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    length: int
    batch: int = 1
    sub_group: int = 400_000_000
    tied: bool = True


SMALL: dict[str, Any] = {
    "hidden": 512,
    "intermediate": 1408,
    "layers": 8,
    "heads": 8,
    "kv_heads": 8,
    "vocabulary": 4096,
}
PRESETS = {
    "backward": Shape(**SMALL, length=512, sub_group=4_000_000),
    "optimizer": Shape(**SMALL, length=16, sub_group=4_000_000),
    "wide": Shape(
        hidden=1536, intermediate=4096, layers=3, heads=8, kv_heads=8, vocabulary=4096, length=8, sub_group=8_000_000
    ),
    "small-groups": Shape(**SMALL, length=128, sub_group=400_000),
    "llama-1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256, length=4096),
    "llama-3b": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, vocabulary=128256, length=4096),
}


def build_engine(mode: str, shape: Shape, options: dict[str, Any]) -> Any:
    """Return a DeepSpeed engine in this mode."""
    import deepspeed
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    ds_config = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_accumulation_steps": options["accumulation"],
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": shape.sub_group,
            "reduce_bucket_size": shape.sub_group,
            "overlap_comm": False,
            "offload_optimizer": {
                "device": "cpu",
                "pin_memory": torch.cuda.is_available(),
                "ratio": options["ratio"],
                "super_offload": mode != "zero",
                "cpuadam_cores_perc": options["cores_perc"],
            },
        },
    }
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if torch.cuda.is_available():
        model.gradient_checkpointing_enable()
    adam = DeepSpeedCPUAdam(model.parameters(), lr=1e-5)
    initialize: Callable[[], Any] = lambda: deepspeed.initialize(  # noqa: E731
        model=model, optimizer=adam, config=ds_config
    )[0]
    if mode == "ours":
        from superoffload.offload.install import installed

        with installed():
            return initialize()
    if mode == "stock":
        let_stock_run_without_cuda()
    return initialize()


def let_stock_run_without_cuda() -> None:
    """Disable the CUDA check of DeepSpeed's own class and give it a stream, in this process."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.superoffload import superoffload_stage3

    if get_accelerator().device_name() != "cuda":
        superoffload_stage3._validate_superoffload_accelerator = lambda: None

        class Stream:
            def synchronize(self) -> None:
                return

        get_accelerator().current_stream = lambda device_index=None: Stream()


class Bench:
    """Run steps of one engine and time their parts."""

    def __init__(self, mode: str, shape: Shape, options: dict[str, Any]) -> None:
        import torch

        self.torch = torch
        self.engine = build_engine(mode, shape, options)
        self.shape = shape
        self.accumulation = options["accumulation"]
        self.norms: list[float] = []
        self.generator = torch.Generator().manual_seed(1)

    def clip(self, kind: str) -> float:
        """Set the threshold relative to the usual norm, and return it."""
        usual = statistics.median(self.norms[-8:])
        self.engine.optimizer.clip_grad = CLIPPING[kind] * usual
        return float(self.engine.optimizer.clip_grad)

    def step(self) -> dict[str, float]:
        """Take one optimizer step; return the times of its parts in seconds."""
        forward = backward = optimizer = 0.0
        started = self._now()
        for _ in range(self.accumulation):
            size = (self.shape.batch, self.shape.length)
            tokens = self.torch.randint(self.shape.vocabulary, size, generator=self.generator)
            tokens = tokens.to(self.engine.device)
            t0 = self._now()
            loss = self.engine(input_ids=tokens, labels=tokens).loss
            t1 = self._now()
            self.engine.backward(loss)
            t2 = self._now()
            self.engine.step()
            t3 = self._now()
            forward, backward, optimizer = forward + t1 - t0, backward + t2 - t1, optimizer + t3 - t2
        self.norms.append(float(self.engine.get_global_grad_norm()))
        return {
            "forward_s": forward,
            "backward_s": backward,
            "optimizer_s": optimizer,
            "step_s": self._now() - started,
        }

    def _now(self) -> float:
        if self.torch.cuda.is_available():
            self.torch.cuda.synchronize()
        return time.perf_counter()


def child(connection: Connection, mode: str, shape: dict[str, Any], options: dict[str, Any]) -> None:
    """Serve commands of the parent until it sends None."""
    sys.path.insert(0, str(ROOT))
    bench = Bench(mode, Shape(**shape), options)
    connection.send(sum(p.ds_numel for p in bench.engine.module.parameters()))
    while (command := connection.recv()) is not None:
        name, argument = command
        if name == "clip":
            connection.send(bench.clip(argument))
        else:
            connection.send([bench.step() for _ in range(argument)])
    if mode == "ours":
        connection.send(asdict(bench.engine.optimizer.statistics))
    bench.engine.destroy()


def start(mode: str, shape: Shape, options: dict[str, Any]) -> tuple[Any, Connection]:
    """Start the process of one mode as a single rank."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **STEADY_ALLOCATOR,
    }
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, mode, asdict(shape), options))
    process.start()
    theirs.close()
    return process, ours


def ask(connection: Connection, command: Any) -> Any:
    """Send a command, return the answer."""
    connection.send(command)
    return connection.recv()


def run_case(name: str, shape: Shape, options: dict[str, Any]) -> dict[str, Any]:
    """Return the times of every mode and clipping for one shape."""
    modes = options["modes"]
    running = {mode: start(mode, shape, options) for mode in modes}
    result: dict[str, Any] = {"case": name, "shape": asdict(shape), "clipping": {}}
    try:
        for mode in modes:
            result["parameters"] = running[mode][1].recv()
            ask(running[mode][1], ("steps", options["warmup"]))
        for kind in options["clipping"]:
            for _, connection in running.values():
                ask(connection, ("clip", kind))
                ask(connection, ("steps", 2))
            times: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
            for round_number in range(options["rounds"]):
                turn = round_number % len(modes)
                for mode in (*modes[turn:], *modes[:turn]):
                    steps = ask(running[mode][1], ("steps", options["steps"]))
                    times[mode].append({p: statistics.median(s[p] for s in steps) for p in PARTS})
            result["clipping"][kind] = summary(times)
        for mode in modes:
            running[mode][1].send(None)
            if mode == "ours":
                result["statistics"] = running[mode][1].recv()
    finally:
        for process, connection in running.values():
            connection.close()
            process.join(30)
            if process.is_alive():
                process.kill()
    return result


def summary(times: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians per mode, and the median over rounds of its step time relative to other modes."""
    result = {}
    for mode, rounds in times.items():
        entry: dict[str, Any] = {p: statistics.median(r[p] for r in rounds) for p in PARTS}
        entry["relative_to"] = {
            other: statistics.median(a["step_s"] / b["step_s"] for a, b in zip(rounds, others, strict=True))
            for other, others in times.items()
            if other != mode
        }
        result[mode] = entry
    return result


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a Markdown document."""
    lines = [
        "# Step times",
        "",
        f"Machine: {report['machine']}. DeepSpeed {report['deepspeed']}, torch {report['torch']}. "
        f"Command: `{report['command']}`.",
        "",
        "Medians in milliseconds; ratios are medians over interleaved rounds (below 1: this package is faster).",
        "",
        "| case | clipping | mode | forward | backward | optimizer | step | this package / mode |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in report["cases"]:
        for kind, modes in case["clipping"].items():
            ours = modes.get("ours", {}).get("relative_to", {})
            for mode, entry in modes.items():
                milliseconds = " | ".join(f"{1000 * entry[p]:.1f}" for p in PARTS)
                ratio = f"{ours[mode]:.2f}" if mode in ours else ""
                lines.append(f"| {case['case']} | {kind} | {MODE_NAMES[mode]} | {milliseconds} | {ratio} |")
    lines += ["", "Cases:", ""]
    lines += [
        f"* {c['case']}: {c['parameters'] / 1e6:.1f} M parameters, length {c['shape']['length']}, "
        f"sub-groups of {c['shape']['sub_group']:,}"
        for c in report["cases"]
    ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Describe the machine by its kind, without its name."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{os.cpu_count()}-core {os.uname().machine.replace('x86_64', 'x86-64')} CPU, {device}"


def main() -> None:
    """Run the cases named on the command line and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=list(PRESETS)[:4])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--clipping", nargs="+", choices=list(CLIPPING), default=list(CLIPPING))
    parser.add_argument("--length", type=int, help="tokens per sequence instead of the preset's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps per mode and round")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=1.0)
    parser.add_argument("--cores-perc", type=float, default=0.8)
    parser.add_argument("--name", default="offload_speed", help="stem of the result files")
    options = vars(parser.parse_args())
    import deepspeed
    import torch

    cases: list[dict[str, Any]] = []
    for name in options["preset"]:
        shape = PRESETS[name]
        if options["length"]:
            shape = Shape(**{**asdict(shape), "length": options["length"]})
        cases.append(run_case(name, shape, options))
        report = {
            "machine": machine(),
            "deepspeed": deepspeed.__version__,
            "torch": torch.__version__,
            "command": " ".join(["python", "tests/benchmarks/offload_speed.py", *sys.argv[1:]]),
            "cases": cases,
        }
        write(report, options["name"])  # after every case, so that an interruption loses one case
    sys.stdout.write(markdown(report))


def write(report: dict[str, Any], name: str) -> None:
    """Write the report to results/NAME.json and results/NAME.md."""
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
