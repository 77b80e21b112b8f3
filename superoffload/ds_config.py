"""DeepSpeed's JSON and the flags -> the dict that DeepSpeed gets.

The JSON says where memory lives, the flags say what is trained. Where both can set a value, `"auto"` or an
absent key takes the flag's, an equal value is fine, a default gives way to the JSON, and two values that
somebody wrote down and that differ are an error that names both.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload.config import Config
from superoffload.errors import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
BETAS = (0.9, 0.999)

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What came of the JSON and the flags.

    `document` is what `deepspeed.initialize` gets, without any `"auto"`; `config` holds the values in force;
    `notes` are lines to log once logging is set up.
    """

    document: Document
    config: Config
    notes: tuple[str, ...] = ()


def read(config: Config) -> Document:
    """Read the file of `--deepspeed_config` and check that it is ZeRO-3 with the optimizer off the device.

    A path that nobody gave is looked for beside `finetune_zero3.py`, so that the default holds in any
    working directory. Raises `UserError`.
    """
    name = config.offload.deepspeed_config
    path = Path(name) if "deepspeed_config" in config.explicit else REPOSITORY / name
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--deepspeed_config {name}: cannot be read ({error.strerror}); "
            "configs/ holds superoffload.json and zerooffload.json"
        ) from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {name}: not JSON ({error})") from error
    _check(document, name)
    return dict(document)


def _check(document: Any, name: str) -> None:
    """Raise `UserError` unless the JSON is one this program can train with."""
    zero = document.get("zero_optimization") if isinstance(document, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        stage = zero.get("stage") if isinstance(zero, dict) else None
        raise UserError(f"--deepspeed_config {name}: zero_optimization.stage is {stage}, must be 3")
    offload = zero.get("offload_optimizer")
    device = offload.get("device") if isinstance(offload, dict) else None
    if device not in ("cpu", "nvme"):
        raise UserError(
            f"--deepspeed_config {name}: zero_optimization.offload_optimizer.device is {device}, must be cpu or nvme"
        )
    if all(_enabled(document, kind) for kind in ("bf16", "fp16")):
        raise UserError(f"--deepspeed_config {name}: bf16 and fp16 are both enabled; keep one")
    optimizer = document.get("optimizer", {})
    betas = optimizer.get("params", {}).get("betas", "auto")
    if optimizer.get("type", "AdamW") not in ("Adam", "AdamW") or (betas != "auto" and tuple(betas) != BETAS):
        raise UserError(
            f"--deepspeed_config {name}: the optimizer is AdamW with betas {BETAS}, the file asks for "
            f"{optimizer.get('type')} with {betas}; remove its section optimizer"
        )
    schedule = document.get("scheduler", {})
    if schedule.get("type", "WarmupLR") not in SCHEDULES:
        raise UserError(
            f"--deepspeed_config {name}: scheduler {schedule['type']} is not one of "
            f"{', '.join(SCHEDULES)}; remove the section and use --lr_scheduler"
        )
    if schedule.get("params", {}).get("warmup_num_steps", "auto") != "auto":
        raise UserError(
            f"--deepspeed_config {name}: scheduler.params.warmup_num_steps is set; "
            'make it "auto" and use --warmup, a share of the steps'
        )


def _enabled(document: Document, kind: str) -> bool:
    return document.get(kind, {}).get("enabled") is True or (
        kind == "bf16" and document.get(kind, {}).get("enabled") == "auto"
    )


class _Settlement:
    """Settles the values that JSON and flags share, one by one."""

    def __init__(self, config: Config, name: str) -> None:
        self.values = settings.flat(config)
        self.explicit = config.explicit
        self.name = name
        self.notes: list[str] = []

    def settle(self, flag: str, key: str, found: Any) -> Any:
        """Return the value in force for `flag`, given what the JSON says under `key` (None: nothing)."""
        if found in (None, "auto"):
            return self.values[flag]
        if isinstance(self.values[flag], (int, float)) and not isinstance(found, (int, float)):
            raise UserError(f'--deepspeed_config {self.name}: {key} is {found!r}, not a number or "auto"')
        if found != self.values[flag] and flag in self.explicit:
            raise UserError(
                f"--{flag} {self.values[flag]} contradicts {key} {found} in {self.name}; "
                f'remove one, or write "auto" there'
            )
        self.values[flag] = int(found) if isinstance(self.values[flag], int) else found
        return self.values[flag]

    def settle_batch(self, document: Document, world_size: int) -> None:
        """Settle rows per device, micro-batches per step, and rows per step of the whole job."""
        micro, total = document.get("train_micro_batch_size_per_gpu"), document.get("train_batch_size")
        accumulation = self.settle(
            "gradient_accumulation_steps", "gradient_accumulation_steps", document.get("gradient_accumulation_steps")
        )
        if total not in (None, "auto"):
            per_rank, rest = divmod(total, accumulation * world_size)
            if rest or not per_rank:
                raise UserError(
                    f"train_batch_size {total} in {self.name} cannot be divided among {world_size} ranks "
                    f"with {accumulation} micro-batches each"
                )
            if micro in (None, "auto") and self.values["batch_size"] == total and world_size > 1:
                # Upstream's scripts for several GPUs pass the batch of the whole job as --batch_size, and
                # DeepSpeed follows the JSON: so do we, and say it.
                self.notes.append(
                    f"--batch_size {total} equals train_batch_size in {self.name}: read as the batch of "
                    f"the whole job, {per_rank} per device on {world_size} ranks"
                )
                self.values["batch_size"] = per_rank
            elif micro not in (None, "auto") and micro != per_rank:
                raise UserError(
                    f"train_batch_size {total} and train_micro_batch_size_per_gpu {micro} in {self.name} "
                    f"do not go with {world_size} ranks and {accumulation} micro-batches each"
                )
            else:
                key = f"train_batch_size {total} ({world_size} ranks, {accumulation} micro-batches): per device"
                self.settle("batch_size", key, per_rank)
                return
        self.settle("batch_size", "train_micro_batch_size_per_gpu", micro)


def merge(document: Document, config: Config, world_size: int) -> Merged:
    """Bring the JSON and the flags together for `world_size` ranks; pure.

    Raises `UserError` where they contradict each other.
    """
    merged = copy.deepcopy(document)
    table = _Settlement(config, config.offload.deepspeed_config)
    optimizer = merged.pop("optimizer", {}).get("params", {})
    schedule = merged.pop("scheduler", {})
    zero = merged["zero_optimization"]
    offload = zero["offload_optimizer"]

    table.settle_batch(merged, world_size)
    table.settle("lr", "optimizer.params.lr", optimizer.get("lr"))
    table.settle("lr", "scheduler.params.warmup_max_lr", schedule.get("params", {}).get("warmup_max_lr"))
    table.settle("weight_decay", "optimizer.params.weight_decay", optimizer.get("weight_decay"))
    table.settle("lr_scheduler", "scheduler.type", SCHEDULES.get(schedule.get("type", "")))

    merged["gradient_clipping"] = table.settle("max_grad_norm", "gradient_clipping", merged.get("gradient_clipping"))
    sub_group = table.settle("sub_group_size", "zero_optimization.sub_group_size", zero.get("sub_group_size"))
    zero["sub_group_size"] = sub_group
    if zero.get("reduce_bucket_size") in (None, "auto"):
        zero["reduce_bucket_size"] = sub_group
    offload["ratio"] = table.settle("offload_ratio", "offload_optimizer.ratio", offload.get("ratio"))

    final = settings.build(table.values, config.explicit)
    training = final.training
    merged["train_micro_batch_size_per_gpu"] = training.batch_size
    merged["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    merged["train_batch_size"] = training.batch_size * training.gradient_accumulation_steps * world_size
    for kind in ("bf16", "fp16"):
        if kind in merged:
            merged[kind]["enabled"] = _enabled(merged, kind)
    return Merged(document=_without_auto(merged), config=final, notes=tuple(table.notes))


def _without_auto(value: Any) -> Any:
    """Drop what is left of "auto": DeepSpeed's own default holds there."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def dtype_name(document: Document) -> str:
    """Name the dtype in which the weights are held: `bfloat16`, `float16` or `float32`."""
    return "bfloat16" if _enabled(document, "bf16") else "float16" if _enabled(document, "fp16") else "float32"
