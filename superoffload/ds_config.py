"""DeepSpeed's JSON and the flags -> the ds_config that `deepspeed.initialize` gets.

The JSON says where weights and optimizer state are kept, the flags say what is trained. Some values can be set by both.
If the JSON has `"auto"` or no value, the flag decides. If the flag was not given, the JSON decides. If both are
explicit and differ, that is an error that names both.
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from superoffload import config as settings
from superoffload.config import Config
from superoffload.errors import UserError
from superoffload.setting import AUTO, accepts, allowed

REPOSITORY = Path(__file__).resolve().parent.parent
SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
DEEPSPEED_SUB_GROUP_SIZE = 1_000_000_000
BF16_STATE_KEYS = ("bf16_master_weights_and_grads", "bf16_optimizer_states")

DsConfig = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The result of merging the JSON and the flags.

    `ds_config` is what `deepspeed.initialize` gets, without any `"auto"`; `config` holds the resolved settings;
    `notes` are lines to log once logging is set up.
    """

    ds_config: DsConfig
    config: Config
    notes: tuple[str, ...] = ()


def read_ds_config(config: Config) -> DsConfig:
    """Read the file of `--deepspeed_config` and check that it is ZeRO-3 with the optimizer off the device.

    The default path is relative to `finetune_zero3.py`, so that it works from any directory; a path from the command
    line is relative to the working directory. Raises `UserError`.
    """
    name = config.offload.deepspeed_config
    path = Path(name) if "deepspeed_config" in config.explicit else REPOSITORY / name
    try:
        ds_config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--deepspeed_config {name}: cannot be read ({error.strerror}); "
            "configs/ has superoffload.json and zerooffload.json"
        ) from error
    except ValueError as error:
        raise UserError(f"--deepspeed_config {name}: not JSON ({error})") from error
    from superoffload import ds_schema  # pydantic takes time to import, which --help need not wait for

    ds_schema.check(ds_config, name)
    if all(_enabled(ds_config, kind) for kind in ("bf16", "fp16")):
        raise UserError(f"--deepspeed_config {name}: bf16 and fp16 are both enabled; enable only one")
    return dict(ds_config)


def _enabled(ds_config: DsConfig, kind: str) -> bool:
    return ds_config.get(kind, {}).get("enabled") is True or (
        kind == "bf16" and ds_config.get(kind, {}).get("enabled") == "auto"
    )


class _FlagResolver:
    """Resolves, one by one, the values that both the JSON and a flag can set."""

    def __init__(self, config: Config, name: str) -> None:
        self.values = settings.flat(config)
        self.explicit = config.explicit
        self.name = name
        self.notes: list[str] = []

    def resolve(self, flag: str, key: str, found: Any) -> Any:
        """Return the resolved value of `flag`; `found` is the JSON's value of `key`, None if it has none."""
        if found in (None, "auto"):
            return self.values[flag]
        spec = settings.SPECS[flag]
        if not accepts(spec, found):
            raise UserError(f"--deepspeed_config {self.name}: {key} is {found}, must be {allowed(spec)}")
        if found != self.values[flag] and flag in self.explicit:
            raise UserError(
                f"--{flag} {self.values[flag]} contradicts {key} {found} in {self.name}; "
                f'remove one, or set it to "auto" there'
            )
        kind: Any = type(spec.default)
        self.values[flag] = kind(found)
        return self.values[flag]

    def resolve_batch(self, ds_config: DsConfig, world_size: int) -> None:
        """Resolve rows per device, micro-batches per step, and rows per step of the whole job."""
        micro, total = ds_config.get("train_micro_batch_size_per_gpu"), ds_config.get("train_batch_size")
        accumulation = self.resolve(
            "gradient_accumulation_steps", "gradient_accumulation_steps", ds_config.get("gradient_accumulation_steps")
        )
        if total not in (None, "auto"):
            per_rank, rest = divmod(total, accumulation * world_size)
            if rest or not per_rank:
                raise UserError(
                    f"train_batch_size {total} in {self.name} cannot be divided among {world_size} ranks "
                    f"with {accumulation} micro-batches each"
                )
            if micro in (None, "auto") and self.values["batch_size"] == total and world_size > 1:
                # Upstream's scripts for several GPUs pass the batch of the whole job as --batch_size, and DeepSpeed
                # follows the JSON. We do the same and log it.
                self.notes.append(
                    f"--batch_size {total} equals train_batch_size in {self.name}: used as the batch of "
                    f"the whole job, {per_rank} per device on {world_size} ranks"
                )
                self.values["batch_size"] = per_rank
            elif micro not in (None, "auto") and micro != per_rank:
                raise UserError(
                    f"train_batch_size {total} and train_micro_batch_size_per_gpu {micro} in {self.name} "
                    f"do not match {world_size} ranks with {accumulation} micro-batches each"
                )
            else:
                key = f"train_batch_size {total} ({world_size} ranks, {accumulation} micro-batches): per device"
                self.resolve("batch_size", key, per_rank)
                return
        self.resolve("batch_size", "train_micro_batch_size_per_gpu", micro)


def merge_flags(ds_config: DsConfig, config: Config, world_size: int) -> Merged:
    """Merge the JSON and the flags for `world_size` ranks; pure.

    Raises `UserError` if they contradict each other.
    """
    merged = copy.deepcopy(ds_config)
    flags = _FlagResolver(config, config.offload.deepspeed_config)
    optimizer = merged.pop("optimizer", {}).get("params", {})
    schedule = merged.pop("scheduler", {})
    zero = merged["zero_optimization"]
    offload = zero["offload_optimizer"]

    flags.resolve_batch(merged, _groups_of_ranks(config.training.sequence_parallel_size, world_size))
    _resolve_optimizer(flags, optimizer, schedule.get("params", {}))
    flags.resolve("lr_scheduler", "scheduler.type", SCHEDULES.get(schedule.get("type", "")))

    merged["gradient_clipping"] = flags.resolve("max_grad_norm", "gradient_clipping", merged.get("gradient_clipping"))
    zero["sub_group_size"] = sub_group = _resolve_sub_group_size(flags, zero.get("sub_group_size"))
    if zero.get("reduce_bucket_size") in (None, "auto"):
        zero["reduce_bucket_size"] = sub_group
    ratio = flags.resolve("offload_ratio", "offload_optimizer.ratio", offload.get("ratio"))
    offload["ratio"] = 1.0 if ratio == AUTO else ratio  # until `with_offload_ratio` sets it
    _resolve_optimizer_state(flags, merged)
    _resolve_offload_params(flags, zero)

    final = settings.build(flags.values, config.explicit)
    training = final.training
    merged["train_micro_batch_size_per_gpu"] = training.batch_size
    merged["gradient_accumulation_steps"] = training.gradient_accumulation_steps
    merged["train_batch_size"] = training.batch_size * training.gradient_accumulation_steps * world_size
    # DeepSpeed's own measurement of throughput waits for the whole device twice in every step.
    merged.setdefault("timers", {"throughput": {"enabled": False}})
    for kind in ("bf16", "fp16"):
        if kind in merged:
            merged[kind]["enabled"] = _enabled(merged, kind)
    return Merged(ds_config=_without_auto(merged), config=final, notes=tuple(flags.notes))


def _groups_of_ranks(size: int, world_size: int) -> int:
    """Return how many groups of ranks have rows of their own; each group shares its rows."""
    groups, rest = divmod(world_size, size)
    if rest:
        raise UserError(f"--sequence_parallel_size {size}: {world_size} ranks cannot be divided into groups of {size}")
    return groups


def with_offload_ratio(merged: Merged, ratio: float) -> Merged:
    """Return the merged settings with another `--offload_ratio`, in the ds_config too."""
    ds_config = copy.deepcopy(merged.ds_config)
    ds_config["zero_optimization"]["offload_optimizer"]["ratio"] = ratio
    config = merged.config
    return replace(
        merged, ds_config=ds_config, config=replace(config, offload=replace(config.offload, offload_ratio=ratio))
    )


def _resolve_optimizer(flags: _FlagResolver, optimizer: DsConfig, schedule: DsConfig) -> None:
    """Resolve what Adam takes, from the parameters of both sections."""
    lr, peak = (values.get(key, "auto") for values, key in ((optimizer, "lr"), (schedule, "warmup_max_lr")))
    if "auto" not in (lr, peak) and lr != peak:
        raise UserError(
            f"--deepspeed_config {flags.name}: optimizer.params.lr is {lr}, but scheduler.params.warmup_max_lr {peak}; "
            'remove one, or set it to "auto"'
        )
    flags.resolve("lr", "optimizer.params.lr", lr)
    flags.resolve("lr", "scheduler.params.warmup_max_lr", peak)
    flags.resolve("weight_decay", "optimizer.params.weight_decay", optimizer.get("weight_decay"))
    flags.resolve("adam_epsilon", "optimizer.params.eps", optimizer.get("eps"))
    betas = optimizer.get("betas", "auto")
    for index, beta in enumerate([] if betas == "auto" else betas):
        flags.resolve(f"adam_beta{index + 1}", f"optimizer.params.betas[{index}]", beta)


def _resolve_sub_group_size(flags: _FlagResolver, found: Any) -> int:
    """Resolve the size of a sub-group; 0, which some files have, means DeepSpeed's default."""
    if found == 0 and "sub_group_size" not in flags.explicit:
        flags.notes.append(
            f"zero_optimization.sub_group_size is 0 in {flags.name}: DeepSpeed's default of 1e9 is used instead"
        )
        flags.values["sub_group_size"] = DEEPSPEED_SUB_GROUP_SIZE
    return int(flags.resolve("sub_group_size", "zero_optimization.sub_group_size", found or None))


def _resolve_optimizer_state(flags: _FlagResolver, merged: DsConfig) -> None:
    """Resolve `--optimizer_state`, which DeepSpeed's JSON has as two switches, both off by default."""
    bf16 = merged.get("bf16", {})
    found = [bf16.get(key, "auto") for key in BF16_STATE_KEYS]
    if True in found and found != [True, True]:
        raise UserError(
            f"--deepspeed_config {flags.name}: bf16.{BF16_STATE_KEYS[0]} and bf16.{BF16_STATE_KEYS[1]} must be equal; "
            "remove both and use --optimizer_state"
        )
    known = "bf16" if True in found else "fp32" if False in found else None
    state = flags.resolve("optimizer_state", f"bf16.{BF16_STATE_KEYS[1]}, which means", known)
    if state == "bf16" and not _enabled(merged, "bf16"):
        raise UserError(f"--optimizer_state bf16: needs weights in bf16; enable bf16 in {flags.name}")
    if state == "bf16":
        bf16.update(dict.fromkeys(BF16_STATE_KEYS, True))
        flags.notes.append(
            f"--optimizer_state bf16: updates below 1/512 of their weight are lost, at --lr {flags.values['lr']:g} "
            "perhaps most of them; compare the loss with that of fp32 (docs/memory.md)"
        )


def _resolve_offload_params(flags: _FlagResolver, zero: DsConfig) -> None:
    """Resolve `--offload_params`; the JSON may also move the weights elsewhere, to NVMe."""
    offload = zero.get("offload_param") or {}
    device = offload.get("device", "auto")
    found = None if device == "auto" else device != "none"
    if flags.resolve("offload_params", f"offload_param.device {device}, which means", found) and not found:
        pin = offload.get("pin_memory", zero["offload_optimizer"].get("pin_memory", False))
        zero["offload_param"] = {**offload, "device": "cpu", "pin_memory": pin}


def has_bf16_state(ds_config: DsConfig) -> bool:
    """Return whether master weights, gradients and moments are in bf16."""
    return bool(ds_config.get("bf16", {}).get(BF16_STATE_KEYS[1], False))


def _without_auto(value: Any) -> Any:
    """Drop every remaining "auto", so that DeepSpeed uses its own default."""
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def dtype_name(ds_config: DsConfig) -> str:
    """Return the name of the weights' dtype: `bfloat16`, `float16` or `float32`."""
    return "bfloat16" if _enabled(ds_config, "bf16") else "float16" if _enabled(ds_config, "fp16") else "float32"
