"""What measurements of whole runs share: a random Llama, its tokenizer and rows, and the program under its launcher."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.benchmarks.offload_speed import machine
from tests.helpers.ranks import REPOSITORY, launch

HEAD_DIM = 64
VOCABULARY = 4096
RESULTS = Path(__file__).parent / "results"
TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama with random weights, and how many packs or rows of which length a step takes."""

    hidden: int
    layers: int
    max_length: int
    batch_size: int

    def llama(self) -> dict[str, Any]:
        """Return the model's configuration for transformers."""
        heads = max(1, self.hidden // HEAD_DIM)
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 43 // 16,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": self.max_length,
            "eos_token_id": 0,
            "bos_token_id": None,
        }

    def describe(self) -> str:
        """Return the shape in words."""
        return (
            f"Llama of hidden size {self.hidden} and {self.layers} layers, vocabulary {VOCABULARY}, max_length "
            f"{self.max_length}, batch size {self.batch_size}, bf16"
        )


def parser(description: str | None, rounds: int, steps: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that all measurements of whole runs have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="Alpaca rows, such as alpaca_en_demo.json")
    made.add_argument("--rounds", type=int, default=rounds, help="turns of each contender")
    made.add_argument("--steps", type=int, default=steps, help="measured steps of each turn")
    made.add_argument("--hidden", type=int, default=512)
    made.add_argument("--layers", type=int, default=8)
    made.add_argument("--max_length", type=int, default=2048)
    made.add_argument("--batch_size", type=int, default=4)
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return made


def shape_of(options: argparse.Namespace) -> Shape:
    """Return the shape that the flags of `parser` ask for."""
    names = ("hidden", "layers", "max_length", "batch_size")
    return Shape(**{name: getattr(options, name) for name in names})


def circumstances(script: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return where and how something was measured, without naming the machine."""
    return {
        "machine": machine(),
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "command": f"python tests/benchmarks/{script} --data {options.data.name}"
        + "".join(
            f" --{n} {getattr(options, n)}" for n in ("rounds", "steps", "hidden", "layers", "max_length", "batch_size")
        ),
        "model": shape_of(options).describe(),
        "rounds": options.rounds,
        "steps": options.steps,
    }


def heading(title: str, found: dict[str, Any]) -> list[str]:
    """Return the first lines of a report: its title, the machine, the model and the command."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [
        f"# {title}",
        "",
        f"{found['machine']}, {found['threads']} threads, {versions}. {found['model']}. Command:",
        "",
        "```bash",
        found["command"],
        "```",
        "",
    ]


def method(found: dict[str, Any]) -> list[str]:
    """Return how whole runs were compared, for a report."""
    return [
        f"Whole runs under one launcher, in turns: {found['rounds']} rounds, measured steps in each: {found['steps']}, "
        "without the first. Target tokens/s: those of an average step of the epoch over the median step time.",
        "",
    ]


@contextmanager
def work_folder() -> Iterator[Path]:
    """Make a temporary folder, which also holds the cache of tokenised rows."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["HF_DATASETS_CACHE"] = str(Path(name) / "cache")  # before datasets is imported
        yield Path(name)


def write_model(folder: Path, data: Path, shape: Shape) -> Path:
    """Write a random Llama and a byte-pair tokenizer trained on the rows; return the folder."""
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
    LlamaForCausalLM(LlamaConfig(**shape.llama())).to(torch.bfloat16).save_pretrained(str(folder))
    return folder


def tokenised(model: Path, data: Path, max_length: int) -> Any:
    """Return the `TokenizedRows` that the program trains on."""
    from superoffload.config import DataSettings
    from superoffload.data import loader
    from superoffload.model.tokenizer import load_tokenizer

    settings = DataSettings(dataset_name=(str(data),), max_length=max_length)
    return loader.load(load_tokenizer(str(model)), settings, 0)[0]


def targets_per_step(rows: Any, shape: Shape, packs: bool) -> float:
    """Return the mean target tokens of a step over an epoch.

    Some steps are too few to tell: those of unpacked rows hold from a few to hundreds of target tokens.
    """
    from superoffload.data import packing

    members = len(packing.pack(rows.lengths, shape.max_length)) if packs else len(rows)
    return float(rows.targets.sum() / members * shape.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """The median time of the measured steps of a run, and the summary that it wrote."""

    step_time_s: float
    summary: dict[str, Any]


def train(model: Path, options: argparse.Namespace, *flags: str, ds_config: Path, warmup_steps: int = 1) -> Timed:
    """Train `warmup_steps` and the measured steps with the program under its launcher."""
    shape, total = shape_of(options), str(options.steps + warmup_steps)
    with tempfile.TemporaryDirectory() as output:
        done = launch(
            1,
            *("--model_name", str(model), "--dataset_name", str(options.data), "--output_dir", output),
            *("--max_length", str(shape.max_length), "--batch_size", str(shape.batch_size), "--bench_steps", total),
            *("--warmup_steps", str(warmup_steps), "--deepspeed_config", str(ds_config), *flags),
            timeout_s=TIMEOUT_S,
            OMP_NUM_THREADS=str(options.threads),
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        lines = (Path(output) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        summary = json.loads((Path(output) / "summary.json").read_text(encoding="utf-8"))
    times = [json.loads(line)["step_time_s"] for line in lines[warmup_steps:]]
    return Timed(step_time_s=statistics.median(times), summary=summary)


def ds_config_of(mode: str) -> Path:
    """Return the file of a mode."""
    return REPOSITORY / "configs" / f"{mode}.json"
