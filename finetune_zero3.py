"""Fine-tune a language model with DeepSpeed ZeRO-3, its optimizer on the host: the story of one run.

Started by the launcher: `deepspeed finetune_zero3.py --model_name ... --output_dir ...`. What is slow to
import is imported in `main`, so that `--help` and a mistyped flag are answered at once.
"""

import sys
from typing import TYPE_CHECKING, Any

from superoffload import cli, ds_config
from superoffload.errors import UserError

if TYPE_CHECKING:
    from superoffload.config import Config
    from superoffload.data.loader import Batches
    from superoffload.metrics import Meter, Progress
    from superoffload.tracking import Trackers

CHECKPOINT_ERROR = 3


def main(config: "Config") -> int:
    """Train as the settings say and return the exit status."""
    document = ds_config.read(config)
    from superoffload import checkpoint, distributed, engine, isolation, log, metrics, model, tokenizer, tracking
    from superoffload.data import collate, loader

    log.setup(config.output.log_level)
    merged = ds_config.merge(document, config, distributed.world_size())
    config = merged.config
    for note in merged.notes:
        log.logger.warning("%s", note)
    checkpoint.prepare_folder(config.output.output_dir)
    distributed.init()
    distributed.seed_everything(config.training.seed, config.training.deterministic)

    document = engine.for_this_device(merged.document)
    model_config = model.load_config(config.model.model_name)
    attention = model.choose_attention(config.model, model_config, document)
    model.check_leaf_module(config.model.leaf_module, model_config)
    words = tokenizer.load(config.model.model_name)
    with distributed.each_for_itself("tokenising"):
        rows, _held_out = loader.load(words, config.data, config.training.seed)
    layout = collate.layout(config.data, words.pad_token_id, attention)
    batches = loader.Batches(rows, layout, config.training, distributed.place())
    log.logger.info("%s", batches.statistics().short())

    sharded = model.load_model(config.model, model_config, document, attention)
    shape = model.shape_of(sharded)
    model_engine = engine.create(sharded, document, config.training, batches.total_steps)
    isolation.check(model_engine, layout)

    progress = metrics.Progress()
    meter = metrics.Meter(config, shape)
    trackers = tracking.start(config, distributed.speaks())
    saved = checkpoint.NOT_ASKED
    try:
        train(model_engine, batches, config, progress, (meter, trackers))
        if config.output.save_checkpoint:
            saved = checkpoint.save(model_engine, words, config, progress)
    finally:
        trackers.finish()
    metrics.report(meter.summary(config.measurement.warmup_steps), saved, config.output.output_dir)
    distributed.close()
    return CHECKPOINT_ERROR if saved.failed and config.output.fail_on_checkpoint_error else 0


def train(
    model_engine: Any, batches: "Batches", config: "Config", progress: "Progress", reports: "tuple[Meter, Trackers]"
) -> None:
    """Run the optimizer steps from `progress` on to the end, and keep `progress` up to date (collective).

    The loss of a step is the mean over all its target tokens, on all ranks and in all micro-batches: their
    number is known before the first backward, and each micro-batch adds its share of the sum.
    """
    from superoffload import distributed, log
    from superoffload.loss import summed_loss

    meter, trackers = reports
    last_step = min(batches.total_steps, config.measurement.bench_steps or batches.total_steps)
    # DeepSpeed divides the loss by the micro-batches and averages gradients over the ranks.
    undone = config.training.gradient_accumulation_steps * distributed.world_size()
    bar = log.progress_bar(last_step, progress.step)
    meter.start()
    while progress.step < last_step:
        for micro_batches in batches.epoch(progress.epoch, progress.step_in_epoch):
            lr = model_engine.get_lr()[0]
            targets = distributed.count(sum(batch.target_tokens for batch in micro_batches))
            for batch in micro_batches:
                inputs = batch.on(model_engine.device)
                labels = inputs.pop("labels")
                loss_sum = summed_loss(model_engine(**inputs).logits, labels)
                model_engine.backward(loss_sum * (undone / targets))
                model_engine.step()
                meter.add(batch, loss_sum.detach())
            meter.end_step()
            progress.step += 1
            progress.step_in_epoch += 1

            if progress.step % config.output.log_interval == 0 or progress.step == last_step:
                grad_norm = float(model_engine.get_global_grad_norm())
                numbers = meter.read(progress, lr, grad_norm, batches.steps_per_epoch)
                log.logger.info("%s", numbers.line())
                trackers.log(progress.step, numbers.as_dict())
            bar.update()
            if progress.step == last_step:
                break
        else:
            progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
    bar.close()


if __name__ == "__main__":
    try:
        sys.exit(main(cli.parse(sys.argv[1:])))
    except UserError as error:
        cli.exit_with(error)
