"""Compare step times of this package's optimizer, DeepSpeed's own SuperOffload and ZeRO-Offload.

    python tests/benchmarks/offload_speed.py                      # on a CPU: small models, four cases
    python tests/benchmarks/offload_speed.py --preset llama-1b --length 4096 --loss chunked     # on a GPU

Every mode runs in a process of its own. The processes take turns of a few steps each, so that a change in the
machine's load affects all of them, and only one runs at a time. With --alone, they do not even live at the same time:
three models of 3 billion parameters need 170 GB of host memory. A step is split into forward, backward and optimizer
(`engine.step()`, which is the exposed wait). On a GPU the device is waited for after each part, which hides what parts
overlap, so the time of a whole step is measured in steps of its own, without any wait between their parts. Weights and
tokens are random.

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
from dataclasses import asdict, dataclass, field
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
    "tiny": Shape(
        hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=512, length=32, sub_group=40_000
    ),
    "llama-1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128256, length=4096),
    "llama-3b": Shape(hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, vocabulary=128256, length=4096),
}


def llama_config(shape: Shape, **more: Any) -> Any:
    """Return the model's configuration for transformers."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
        **more,
    )


def build_engine(mode: str, shape: Shape, options: dict[str, Any]) -> Any:
    """Return a DeepSpeed engine in this mode."""
    import deepspeed
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from transformers import LlamaForCausalLM

    from superoffload.model import recomputation

    torch.manual_seed(0)
    ds_config = {
        "train_micro_batch_size_per_gpu": shape.batch,
        "gradient_accumulation_steps": options["accumulation"],
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device in every step
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": shape.sub_group,
            "reduce_bucket_size": shape.sub_group,
            "overlap_comm": options["overlap_comm"],
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
        model = LlamaForCausalLM(llama_config(shape)).to(torch.bfloat16)
    if torch.cuda.is_available():
        recomputation.enable(model, "full")
    adam = DeepSpeedCPUAdam(model.parameters(), lr=1e-5)
    initialize: Callable[[], Any] = lambda: deepspeed.initialize(  # noqa: E731
        model=model, optimizer=adam, config=ds_config
    )[0]
    if mode == "ours":
        from superoffload.offload.install import installed

        with installed():
            return initialize()
    if mode == "stock":
        from superoffload.bench.alternatives import let_stock_run_without_cuda

        let_stock_run_without_cuda()
    return initialize()


class Bench:
    """Run steps of one engine and time their parts."""

    def __init__(self, mode: str, shape: Shape, options: dict[str, Any]) -> None:
        import torch

        self.torch = torch
        self.engine = build_engine(mode, shape, options)
        self.shape = shape
        self.accumulation = options["accumulation"]
        self.length = shape.length
        self.chunked: Any = None
        if options["loss"] == "chunked":
            from superoffload.model.head import ChunkedLoss, Transform

            self.chunked = ChunkedLoss(Transform())
        self.norms: list[float] = []
        self.counted: dict[str, Any] = {}
        self.generator = torch.Generator().manual_seed(1)

    def clip(self, kind: str) -> float:
        """Set the threshold relative to the usual norm, and return it."""
        usual = statistics.median(self.norms[-8:])
        self.engine.optimizer.clip_grad = CLIPPING[kind] * usual
        return float(self.engine.optimizer.clip_grad)

    def steps(self, count: int) -> list[dict[str, float]]:
        """Take steps and return the times of their parts; on a GPU, whole steps are measured in as many more steps."""
        on_cpu = not self.torch.cuda.is_available()
        before, started = self._statistics(), self._now(wait=True)
        times = [self.step(wait=on_cpu) for _ in range(count)]
        step_s = (self._now(wait=True) - started) / count
        self.counted = added(self.counted, growth(before, self._statistics()))
        return times if on_cpu else [{**self.step(), "step_s": step_s} for _ in range(count)]

    def at_length(self, length: int) -> None:
        """Train on sequences of this length from now on, and start measuring the peak of device memory."""
        self.length = length
        if self.torch.cuda.is_available():
            self.torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, int]:
        """Return the peaks of device and host memory in bytes."""
        from superoffload.training.metrics import peak_memory

        return peak_memory()

    def statistics(self) -> dict[str, Any]:
        """Return what this package's optimizer did since the last call, in steps without waits; {} in other modes."""
        counted, self.counted = self.counted, {}
        return counted

    def _statistics(self) -> dict[str, Any]:
        found = getattr(self.engine.optimizer, "statistics", None)
        return asdict(found) if found else {}

    def _loss(self, tokens: Any) -> Any:
        if self.chunked is None:
            tokens = tokens.to(self.engine.device)
            return self.engine(input_ids=tokens, labels=tokens).loss
        from superoffload.data.collate import Batch

        targets = tokens.shape[0] * (tokens.shape[1] - 1)
        batch = Batch(inputs={"input_ids": tokens, "labels": tokens}, lengths=(), target_tokens=targets)
        return self.chunked(self.engine, batch) / targets

    def step(self, wait: bool = True) -> dict[str, float]:
        """Take one optimizer step; return the times of its parts in seconds, waiting for the device after each."""
        forward = backward = optimizer = 0.0
        started = self._now(wait)
        for _ in range(self.accumulation):
            size = (self.shape.batch, self.length)
            tokens = self.torch.randint(self.shape.vocabulary, size, generator=self.generator)
            t0 = self._now(wait)
            loss = self._loss(tokens)
            t1 = self._now(wait)
            self.engine.backward(loss)
            t2 = self._now(wait)
            self.engine.step()
            t3 = self._now(wait)
            forward, backward, optimizer = forward + t1 - t0, backward + t2 - t1, optimizer + t3 - t2
        if wait:
            self.norms.append(float(self.engine.get_global_grad_norm()))
        return {
            "forward_s": forward,
            "backward_s": backward,
            "optimizer_s": optimizer,
            "step_s": self._now(wait) - started,
        }

    def _now(self, wait: bool) -> float:
        if wait and self.torch.cuda.is_available():
            self.torch.cuda.synchronize()
        return time.perf_counter()


def child(connection: Connection, mode: str, shape: dict[str, Any], options: dict[str, Any]) -> None:
    """Serve commands of the parent until it sends None."""
    sys.path.insert(0, str(ROOT))
    from superoffload.offload import operators

    operators.prepare()  # another ninja on PATH would compile the operators again
    bench = Bench(mode, Shape(**shape), options)
    connection.send(sum(p.ds_numel for p in bench.engine.module.parameters()))
    while (command := connection.recv()) is not None:
        name, *arguments = command
        connection.send(getattr(bench, name)(*arguments))
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


def ask(connection: Connection, *command: Any) -> Any:
    """Send a command, the name of a method of `Bench` and its arguments; return the answer."""
    connection.send(command)
    return connection.recv()


def run_case(name: str, shape: Shape, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the times of every mode and clipping for one shape, one result for each length."""
    modes = options["modes"]
    lengths = options["length"] or [shape.length]
    found: list[Measured] = []
    for together in [[mode] for mode in modes] if options["alone"] else [modes]:
        running = {mode: start(mode, shape, options) for mode in together}
        try:
            connections = {mode: connection for mode, (_, connection) in running.items()}
            found.append(measure(connections, lengths, options))
            for connection in connections.values():
                connection.send(None)
        finally:
            for process, connection in running.values():
                connection.close()
                process.join(60)
                if process.is_alive():
                    process.kill()
    results = []
    for length in lengths:
        cells = {kind: {k: v for m in found for k, v in m.cells[length, kind].items()} for kind in options["clipping"]}
        results.append(
            {
                "case": name if len(lengths) == 1 else f"{name} {length}",
                "shape": asdict(shape) | {"length": length},
                "parameters": found[0].parameters,
                "clipping": {kind: summary({k: c.rounds for k, c in cell.items()}) for kind, cell in cells.items()},
                "statistics": {kind: cell["ours"].statistics for kind, cell in cells.items() if "ours" in cell},
                "memory": {mode: memory for m in found for mode, memory in m.memory[length].items()},
            }
        )
    return results


@dataclass(slots=True)
class Cell:
    """What one mode did at one length and clipping: its times by round, and the statistics of its optimizer."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What some modes did, by length (and clipping) and mode."""

    parameters: int
    cells: dict[tuple[int, str], dict[str, Cell]]
    memory: dict[int, dict[str, dict[str, int]]]


def measure(running: dict[str, Connection], lengths: list[int], options: dict[str, Any]) -> Measured:
    """Let the modes that are running take turns at every length and clipping."""
    modes = tuple(running)
    parameters = max(connection.recv() for connection in running.values())  # all the same
    cells: dict[tuple[int, str], dict[str, Cell]] = {}
    memory: dict[int, dict[str, dict[str, int]]] = {}
    for length in lengths:
        for connection in running.values():
            ask(connection, "at_length", length)
            ask(connection, "steps", options["warmup"])
        for kind in options["clipping"]:
            cell = cells[length, kind] = {mode: Cell() for mode in modes}
            for connection in running.values():
                ask(connection, "clip", kind)
                ask(connection, "steps", 2)
                ask(connection, "statistics")
            for number in range(options["rounds"]):
                turn = number % len(modes)
                for mode in (*modes[turn:], *modes[:turn]):
                    steps = ask(running[mode], "steps", options["steps"])
                    cell[mode].rounds.append({p: statistics.median(s[p] for s in steps) for p in PARTS})
            for mode, connection in running.items():
                cell[mode].statistics = ask(connection, "statistics")
        memory[length] = {mode: ask(connection, "memory") for mode, connection in running.items()}
    return Measured(parameters=parameters, cells=cells, memory=memory)


def added(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Add two results of `growth`, of which the second is the later one."""
    return {
        name: added(first.get(name, {}), value) if isinstance(value, dict) else first.get(name, 0) + value
        for name, value in second.items()
    }


def growth(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Subtract two readings of the statistics; what a reading holds more than the other counts from 0."""
    return {
        name: growth(before.get(name, {}), value) if isinstance(value, dict) else value - before.get(name, 0)
        for name, value in after.items()
    }


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
    parser.add_argument("--length", type=int, nargs="+", help="tokens per sequence instead of the preset's")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps per mode and round")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--ratio", type=float, default=1.0)
    parser.add_argument("--cores-perc", type=float, default=0.8)
    parser.add_argument("--overlap-comm", action="store_true", help="DeepSpeed's overlap_comm")
    parser.add_argument("--loss", choices=("plain", "chunked"), default="plain", help="the loss kernel")
    parser.add_argument("--alone", action="store_true", help="start one mode after the other, not all at once")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--name", default="offload_speed", help="stem of the result files")
    parser.add_argument("--keep", action="store_true", help="keep the results of other cases in these files")
    options = vars(parser.parse_args())
    import deepspeed
    import torch

    cases = kept(options["results"] / f"{options['name']}.json", options["preset"]) if options["keep"] else []
    for name in options["preset"]:
        cases += run_case(name, PRESETS[name], options)
        report = {
            "machine": machine(),
            "deepspeed": deepspeed.__version__,
            "torch": torch.__version__,
            "command": " ".join(["python", "tests/benchmarks/offload_speed.py", *sys.argv[1:]]),
            "cases": cases,
        }
        write(report, options["results"], options["name"])  # after every case, so that an interruption loses one case
    sys.stdout.write(markdown(report))


def kept(path: Path, measured: list[str]) -> list[dict[str, Any]]:
    """Return the cases of a result file, in its order, without those that are measured again; none without a file."""
    found = json.loads(path.read_text())["cases"] if path.exists() else []
    return [case for case in found if case["case"].split()[0] not in measured]


def write(report: dict[str, Any], folder: Path, name: str) -> None:
    """Write the report to FOLDER/NAME.json and FOLDER/NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(report))


if __name__ == "__main__":
    main()
