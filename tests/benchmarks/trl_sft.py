"""Train with TRL's packed SFT. Started by trl_speed.py in an environment with TRL; imports nothing of this repository.

Reads tokenised rows, so that both programs train on the same tokens and targets. TRL's defaults stay as they are, but
for recomputation of activations, which the other program does not do either.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Train, then write the times of the steps and what was trained on to --out."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="Parquet file of input_ids and labels")
    parser.add_argument("--ds_config", required=True)
    parser.add_argument("--max_length", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_args()

    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
        """Notes when training began and when each step ended."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.marks.append(time.perf_counter())

    clock = Clock()
    settings = SFTConfig(
        output_dir=str(options.out.with_suffix(".output")),
        packing=True,
        max_length=options.max_length,
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps,
        learning_rate=options.lr,
        gradient_checkpointing=False,
        bf16=True,
        use_cpu=True,
        deepspeed=options.ds_config,
        model_init_kwargs={"dtype": "bfloat16"},
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = SFTTrainer(
        model=options.model,
        args=settings,
        train_dataset=Dataset.from_parquet(options.rows, cache_dir=str(options.out.with_suffix(".cache"))),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        callbacks=[clock],
    )
    trainer.train()
    packs = trainer.train_dataset
    targets = sum(sum(label != -100 for label in labels) for labels in packs["labels"])
    found = {
        "trl": version("trl"),
        "attention": trainer.model.config._attn_implementation,
        "packing_strategy": settings.packing_strategy,
        "packs": len(packs),
        "targets_per_step": targets / len(packs) * options.batch_size,
        "documents_isolated": isolated(trainer),
        "step_times_s": [end - start for start, end in zip(clock.marks, clock.marks[1:], strict=False)],
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
    }
    options.out.write_text(json.dumps(found), encoding="utf-8")


def isolated(trainer: Any) -> bool:
    """Return whether the second document of a pack stays the same when the first one changes."""
    import torch

    decoder = trainer.model_wrapped.module.eval().get_decoder()  # without the head, for which TRL has its own forward
    hidden = []
    for first in (list(range(2, 18)), list(range(3, 19))):
        ids = [*first, *range(20, 36)]
        batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [16, 16]}])
        del batch["labels"]
        with torch.no_grad():
            hidden.append(decoder(**batch, use_cache=False).last_hidden_state[0, 16:])
    return bool(torch.equal(*hidden))


if __name__ == "__main__":
    main()
