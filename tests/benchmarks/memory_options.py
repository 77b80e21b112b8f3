"""Measure --optimizer_state bf16 and --offload_params: held-out loss, step time, host memory per parameter.

    python tests/benchmarks/memory_options.py --data alpaca_en_demo.json

Losses come from the program under its launcher, step times from its engines in processes that take turns of a few
steps, so that a change in the machine's load affects all of them, and memory from tests/helpers/offload_memory.py.
Writes memory_options.md and memory_options.json after every part.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.offload_speed import STEADY_ALLOCATOR
from tests.helpers.ranks import REPOSITORY, free_port, launch, rank_environment, run_ranks

MODES = ("superoffload", "zerooffload")
PARTS = ("memory", "losses", "times")
OPTIONS: dict[str, list[str]] = {
    "default": [],
    "bf16 state": ["--optimizer_state", "bf16"],
    "weights on the host": ["--offload_params"],
    "both": ["--optimizer_state", "bf16", "--offload_params"],
}
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
VOCABULARY = 2048
MAX_LENGTH = 512
STEP_LENGTH, STEPS_PER_TURN = 128, 3  # for step times


def write_model(folder: Path, data: Path, shape: dict[str, int]) -> None:
    """Write a random Llama and a byte-pair tokenizer trained on the rows."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    rows = json.loads(data.read_text(encoding="utf-8"))
    inner.train_from_iterator([text for row in rows for text in row.values()], trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(**shape, vocab_size=VOCABULARY, max_position_embeddings=MAX_LENGTH, eos_token_id=0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(str(folder))


def train(model: Path, output: Path, options: argparse.Namespace, *flags: str, mode: str = MODES[0]) -> dict[str, Any]:
    """Run the program and return its summary, its parameters and its last held-out loss, if it has one."""
    done = launch(
        1,
        *("--model_name", str(model), "--dataset_name", str(options.data), "--output_dir", str(output)),
        *("--deepspeed_config", str(REPOSITORY / f"configs/{mode}.json"), "--max_length", str(MAX_LENGTH), *flags),
        timeout_s=3600,
        OMP_NUM_THREADS=str(options.threads),
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return {**summary, "eval_loss": held_out[-1] if held_out else None}


def losses(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return held-out losses after training from random weights, and after training that model on."""
    start = work / "small"
    write_model(start, options.data, SMALL)
    shared = (
        "--batch_size",
        "4",
        "--no_packing",
        "--eval_percentage",
        "10",
        "--log_interval",
        "50",
        "--warmup",
        "0.05",
    )
    results: list[dict[str, Any]] = []
    first = ("1e-3", options.steps, start)
    trained = work / "fp32-1e-3" / f"model_step{options.steps}"
    later = [(rate, options.steps // 2, trained) for rate in ("1e-4", "1e-5")]
    for rate, steps, model in (first, *later):
        entry: dict[str, Any] = {"lr": float(rate), "steps": steps, "before": results[0]["fp32"] if results else None}
        for state in ("fp32", "bf16"):
            flags = [*shared, "--lr", rate, "--max_steps", str(steps), "--num_train_epochs", "100"]
            flags += ["--optimizer_state", state, "--save_checkpoint", "--export"]
            entry[state] = train(model, work / f"{state}-{rate}", options, *flags)["eval_loss"]
            entry[f"changed_{state}"] = share_changed(model, work / f"{state}-{rate}" / f"model_step{steps}")
        results.append(entry)
    return results


def share_changed(before: Path, after: Path) -> float:
    """Return the share of the bf16 weights that differ between two models."""
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (before, after))
    changed = sum(int((left[name] != right[name]).sum()) for name in left)
    return changed / sum(tensor.numel() for tensor in left.values())


def serve(connection: Connection, model: str, output: str, values: dict[str, Any]) -> None:
    """Build an engine of the program; take as many steps as asked for, until asked for none.

    Answers with the median time of these steps and with the processor time of a step, in seconds. The latter includes
    the optimizer process and hardly depends on what else runs on the machine.
    """
    import psutil
    import torch

    from superoffload import distributed
    from tests.helpers.runs import make_engine

    distributed.init()
    engine: Any = make_engine(model, output, **values)[0]
    connection.send("ready")
    generator = torch.Generator().manual_seed(1)
    while count := connection.recv():
        taken: list[float] = []
        before = processor_time(psutil.Process())
        for _ in range(count):
            start = time.perf_counter()
            tokens = torch.randint(VOCABULARY, (1, STEP_LENGTH), generator=generator)
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
            taken.append(time.perf_counter() - start)
        if hasattr(engine.optimizer, "flush"):
            engine.optimizer.flush()
        used = processor_time(psutil.Process()) - before
        connection.send({"step_s": statistics.median(taken), "processor_s": used / count})
    engine.destroy()


def processor_time(process: Any) -> float:
    """Return the seconds of processor time that a process and its children have used."""
    spent = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in spent))


def start(model: Path, output: Path, mode: str, name: str, threads: int) -> tuple[Any, Connection]:
    """Start a process that serves an engine, and wait until it is ready."""
    flags = OPTIONS[name]
    values = {"deepspeed_config": f"configs/{mode}.json", "offload_params": "--offload_params" in flags}
    values["optimizer_state"] = "bf16" if "bf16" in flags else "fp32"
    os.environ |= {**rank_environment(0, 1, free_port()), **STEADY_ALLOCATOR, "OMP_NUM_THREADS": str(threads)}
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, str(model), str(output), values), daemon=True)
    process.start()
    ours.recv()
    return process, ours


def times(work: Path, options: argparse.Namespace) -> dict[str, dict[str, dict[str, list[dict[str, float]]]]]:
    """Return the times of each round by mode, option, and whether it was used; see `serve`."""
    write_model(work / "large", options.data, LARGE)
    found: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    for mode in MODES:
        found[mode] = {}
        for option in ("bf16 state", "weights on the host"):  # two engines at a time, for the memory of small machines
            engines = {
                key: start(work / "large", work / "none", mode, name, options.threads)
                for key, name in (("with", option), ("without", "default"))
            }
            taken: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
            for number in range(options.rounds + 1):
                for key in ("with", "without") if number % 2 else ("without", "with"):
                    engines[key][1].send(STEPS_PER_TURN)
                    measured = engines[key][1].recv()
                    if number:  # the first round warms up
                        taken[key].append(measured)
            for process, connection in engines.values():
                connection.send(0)
                process.join(60)
                process.kill()
            found[mode][option] = taken
    return found


def memory() -> dict[str, dict[str, dict[str, float]]]:
    """Return bytes per parameter by mode and options: the arena's and the trainer's own."""
    from tests.helpers import offload_memory

    result: dict[str, dict[str, dict[str, float]]] = {}
    for mode in MODES:
        result[mode] = {}
        for name, flags in OPTIONS.items():
            bf16_state, offload_params = "bf16" in flags, "--offload_params" in flags
            measure = partial(offload_memory.measure, bf16_state=bf16_state, offload_params=offload_params)
            (measured,) = run_ranks(1, measure, mode == MODES[0])
            result[mode][name] = {"arena": measured.get("arena", 0.0), "trainer": measured["trainer_private"]}
    return result


def report(found: dict[str, Any]) -> str:
    """Write the measurements as Markdown."""
    lines = ["# Memory options", "", f"Machine: {found['machine']}. torch {found['torch']}."]
    if "losses" in found:
        lines += [
            "",
            "Held-out loss of a Llama of 2.6 M parameters, trained on Alpaca rows, four per step. The first line "
            "starts from random weights, the others from the model that the first gave with fp32. *Changed* is the "
            "share of the bf16 weights that training has changed.",
            "",
            "| learning rate | steps | before | fp32 state | bf16 state | changed, fp32 | changed, bf16 |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for entry in found["losses"]:
            before = f"{entry['before']:.4f}" if entry["before"] else "random"
            shares = " | ".join(f"{100 * entry[f'changed_{state}']:.0f} %" for state in ("fp32", "bf16"))
            loss = " | ".join(f"{entry[state]:.4f}" for state in ("fp32", "bf16"))
            lines.append(f"| {entry['lr']:g} | {entry['steps']} | {before} | {loss} | {shares} |")
    if "times" in found:
        lines += [
            "",
            f"Time and processor time of a step of a Llama of 28 M parameters, {STEP_LENGTH} tokens per step: medians "
            f"over {found['rounds']} rounds, in which an engine with the option and one without take turns of "
            f"{STEPS_PER_TURN} steps, and medians of the ratios in the same round. Processor time is summed over cores "
            "and includes the optimizer process; step times include what other programs took of the machine meanwhile. "
            "The CPU is the device here, so nothing is copied over a bus.",
            "",
            "| mode | option | step without | with | ratio | processor without | with | ratio |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for mode, by_option in found["times"].items():
            for option, taken in by_option.items():
                cells = []
                for part in ("step_s", "processor_s"):
                    without, used = ([value[part] for value in taken[key]] for key in ("without", "with"))
                    ratio = statistics.median(a / b for a, b in zip(used, without, strict=True))
                    cells += [f"{1000 * statistics.median(values):.0f} ms" for values in (without, used)]
                    cells.append(f"{ratio:.2f}")
                lines.append(f"| {mode} | {option} | {' | '.join(cells)} |")
    if "memory" in found:
        lines += [
            "",
            "Host memory in bytes per parameter, 25 M parameters: the arena, and the growth of the trainer's own "
            "memory, which here includes the device's: bf16 weights, DeepSpeed's accumulation buffer and reduce "
            "bucket.",
            "",
            "| mode | options | arena | trainer | sum |",
            "| --- | --- | --- | --- | --- |",
        ]
        for mode, by_name in found["memory"].items():
            for name, entry in by_name.items():
                numbers = (entry["arena"], entry["trainer"], entry["arena"] + entry["trainer"])
                lines.append(f"| {mode} | {name} | {' | '.join(f'{number:.1f}' for number in numbers)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run the parts and write the results."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows as JSON")
    parser.add_argument(
        "--parts", nargs="+", choices=("memory", "losses", "times"), default=["memory", "losses", "times"]
    )
    parser.add_argument("--steps", type=int, default=300, help="steps from random weights; half as many afterwards")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each engine for the step time")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--machine", default=f"{os.cpu_count()} CPU cores, no GPU")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    options.data = options.data.resolve()
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "memory_options.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found |= {"machine": options.machine, "torch": torch.__version__, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], Any]] = {
            "memory": memory,
            "losses": partial(losses, Path(folder), options),
            "times": partial(times, Path(folder), options),
        }
        for name in options.parts:  # written after every part, so that an interruption loses one
            found[name] = parts[name]()
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (options.results / "memory_options.md").write_text(report(found), encoding="utf-8")
    sys.stdout.write(report(found))


if __name__ == "__main__":
    main()
