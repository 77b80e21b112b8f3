"""Fine-tune a language model with DeepSpeed ZeRO-3 and the optimizer on the host: one run, from top to bottom.

Started by the launcher: `deepspeed finetune_zero3.py --model_name ... --output_dir ...`. Slow imports happen inside
`main`, so that `--help` and usage errors return immediately.
"""

from typing import TYPE_CHECKING

from superoffload import cli, log
from superoffload.ds_config import merge_flags, read_ds_config
from superoffload.run_log import run_log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from superoffload.checkpoint.resume import Source
    from superoffload.config import Config
    from superoffload.data.collate import Batch
    from superoffload.ds_config import Merged
    from superoffload.model.load import Architecture
    from superoffload.planning.forecast import Forecast
    from superoffload.training.inputs import Inputs
    from superoffload.training.run import Run
    from superoffload.training.step import StepCounts, Votes

CHECKPOINT_ERROR = 3


def main(config: "Config") -> int:
    """Check the settings against the machine, train with them, and return the exit status."""
    ds_config = read_ds_config(config)
    from superoffload.training import tracking

    tracking.check(config.tracking)
    log.setup(config.output.log_level)
    run_log.capture(config.output.log_level)
    from superoffload import distributed
    from superoffload.checkpoint import folder_lock, output_folder, resume
    from superoffload.model import load, sequence_parallel
    from superoffload.planning import exhaustion, preflight
    from superoffload.training import engine, inputs

    merged = merge_flags(ds_config, config, distributed.world_size())
    config = merged.config
    log.warn(merged.notes)
    lock = output_folder.prepare(config.output.output_dir, config.inputs)
    run_log.open(config.output.output_dir)
    distributed.init()
    sequence_parallel.form_groups(config.training.sequence_parallel_size)
    distributed.seed_everything(config.training.seed, config.training.deterministic)
    engine.check(merged.ds_config, config.offload.deepspeed_config)
    checkpoints = resume.find(config)
    output_folder.write_settings(config)
    architecture = load.load_architecture(config.model, config.data.max_length)
    loaded = inputs.load(config, merged.ds_config, architecture)
    merged, forecast = preflight.check(merged, architecture, loaded.batches.longest, checkpoints)

    with exhaustion.explained(forecast, config.output.output_dir):
        failed = fine_tune(merged, architecture, loaded, checkpoints, forecast)
    distributed.close()
    folder_lock.unlock(lock)
    return CHECKPOINT_ERROR if failed and config.checkpoint.fail_on_checkpoint_error else 0


def fine_tune(
    merged: "Merged",
    architecture: "Architecture",
    inputs: "Inputs",
    checkpoints: "list[Source]",
    forecast: "Forecast | None",
) -> bool:
    """Load the model, train, save and export (collective); return whether the last save or the export failed."""
    from superoffload import distributed
    from superoffload.checkpoint import resume
    from superoffload.model import flops, isolation, load, loss_kernel, neftune, sequence_parallel, vocabulary
    from superoffload.model.head import Objective
    from superoffload.planning import environment
    from superoffload.reporting import recorder
    from superoffload.training import engine, metrics, tracking
    from superoffload.training.progress import Progress
    from superoffload.training.run import Run
    from superoffload.training.run_control import RunControl
    from superoffload.training.step_parts import StepParts

    config, ds_config = merged.config, merged.ds_config
    attention_kernel, tokenizer, batches, evaluation = inputs
    embedding_rows = vocabulary.rows_needed(config.model, architecture.config, tokenizer, *evaluation.ids(batches))

    source = resume.first_intact(config, checkpoints)
    progress = Progress(**resume.progress_of(source))
    batches.start_at(progress.step, progress.epoch, progress.packs_in_epoch)
    model = load.load_model(config.model, architecture, ds_config, attention_kernel, embedding_rows)
    load.end_answers_with(model, evaluation.end_ids)
    model_engine = engine.create(model, resume.with_checkpoint_format(ds_config, source), config, batches.total_steps)
    isolation.check(model_engine, batches.layout)
    sequence_parallel.check(model_engine, batches.layout)
    loss = loss_kernel.choose(config.model.loss_kernel, model_engine, batches.layout, Objective.of(config.training))
    neftune.install(model_engine, config.training)

    state = resume.restore(model_engine, source, trusted=config.checkpoint.trust_checkpoint) if source else {}
    engine.replay_adam_beta_powers(model_engine)
    run = Run(
        config=config,
        engine=model_engine,
        loss=loss,
        tokenizer=tokenizer,
        batches=batches,
        progress=progress,
        meter=metrics.Meter(
            config,
            flops.shape_of(model, architecture.frozen),
            state.get("meter"),
            sources=batches.sources,
            parts=StepParts(model_engine),
            tiled=flops.tiled_parameters(model),
        ),
        trackers=tracking.start(config, distributed.is_rank_0(), progress.step, state.get("trackers")),
        evaluation=evaluation,
        control=RunControl(config, distributed.is_rank_0()),
        samples=tracking.start_samples(config, distributed.is_rank_0(), progress.step),
    )
    with recorder.recording(run, forecast.record() if forecast else {}, environment.of_run):
        with run.control:
            if source:
                run.restore_rng_and_check_data(source, state)
            train(run)
            if config.checkpoint.save_checkpoint or run.stopped:
                run.save()
        run.summarize()
        run.check_last_loss()
        run.export()
    return run.failed


def train(run: "Run") -> None:
    """Run the remaining optimizer steps and keep `run.progress` up to date (collective)."""
    from superoffload.planning.memory_watch import MemoryWatch
    from superoffload.reporting import choice

    watch = MemoryWatch()
    config, progress, control, batches = run.config, run.progress, run.control, run.batches
    with choice.choose(run) as screen:
        run.meter.start()
        while progress.step < run.last_step and not run.stopped:
            for micro_batches in run.meter.parts.waiting_for(batches.epoch(progress.epoch, progress.packs_in_epoch)):
                lr = run.engine.get_lr()[0]
                counts, votes = train_step(run, micro_batches)
                progress.advance(counts.tokens, batches.packs_per_step)
                run.watch_loss(counts.bad_losses)

                if progress.step % config.output.log_interval == 0 or progress.step == run.last_step:
                    grad_norm = float(run.engine.get_global_grad_norm())
                    numbers = run.meter.read(progress, lr, grad_norm, batches.packs_in(progress.epoch))
                    memory = watch.check()
                    log.steps.info("%s", numbers.line())
                    screen.show(numbers, memory)
                    run.trackers.log(progress.step, numbers.as_dict() | memory)
                screen.advance(progress.step)
                if votes.stop:
                    log.logger.warning("Stopped by %s: saving after step %d", control.stopped_by, progress.step)
                    run.stopped = True
                elif run.evaluation.due(progress.step, progress.step == run.last_step):
                    run.evaluate()
                if not run.stopped and control.wants_save(progress.step, votes.save):
                    run.save()
                    control.saved()
                if run.stopped or progress.step == run.last_step:
                    break
            else:
                progress.next_epoch()


def train_step(run: "Run", micro_batches: "Sequence[Batch]") -> "tuple[StepCounts, Votes]":
    """Run one optimizer step over its micro-batches (collective).

    The loss of a step is the mean over all its target tokens, on all ranks and in all micro-batches: their number is
    known before the first backward, and each micro-batch adds its part of the sum. Votes to stop and to save are taken
    as late as possible, so that a request is answered in the step in which it arrives.
    """
    from superoffload import distributed
    from superoffload.training import step

    engine, parts = run.engine, run.meter.parts
    # DeepSpeed divides the loss by the number of micro-batches and averages gradients over the ranks.
    undo_averaging = run.config.training.gradient_accumulation_steps * distributed.world_size()
    sums = step.sum_over_ranks(micro_batches, run.meter.bad_loss)
    for batch in micro_batches:
        losses = run.loss(engine, batch)
        parts.mark("loss")
        engine.backward(losses.sum() * (undo_averaging / sums.target_tokens).float())
        parts.mark("backward")
        if batch is micro_batches[-1]:
            votes = step.VoteSums(run.control.votes())
        engine.step()
        parts.mark("optimizer")
        run.meter.add(batch, losses.detach())
    run.meter.end_step()
    return sums.read(), votes.read()


if __name__ == "__main__":
    cli.run(main)
