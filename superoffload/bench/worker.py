"""One rank of one configuration: the program's own engine, batches, loss and step. A process; see channel.py."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count, islice
from typing import Any, cast

import finetune_zero3
from superoffload import config as settings
from superoffload import distributed, log
from superoffload.bench import alternatives, channel, documents, grid
from superoffload.bench.grid import Order
from superoffload.data import collate, loader
from superoffload.data.collate import Batch
from superoffload.data.loader import Batches
from superoffload.ds_config import Merged, merge_flags, read_ds_config
from superoffload.errors import UserError
from superoffload.model import attention, flops, head, isolation, load, loss_kernel, vocabulary
from superoffload.model.load import Architecture
from superoffload.planning import preflight
from superoffload.protocols import Engine, Model
from superoffload.training import engine, metrics
from superoffload.training.evaluation import Evaluation
from superoffload.training.inputs import Inputs
from superoffload.training.inputs import load as load_inputs
from superoffload.training.progress import Progress
from superoffload.training.run import Run
from superoffload.training.run_control import RunControl
from superoffload.training.step_parts import StepParts
from superoffload.training.tracking import Trackers


class Worker:
    """Takes steps of one configuration (every method is collective)."""

    def __init__(self, order: Order) -> None:
        """Set up a run as `finetune_zero3.py` does, in the same order and with the same functions.

        Raises `UserError` as it does.
        """
        config = settings.build(order.flags, frozenset(order.flags))
        log.setup(config.output.log_level)
        if order.mode == grid.STOCK:
            alternatives.let_stock_run_without_cuda()
        merged = merge_flags(read_ds_config(config), config, distributed.world_size())
        distributed.init()
        distributed.seed_everything(merged.config.training.seed, deterministic=False)
        engine.check(merged.ds_config, merged.config.offload.deepspeed_config)
        architecture = load.load_architecture(merged.config.model, merged.config.data.max_length)
        inputs = _inputs(merged, architecture, order)
        merged, _ = preflight.check(merged, architecture, inputs.batches.longest, ())
        model = _model(merged, architecture, inputs, order)
        stock = order.mode == grid.STOCK
        model_engine = engine.create(
            model, merged.ds_config, merged.config, inputs.batches.total_steps, stock=stock
        )  # fmt: skip
        self._run = _run(merged, model_engine, model, inputs)
        self._steps = self._run.meter.parts.waiting_for(_endless(inputs.batches))
        self._run.meter.start()

    def turn(self, steps: int) -> dict[str, Any]:
        """Take one step that is not measured, then `steps` that are; return their numbers.

        The first one lets the optimizer process and the caches come to what they do in the middle of a run.
        """
        self._train(1)
        self._read()
        self._run.meter.start()
        clipped = self._train(steps)
        numbers = self._read()
        if hasattr(self._run.engine.optimizer, "flush"):  # another configuration's turn begins
            self._run.engine.optimizer.flush()
        rates = asdict(numbers.rates)
        loss = numbers.loss if math.isfinite(numbers.loss) else None  # JSON has no NaN
        return {"steps": steps, **rates, "parts": numbers.parts, "loss": loss, "clipped_steps": clipped}

    def _train(self, steps: int) -> int:
        """Take steps; return how many were clipped."""
        run, clipped = self._run, 0
        most = run.config.training.max_grad_norm
        for micro_batches in islice(self._steps, steps):
            counts, _ = finetune_zero3.train_step(run, micro_batches)
            run.progress.advance(counts.tokens, run.batches.packs_per_step)
            clipped += 0 < most < float(run.engine.get_global_grad_norm())
        return clipped

    def _read(self) -> metrics.StepMetrics:
        run = self._run
        return run.meter.read(run.progress, run.engine.get_lr()[0], 0.0, run.batches.packs_in(0))

    def describe(self) -> dict[str, Any]:
        """Return what was chosen: parameters, attention kernel, loss kernel, optimizer."""
        model, optimizer = cast(Any, self._run.engine.module), self._run.engine.optimizer
        return {
            "parameters": flops.count_parameters(model),
            "attention": model.config._attn_implementation,
            "loss": "plain" if isinstance(self._run.loss, head.PlainLoss) else "chunked",
            "optimizer": type(optimizer).__name__,
            "device": distributed.device().type,
        }

    def memory(self) -> dict[str, int]:
        """Return the peaks of memory so far in bytes: of one device, and of the host over all ranks."""
        return metrics.peak_memory()

    def close(self) -> None:
        """End the optimizer process and leave the group."""
        self._run.engine.destroy()  # type: ignore[attr-defined]  # not in the protocol: only here an engine ends early
        distributed.close()


def _inputs(merged: Merged, architecture: Architecture, order: Order) -> Inputs:
    """Return rows of the data set as a run does, or synthetic ones."""
    if not order.documents:
        return load_inputs(merged.config, merged.ds_config, architecture)
    config = merged.config
    kernel = attention.choose(config.model, architecture.config, merged.ds_config, config.data.packs)
    layout = collate.choose_layout(config.data, 0, attention.takes_documents(kernel))
    rows_of_table = architecture.skeleton.get_input_embeddings().weight.shape[0]
    rows = documents.make(order.documents, rows_of_table, config.data.max_length, config.training.seed)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batches = loader.Batches(rows, layout, config.training, **ranks)
    return Inputs(kernel, cast(Any, None), batches, Evaluation(None, loader.Prompts(), 0))


def _model(merged: Merged, architecture: Architecture, inputs: Inputs, order: Order) -> Model:
    model, kernel = merged.config.model, inputs.attention_kernel
    if order.random_weights:
        return load.random_model(model, architecture, merged.ds_config, kernel)
    rows = 0
    if not order.documents:
        ids = inputs.evaluation.ids(inputs.batches)
        rows = vocabulary.rows_needed(model, architecture.config, inputs.tokenizer, *ids)
    return load.load_model(model, architecture, merged.ds_config, kernel, rows)


def _run(merged: Merged, model_engine: Engine, model: Model, inputs: Inputs) -> Run:
    config, batches = merged.config, inputs.batches
    isolation.check(model_engine, batches.layout)
    loss = loss_kernel.choose(config.model.loss_kernel, model_engine, batches.layout)
    return Run(
        config=config,
        engine=model_engine,
        loss=loss,
        tokenizer=inputs.tokenizer,
        batches=batches,
        progress=Progress(),
        meter=metrics.Meter(
            config,
            flops.shape_of(model),
            sources=batches.sources,
            parts=StepParts(model_engine),
            tiled=flops.tiled_parameters(model),
        ),
        trackers=Trackers({}),
        evaluation=inputs.evaluation,
        control=RunControl(config, distributed.is_rank_0()),
    )


def _endless(batches: Batches) -> Iterator[list[Batch]]:
    """Yield the micro-batches of whole steps, epoch after epoch: an incomplete last step would be too fast."""
    whole = batches.packs_in(0) // batches.packs_per_step
    if not whole:
        raise UserError(
            f"--dataset_name: its {batches.packs_in(0)} rows or packs are fewer than the {batches.packs_per_step} of "
            "one step; use more rows, or a smaller batch"
        )
    for epoch in count():
        yield from islice(batches.epoch(epoch), whole)


if __name__ == "__main__":
    channel.serve(Worker, distributed.lost_another_rank)
