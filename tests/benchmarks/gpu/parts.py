"""The parts of the measurements. Each runs programs through a `Bench` and returns rows and the numbers behind them."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.machine import DEVICE_GIB, GIB
from tests.benchmarks.gpu.programs import Bench, Outcome, PartError
from tests.benchmarks.gpu.report import Row
from tests.benchmarks.offload_speed import CLIPPING, MODE_NAMES, PARTS, PRESETS
from tests.helpers.runs import logged

Found = tuple[list[Row], dict[str, Any]]
MODES = ("superoffload", "zerooffload")
SMALL = ("--rounds", "1", "--steps", "1", "--warmup", "1")
ATTENTION, LOSS_KERNEL, PARAMETERS = r", attention (\S+),", r"Loss kernel: (.*)", r": ([\d,]+) parameters"
LOSS_GIB = 1.5  # of the chunked loss kernel at the size of the recipe for 8B
HOST_BYTES = 18  # per parameter: float32 master weight, gradient and two moments, and bf16 weights
HOST_GIB, DEVICE_REST_GIB = 8, 6  # beside what grows with the model: libraries, buffers, activations of one layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part, and what it needs: devices, host memory in GiB, flash-attn, liger-kernel."""

    name: str
    what: str
    run: Callable[[Bench], Found]
    devices: int = 1
    host_gib: int = 4
    flash_attn: bool = False
    liger: bool = False

    def skipped_because(self, machine: Mapping[str, Any], rehearse: bool) -> str | None:
        """Return why the part cannot run on this machine; None if it can."""
        if self.flash_attn and not machine["flash_attn"]:
            return "flash-attn is not installed"
        if rehearse:
            return None
        if self.liger and not machine["liger"]:
            return "liger-kernel is not installed"
        if machine["devices"] < self.devices:
            return f"needs {self.devices} devices, there is {machine['devices']}"
        if machine["host_gib"] < self.host_gib:
            return f"needs {self.host_gib} GiB of host memory, {machine['host_gib']:.0f} GiB are available"
        return None


def ms(seconds: float) -> str:
    """Write a time in milliseconds."""
    return f"{1000 * seconds:.1f} ms"


def attention(bench: Bench) -> Found:
    small = ["--rehearse", "--length", "64", "--documents", "4", "--rounds", "2"] if bench.rehearse else []
    found = bench.benchmark("attention_speed.py", *small, name="attention_speed")
    farthest = max(found["distances"].values())
    one_call, loop = found["times_s"].values()
    what = f"a layer, {found['documents']} documents in {found['length']:,} tokens, forward and backward: "
    rows = [
        Row("largest difference from sdpa", f"{farthest:.2%}", f"at most {found['tolerance']:.0%}"),
        Row(what + "varlen_attn", ms(one_call), f"{loop / one_call:.1f} times as fast"),
        Row(what + "one document at a time", ms(loop)),
    ]
    return rows, found


def kernels(bench: Bench) -> Found:
    small = ["--rehearse", "--hidden", "64", "--head", "16", "--layers", "1", "--length", "400", "--rounds", "2"]
    found = bench.benchmark("kernel_speed.py", *(small if bench.rehearse else []), name="kernel_speed")
    what = f"{found['layers']} layers of hidden {found['hidden']}, {found['length']:,} tokens, forward and backward: "
    rows = []
    for kind, time_s in found["times_s"].items():
        peak = f", peak {found['peak_bytes'][kind] / GIB:.2f} GiB" if kind in found["peak_bytes"] else ""
        farthest = f"gradients differ by {found['gradient_distances'][kind]:.2%} at most"
        compare = "" if kind == "none" else f"{found['ratios'][kind]:.2f} of the model's own; {farthest}"
        rows.append(Row(what + kind, ms(time_s) + peak, compare))
    return rows, found


def copy_rates(bench: Bench) -> Found:
    small = ["--rehearse", "--numel", "100000", "--rounds", "2"] if bench.rehearse else []
    found = bench.benchmark("pinned_rates.py", *small, name="pinned_rates")
    rows = [
        Row(kind, f"{ways['to host']:.1f} GB/s to the host, {ways['to device']:.1f} GB/s to the device")
        for kind, ways in found["GB_per_s"].items()
    ]
    return rows, found


def loss(bench: Bench) -> Found:
    size = ["--vocabulary", "512", "--width", "64", "--positions", "64", "--repeats", "1"]
    if not bench.rehearse:
        size = ["--device", "cuda", "--width", "4096", "--positions", "16384", "--machine", bench.machine["device"]]
    found = bench.benchmark("loss_memory.py", *size, "--rounds", "1", name="loss_memory")
    rows = [
        Row(
            f"{kernel}: time and peak memory",
            f"{ms(min(result['times_s']))}, {result['peak_bytes'] / GIB:.2f} GiB",
            limit(result["peak_bytes"] / GIB, LOSS_GIB) if kernel == "chunked" else "",
        )
        for kernel, result in found["kernels"].items()
    ]
    return rows, found


def limit(value_gib: float, most_gib: float) -> str:
    """Write the budget of a peak of memory."""
    return f"{'within' if value_gib <= most_gib else '**above**'} the budget of {most_gib:.1f} GiB"


def equality(bench: Bench, ranks: int = 1) -> Found:
    """Run the tests of equality, which pytest selects by name; in a rehearsal, on the simulated asynchronous device."""
    tests = ["-m", "", "tests/offload/test_equality.py", "tests/offload/zero3/test_checkpointing.py"]
    tests += ["-k", "two_ranks" if ranks == 2 else "not two_ranks"]
    if bench.rehearse:
        tests = ["tests/offload/test_async_device.py", "-k", f"no_race and {'two_ranks' if ranks == 2 else 'one_rank'}"]
    text = bench.run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    last = text.strip().splitlines()[-1].strip("= ")
    if not re.search(r"[1-9]\d* passed", last):
        raise PartError(f"pytest ran no test: {last}")
    return [Row("tests of tests/offload", last)], {}


def tiny(bench: Bench) -> tuple[Path, list[str]]:
    """Write the quick start's model and rows; return their folder and the flags of a short run with packs."""
    folder = bench.work / "tiny"
    if not (folder / "held_out.json").exists():
        bench.run("-m", "superoffload.commands", "tiny", "write", str(folder))
    (folder / "prompts.txt").write_text("Sort the digits: 3 1 2\nCount on: 7\n", encoding="utf-8")
    flags = [
        "--model_name", str(folder / "model"), "--dataset_name", str(folder / "train.json"),
        "--dataset_percentage", "5", "--max_length", "256", "--batch_size", "2", "--lr", "1e-3", "--max_steps", "6",
        "--sub_group_size", "400000", "--eval_percentage", "5", "--eval_steps", "3",
        "--sample_prompts", str(folder / "prompts.txt"), "--save_checkpoint", "--fail_on_checkpoint_error",
    ]  # fmt: skip
    return folder, flags


def mode_flags(mode: str) -> list[str]:
    return ["--deepspeed_config", f"configs/{mode}.json"]


def train(bench: Bench, hide_flash_attn: bool = True) -> Found:
    _, flags = tiny(bench)
    flags += mode_flags("superoffload")
    outcome = bench.finetune("run", *flags, "--export", hide_flash_attn=hide_flash_attn)
    samples = outcome.text.count("Sample | ")
    evaluated = [line for line in logged(outcome.out) if "eval_loss" in line]
    if samples < 2 or not evaluated:
        raise PartError(f"the run evaluated {len(evaluated)} times and answered {samples} prompts")
    check = "from superoffload.model.load import load_whole; load_whole(Path(sys.argv[1]))"
    bench.run("-c", f"import sys; from pathlib import Path; {check}", str(exported(outcome)))
    kernel = outcome.found(ATTENTION)
    if hide_flash_attn and kernel.startswith("flash_attention"):
        raise PartError(f"the run used {kernel}, although flash-attn was hidden from it")
    rows = [
        Row("attention kernel, loss kernel", f"{kernel}, {outcome.found(LOSS_KERNEL)}"),
        Row("final loss, held-out loss", f"{outcome.summary['final_loss']:.4f}, {evaluated[-1]['eval_loss']:.4f}"),
        Row("export", "loads"),
    ]
    return rows, {"summary": outcome.summary}


def exported(outcome: Outcome) -> Path:
    folders = list(outcome.out.glob("model_step*"))
    if len(folders) != 1:
        raise PartError(f"the run exported {len(folders)} models")
    return folders[0]


def differences(first: Outcome, second: Outcome) -> list[str]:
    """List what differs between two runs, of which the second may have been resumed: numbers and exported weights."""
    ours, theirs = logged(first.out), logged(second.out)
    ours = ours[len(ours) - len(theirs) :]
    found = [f"step {a['step']}: {a} and {b}" for a, b in zip(ours, theirs, strict=True) if a != b]
    weights = (exported(first) / "model.safetensors", exported(second) / "model.safetensors")
    return found + ([] if filecmp.cmp(*weights, shallow=False) else ["the exported weights"])


def deterministic(bench: Bench, ranks: int = 1) -> Found:
    _, flags = tiny(bench)
    flags += ["--deterministic", "--export", "--save_steps", "3", "--max_grad_norm", "1.5"]
    runs = {mode: bench.finetune(mode, *flags, *mode_flags(mode), ranks=ranks) for mode in MODES}
    whole = runs["superoffload"]
    middle = str(whole.out / "global_step3")
    resumed = bench.finetune("resumed", *flags, *mode_flags("superoffload"), "--resume", middle, ranks=ranks)
    rows = []
    for what, other in (("ZeRO-Offload", runs["zerooffload"]), ("a resumed run", resumed)):
        if not logged(other.out):
            raise PartError(f"{what} logged no step")
        found = differences(whole, other)
        if found:
            raise PartError("\n".join([f"superoffload mode differs from {what}", *found]))
        rows.append(Row(f"superoffload mode and {what}", "equal in every number and every exported weight"))
    return rows, {mode: run.summary for mode, run in runs.items()}


def two_ranks(bench: Bench) -> Found:
    rows, data = equality(bench, ranks=2)
    more, summaries = deterministic(bench, ranks=2)
    return rows + more, data | summaries


def step_times(bench: Bench, preset: str, *flags: str) -> Found:
    flags = ("--loss", "chunked", *flags)
    if bench.rehearse:
        preset, lengths, rounds = "tiny", ["16", "32"], [*SMALL, "--clipping", "off", "always"]
    else:
        lengths, rounds = ["2048", "4096", "8192"], ["--rounds", "4", "--steps", "2", "--warmup", "2"]
    found = bench.benchmark(
        "offload_speed.py", "--preset", preset, "--length", *lengths, *rounds, *flags, name="offload_speed"
    )
    rows = []
    for case in found["cases"]:
        length = case["shape"]["length"]
        for kind in CLIPPING:
            rows += step_rows(f"length {length}, clipping {kind}", case["clipping"].get(kind, {}))
            rows += exposed_rows(f"length {length}, clipping {kind}", case["statistics"].get(kind, {}))
        rows += [
            memory_row(f"length {length}, {MODE_NAMES[mode]}", peaks, case["parameters"], PRESETS[preset].layers, case)
            for mode, peaks in case["memory"].items()
        ]
    return rows, found


def step_rows(where: str, modes: Mapping[str, Any]) -> list[Row]:
    rows = []
    for mode, entry in modes.items():
        phases = ", ".join(f"{part.removesuffix('_s')} {ms(entry[part])}" for part in PARTS[:-1])
        ratio = modes["ours"]["relative_to"].get(mode) if "ours" in modes else None
        compare = f"this package / this: {ratio:.2f}" if ratio else ""
        rows.append(Row(f"{where}: {MODE_NAMES[mode]}", f"step {ms(entry['step_s'])} ({phases})", compare))
    return rows


def exposed_rows(where: str, statistics: Mapping[str, Any]) -> list[Row]:
    """Say what the trainer waited for and what the optimizer process did, per step."""
    steps = statistics.get("steps", 0)
    if not steps:
        return []
    busy = ", ".join(f"{kind} {ms(value / steps)}" for kind, value in statistics["busy_s"].items() if value)
    waits = f"{ms(statistics['wait_s'] / steps)} in step(), {ms(statistics['commit_wait_s'] / steps)} for commits"
    return [Row(f"{where}: exposed waits per step", waits, f"optimizer process busy: {busy}")]


def memory_row(what: str, peaks: Mapping[str, int], parameters: int, layers: int, case: Mapping[str, Any]) -> Row:
    """Compare the peaks with a budget, and the device's with the size that these measurements promise."""
    shape = case["shape"]
    checkpoints = 2 * layers * shape["batch"] * shape["length"] * shape["hidden"]
    buckets = 4 * min(parameters, shape["sub_group"])
    gathered = 2 * min(parameters, 1_000_000_000)  # stage3_max_live_parameters
    on_device = (2 * parameters + gathered + buckets + checkpoints) / GIB + LOSS_GIB + DEVICE_REST_GIB
    on_host = HOST_BYTES * parameters / GIB + HOST_GIB
    device, host = peaks["peak_device_bytes"] / GIB, peaks["peak_host_bytes"] / GIB
    compare = f"device {limit(device, min(on_device, DEVICE_GIB))}; host {limit(host, on_host)}"
    return Row(f"{what}: peak memory", f"device {device:.2f} GiB, host {host:.2f} GiB", compare)


def overlap_comm(bench: Bench) -> Found:
    rows, data = [], {}
    size = ["--preset", "tiny", *SMALL, "--clipping", "off"]
    if not bench.rehearse:
        size = [
            "--preset",
            "llama-1b",
            "--length",
            "4096",
            "--rounds",
            "4",
            "--steps",
            "2",
            "--clipping",
            "off",
            "rare",
        ]
    for overlap in (False, True):
        more = ["--overlap-comm"] if overlap else []
        flags = [*size, "--modes", "ours", "zero", "--loss", "chunked", *more]
        found = bench.benchmark("offload_speed.py", *flags, name="offload_speed")
        (case,) = found["cases"]
        for kind, modes in case["clipping"].items():
            rows += step_rows(f"overlap_comm {str(overlap).lower()}, clipping {kind}", modes)
        data[str(overlap)] = found
    return rows, data


def train_large(bench: Bench, preset: str, length: int, modes: tuple[str, ...] = MODES) -> Found:
    """Run finetune_zero3.py on packs of short rows, with a large model of random weights."""
    sizes = ["--max_length", str(length), "--sub_group_size", "400000000", "--bench_steps", "12", "--warmup_steps", "4"]
    if bench.rehearse:
        preset, length = "tiny", 64
        sizes = ["--max_length", "64", "--sub_group_size", "40000", "--bench_steps", "2", "--warmup_steps", "1"]
        sizes += ["--dataset_percentage", "2"]
    folder = bench.work / preset
    if not (folder / "model" / "config.json").exists() or not (folder / "held_out.json").exists():
        bench.run("-m", "tests.benchmarks.gpu.models", preset, str(folder))
    rows, data = [], {}
    shape = PRESETS[preset]
    for mode in modes:
        outcome = bench.finetune(
            mode, "--model_name", str(folder / "model"), "--dataset_name", str(folder / "train.json"), "--lr", "1e-5",
            "--activation_checkpointing", *sizes, *mode_flags(mode),
        )  # fmt: skip
        s = outcome.summary
        parameters = int(outcome.found(PARAMETERS).replace(",", ""))
        case = {"shape": {"batch": 1, "length": length, "hidden": shape.hidden, "sub_group": shape.sub_group}}
        rows += [
            Row(
                f"{mode}: step, attention {outcome.found(ATTENTION)}",
                f"{ms(s['median_step_time_s'])}, {s['tokens_per_s']:.0f} tokens/s, {s['tflops_per_gpu']:.1f} TFLOPS",
                f"loss after {s['steps']} steps {s['final_loss']:.4f}",
            ),
            memory_row(mode, s, parameters, shape.layers, case),
        ]
        data[mode] = s
    return rows, data


PART_LIST = (
    Part(name="attention", what="torch's varlen_attn against sdpa", run=attention),
    Part(
        name="kernels",
        what="Liger's and compiled norms, SwiGLU and rotary embedding against the model's own",
        run=kernels,
        liger=True,
    ),
    Part(name="copy-rates", what="copies between device and page-locked host memory", run=copy_rates),
    Part(name="equality", what="the optimizer against ZeRO-Offload, bit for bit", run=equality),
    Part(name="train", what="finetune_zero3.py on packs, without flash-attn", run=train),
    Part(
        name="train-flash-attn",
        what="finetune_zero3.py on packs, with flash-attn",
        run=lambda bench: train(bench, hide_flash_attn=False),
        flash_attn=True,
    ),
    Part(name="deterministic", what="finetune_zero3.py --deterministic: both modes, and resumed", run=deterministic),
    Part(
        name="step-times-1b",
        what="step times, 1 billion parameters, the modes in turn",
        run=lambda bench: step_times(bench, "llama-1b"),
        host_gib=80,
    ),
    Part(name="overlap-comm", what="step times with overlap_comm off and on", run=overlap_comm, host_gib=60),
    Part(
        name="train-1b",
        what="finetune_zero3.py, 1 billion parameters, packs of 4096 tokens",
        run=lambda bench: train_large(bench, "llama-1b", 4096),
        host_gib=40,
    ),
    Part(name="loss", what="loss kernels at the size of the recipe for 8B", run=loss),
    Part(
        name="step-times-3b",
        what="step times, 3 billion parameters, one mode after the other",
        run=lambda bench: step_times(bench, "llama-3b", "--alone"),
        host_gib=75,
    ),
    Part(
        name="train-3b",
        what="finetune_zero3.py, 3 billion parameters, packs of 8192 tokens",
        run=lambda bench: train_large(bench, "llama-3b", 8192, MODES[:1]),
        host_gib=75,
    ),
    Part(name="two-ranks", what="two devices: equality, and finetune_zero3.py", run=two_ranks, devices=2),
)
