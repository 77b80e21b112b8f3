"""Fine-tune a language model with DeepSpeed ZeRO-3, its optimizer on the host: the story of one run.

Started by the launcher: `deepspeed finetune_zero3.py --model_name ... --output_dir ...`. What is slow to
import is imported in `main`, so that `--help` and a mistyped flag are answered at once.
"""

import sys
from typing import TYPE_CHECKING

from superoffload import cli, ds_config
from superoffload.errors import UserError

if TYPE_CHECKING:
    from superoffload.config import Config
    from superoffload.run import Run

CHECKPOINT_ERROR = 3


def main(config: "Config") -> int:
    """Train as the settings say and return the exit status."""
    document = ds_config.read(config)
    from superoffload import (
        attention,
        checkpoint,
        distributed,
        engine,
        evaluation,
        isolation,
        log,
        metrics,
        model,
        resume,
        tracking,
    )
    from superoffload.data import collate, loader
    from superoffload.requests import Requests
    from superoffload.run import Run
    from superoffload.tokenizer import load_tokenizer

    log.setup(config.output.log_level)
    merged = ds_config.merge(document, config, distributed.world_size())
    config = merged.config
    for note in merged.notes:
        log.logger.warning("%s", note)
    checkpoint.prepare_folder(config.output.output_dir)
    lock = resume.lock(config.output.output_dir) if distributed.speaks() else None
    distributed.init()
    distributed.seed_everything(config.training.seed, config.training.deterministic)
    source = resume.find(config)
    document = resume.prepared(merged.document, source)

    model_config = model.load_config(config.model.model_name)
    kernel = attention.choose(config.model, model_config, document, config.data.packs)
    model.check_leaf_module(config.model.leaf_module, model_config)
    tokenizer = load_tokenizer(config.model.model_name)
    with distributed.each_for_itself("tokenising"):
        rows, held_out = loader.load(tokenizer, config.data, config.training.seed)
        prompts = loader.prompts(evaluation.read_prompts(config.evaluation.sample_prompts), tokenizer, config.data)
    layout = collate.layout(config.data, tokenizer.pad_token_id, attention.takes_documents(kernel))
    batches = loader.Batches(rows, layout, config.training, distributed.place())
    held_out_batches = loader.Batches(held_out, layout, config.training, distributed.place()) if held_out else None
    log.logger.info("%s", batches.statistics().short())

    sharded = model.load_model(config.model, model_config, document, kernel)
    shape = model.shape_of(sharded)
    model_engine = engine.create(sharded, document, config.training, batches.total_steps)
    isolation.check(model_engine, layout)

    progress, state = resume.restore(model_engine, source) if source else (metrics.Progress(), {})
    engine.catch_up(model_engine)
    run = Run(
        config=config,
        engine=model_engine,
        tokenizer=tokenizer,
        batches=batches,
        progress=progress,
        meter=metrics.Meter(config, shape, state.get("meter")),
        trackers=tracking.start(config, distributed.speaks(), progress.step, state.get("trackers")),
        evaluation=evaluation.Evaluation(held_out_batches, prompts, config.evaluation.eval_steps),
        requests=Requests(config, distributed.speaks()),
    )
    try:
        with run.requests:
            if source:
                run.goes_on_from(source.path, state)
            train(run)
            if config.checkpoint.save_checkpoint or run.stopped:
                run.save()
    finally:
        run.trackers.finish()
    metrics.report(run.meter.summary(config.measurement.warmup_steps), run.saved, config.output.output_dir)
    if config.checkpoint.export:
        run.export()
    distributed.close()
    resume.unlock(lock)
    return CHECKPOINT_ERROR if run.failed and config.checkpoint.fail_on_checkpoint_error else 0


def train(run: "Run") -> None:
    """Run the optimizer steps that are left, and keep `run.progress` up to date (collective).

    The loss of a step is the mean over all its target tokens, on all ranks and in all micro-batches: their
    number is known before the first backward, and each micro-batch adds its share of the sum.
    """
    from superoffload import distributed, log
    from superoffload.loss import summed_loss

    config, model_engine, progress, requests = run.config, run.engine, run.progress, run.requests
    # DeepSpeed divides the loss by the micro-batches and averages gradients over the ranks.
    undone = config.training.gradient_accumulation_steps * distributed.world_size()
    with log.progress_bar(run.last_step, progress.step) as bar:
        run.meter.start()
        while progress.step < run.last_step and not run.stopped:
            for micro_batches in run.batches.epoch(progress.epoch, progress.step_in_epoch):
                lr = model_engine.get_lr()[0]
                targets = sum(batch.target_tokens for batch in micro_batches)
                tokens = sum(sum(batch.lengths) for batch in micro_batches)
                counts = distributed.counts(targets, tokens, *requests.votes())
                for batch in micro_batches:
                    inputs = batch.on(model_engine.device)
                    labels = inputs.pop("labels")
                    loss_sum = summed_loss(model_engine(**inputs).logits, labels)
                    model_engine.backward(loss_sum * (undone / counts[0]).float())
                    model_engine.step()
                    run.meter.add(batch, loss_sum.detach())
                run.meter.end_step()
                _, tokens, stop_votes, save_votes = counts.tolist()
                progress.advance(int(tokens))

                if progress.step % config.output.log_interval == 0 or progress.step == run.last_step:
                    grad_norm = float(model_engine.get_global_grad_norm())
                    numbers = run.meter.read(progress, lr, grad_norm, run.batches.steps_per_epoch)
                    log.logger.info("%s", numbers.line())
                    run.trackers.log(progress.step, numbers.as_dict())
                bar.update()
                if run.evaluation.due(progress.step, progress.step == run.last_step):
                    run.evaluate()
                if stop_votes:
                    log.logger.warning("Asked to stop by %s: saving after step %d", requests.stopped_by, progress.step)
                    run.stopped = True
                elif requests.wants_save(progress.step, save_votes):
                    run.save()
                    requests.saved()
                if run.stopped or progress.step == run.last_step:
                    break
            else:
                progress.next_epoch()


if __name__ == "__main__":
    try:
        status = main(cli.parse(sys.argv[1:]))
    except UserError as error:
        cli.exit_with(error)
    cli.leave(status)
