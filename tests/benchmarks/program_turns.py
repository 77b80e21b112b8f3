"""The processes of program_speed.py: the program, held at its first step, and the same model without DeepSpeed."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRODUCT = 4096  # rows and columns of the matrices whose product gives the machine's rate


class Turn:
    """A process that answers commands, each the name of a method and its arguments."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        """Start `target(connection, *arguments)`."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments))
        self._process.start()
        theirs.close()

    def ask(self, *command: Any) -> Any:
        """Return the answer to a command. Raises EOFError if the process has ended."""
        self._connection.send(command)
        return self._connection.recv()

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def process(target: Callable[..., None], *arguments: Any) -> Iterator[Turn]:
    """Run a process that answers commands within the block."""
    turn = Turn(target, *arguments)
    try:
        yield turn
    finally:
        turn.close()


def answer(connection: Connection, owner: Any) -> None:
    """Answer commands until the other side closes the connection."""
    while True:
        try:
            name, *arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(owner, name)(*arguments))


def program(connection: Connection, flags: list[str], steps: int) -> None:
    """Run the program up to its first step, and take that many steps whenever asked, until the connection closes."""
    import finetune_zero3
    from superoffload import cli

    train = finetune_zero3.train
    finetune_zero3.train = lambda run: answer(connection, Program(run, train, steps))
    finetune_zero3.main(cli.parse(flags))


class Program:
    """The program at its first step: its own loop, and a bare loop of the same engine calls on the same batches."""

    def __init__(self, run: Any, train: Callable[[Any], None], steps: int) -> None:
        self._run, self._train, self._count = run, train, steps
        self._batches = [micro for micro, *_ in islice(run.batches.epoch(0), steps)]

    def facts(self) -> bytes:
        """Return, pickled, what the other process needs for the same work."""
        engine = self._run.engine
        attention = engine.module.config._attn_implementation
        return pickle.dumps({"batches": self._batches, "loss": self._run.loss, "attention": attention})

    def whole(self) -> list[float]:
        """Return the step times of the program's own loop, as it logs them."""
        run = self._run
        run.progress.epoch = run.progress.packs_in_epoch = 0
        last = run.progress.step + self._count
        measurement = replace(run.config.measurement, bench_steps=last)
        run.config = replace(run.config, measurement=measurement)
        self._train(run)
        lines = (Path(run.config.output.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["step_time_s"] for line in lines[-self._count :]]

    def bare_loop(self) -> list[tuple[float, float]]:
        """Return the times of steps of nothing but the engine calls, and of the optimizer's part of each."""
        run, times = self._run, []
        for batch in self._batches:
            started = time.perf_counter()
            losses = run.loss(run.engine, batch)
            run.engine.backward(losses.sum() / batch.target_tokens)
            computed = time.perf_counter()
            run.engine.step()
            ended = time.perf_counter()
            times.append((ended - started, ended - computed))
        return times


class _Alone:
    """Stands in for DeepSpeed's engine in front of the loss."""

    def __init__(self, model: Any) -> None:
        import torch

        self.module, self.device = model, torch.device("cpu")

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def without_deepspeed(connection: Connection, folders: Sequence[str], facts: bytes) -> None:
    """Load models without DeepSpeed's engine, and run them forward and backward whenever asked."""
    answer(connection, WithoutDeepSpeed(folders, facts))


class WithoutDeepSpeed:
    """The models, whole and without DeepSpeed, and the machine's rate."""

    def __init__(self, folders: Sequence[str], facts: bytes) -> None:
        import torch
        import transformers

        from superoffload.model import attention, flops  # noqa: F401  attention registers its kernels

        self._torch = torch
        known = pickle.loads(facts)
        self._batches, self._loss = known["batches"], known["loss"]
        self._models: dict[str, _Alone] = {}
        self._flops: dict[str, list[float]] = {}
        for folder in folders:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, attn_implementation=known["attention"], use_cache=False
            )
            shape = flops.shape_of(model)
            self._models[folder] = _Alone(model.train())
            self._flops[folder] = [flops.model_flops(shape, batch.lengths) for batch in self._batches]
        self._left = torch.randn(PRODUCT, PRODUCT).bfloat16()
        self._right = torch.randn(PRODUCT, PRODUCT).bfloat16()

    def forward_backward(self, folder: str) -> list[float]:
        """Return the times of forward and backward of one model on every batch."""
        engine, times = self._models[folder], []
        for batch in self._batches:
            started = time.perf_counter()
            losses = self._loss(engine, batch)
            (losses.sum() / batch.target_tokens).backward()
            engine.module.zero_grad()
            times.append(time.perf_counter() - started)
        return times

    def flops(self, folder: str) -> list[float]:
        """Return the FLOPs of forward and backward of one model on every batch."""
        return self._flops[folder]

    def product_flops_per_s(self) -> float:
        """Return the rate of a large product of bf16 matrices, the best of two in a row."""
        times = []
        for _ in range(2):
            started = time.perf_counter()
            self._left @ self._right
            times.append(time.perf_counter() - started)
        return 2.0 * PRODUCT**3 / min(times)
