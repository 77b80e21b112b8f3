"""The form of DeepSpeed's JSON: types and values that a run can use, checked before anything else.

Sections and keys that this program passes on are left to DeepSpeed. The optimizer's and the schedule's are closed,
because this program builds both itself: a key that it would not follow is an error, not ignored.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError

from superoffload.errors import UserError

AUTO = "auto"


def check(ds_config: Any, name: str) -> None:
    """Raise `UserError` that names the file and the first key that a run cannot use."""
    try:
        _File.model_validate(ds_config)
    except ValidationError as error:
        raise UserError(f"--deepspeed_config {name}: {_line(error.errors()[0])}") from error


def _line(error: Any) -> str:
    """Word one of pydantic's errors."""
    key = ".".join(map(str, error["loc"]))
    found = json.dumps(error["input"], default=str)
    if error["type"] == "missing":
        return f"{key} is missing"
    if error["type"] == "extra_forbidden":
        return f"{key} is not followed by this program; remove it"
    if error["type"] == "literal_error":
        return f"{key} is {found}, must be {error['ctx']['expected']}"
    if error["type"] == "value_error":
        return f"{key} is {found}, {error['ctx']['error']}"
    return f"{key or 'the file'} is {found}, must be an object in braces"


def _whole(value: Any) -> Any:
    if value != AUTO and (isinstance(value, (bool, str)) or not isinstance(value, (int, float)) or value % 1):
        raise ValueError('must be a whole number or "auto"')
    return value


def _number(value: Any) -> Any:
    if value != AUTO and (isinstance(value, (bool, str)) or not isinstance(value, (int, float))):
        raise ValueError('must be a number or "auto"')
    return value


def _switch(value: Any) -> Any:
    if value != AUTO and not isinstance(value, bool):
        raise ValueError('must be true, false or "auto"')
    return value


def _pair(value: Any) -> Any:
    if value != AUTO and not (isinstance(value, list) and len(value) == 2 and all(_number(v) != AUTO for v in value)):
        raise ValueError('must be two numbers in brackets or "auto"')
    return value


def _steps(value: Any) -> Any:
    if value != AUTO:
        raise ValueError('must be "auto"; use --warmup, a fraction of the steps, and --max_steps or --num_train_epochs')
    return value


Whole = Annotated[Any, PlainValidator(_whole)]
Number = Annotated[Any, PlainValidator(_number)]
Switch = Annotated[Any, PlainValidator(_switch)]
Pair = Annotated[Any, PlainValidator(_pair)]
Steps = Annotated[Any, PlainValidator(_steps)]
Section = dict[str, Any]


class _Open(BaseModel):
    """A section whose other keys DeepSpeed checks."""

    model_config = ConfigDict(extra="allow")


class _Closed(BaseModel):
    """A section that this program reads instead of DeepSpeed."""

    model_config = ConfigDict(extra="forbid")


class _Precision(_Open):
    enabled: Switch = False
    bf16_master_weights_and_grads: Switch = AUTO
    bf16_optimizer_states: Switch = AUTO


class _AdamParams(_Closed):
    lr: Number = AUTO
    weight_decay: Number = AUTO
    betas: Pair = AUTO
    eps: Number = AUTO
    adam_w_mode: Literal[True, "auto"] = True
    bias_correction: Literal[True, "auto"] = True
    torch_adam: Literal[False, "auto"] = False
    amsgrad: Literal[False, "auto"] = False


class _Optimizer(_Closed):
    type: Literal["AdamW", "Adam"] = "AdamW"
    params: _AdamParams = _AdamParams()


class _ScheduleParams(_Closed):
    warmup_min_lr: Literal[0, "auto"] = 0
    warmup_max_lr: Number = AUTO
    warmup_num_steps: Steps = AUTO
    total_num_steps: Steps = AUTO
    warmup_type: Literal["linear", "auto"] = "linear"
    last_batch_iteration: Literal[-1, "auto"] = -1


class _Schedule(_Closed):
    type: Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"] = "WarmupLR"
    params: _ScheduleParams = _ScheduleParams()


class _OffloadOptimizer(_Open):
    device: Literal["cpu", "nvme"]
    ratio: Number = AUTO
    pin_memory: Switch = AUTO
    super_offload: Switch = False


class _OffloadParam(_Open):
    device: Literal["none", "cpu", "nvme", "auto"] = "none"
    pin_memory: Switch = AUTO


class _Zero(_Open):
    stage: Literal[3]
    offload_optimizer: _OffloadOptimizer
    offload_param: _OffloadParam | None = None
    sub_group_size: Whole = AUTO
    reduce_bucket_size: Whole = AUTO


class _File(_Open):
    zero_optimization: _Zero
    bf16: _Precision = _Precision()
    fp16: _Precision = _Precision()
    optimizer: _Optimizer = _Optimizer()
    scheduler: _Schedule = _Schedule()
    # What DeepSpeed reads without looking at its type.
    activation_checkpointing: Section = {}
    aio: Section = {}
    amp: Section = {}
    checkpoint: Section = {}
    comms_logger: Section = {}
    compile: Section = {}
    compression_training: Section = {}
    csv_monitor: Section = {}
    data_efficiency: Section = {}
    data_types: Section = {}
    elasticity: Section = {}
    flops_profiler: Section = {}
    tensorboard: Section = {}
    timers: Section = {}
    torch_autocast: Section = {}
    wandb: Section = {}
    prescale_gradients: Switch = AUTO
    wall_clock_breakdown: Switch = AUTO
    steps_per_print: Whole = AUTO
    train_batch_size: Whole = AUTO
    train_micro_batch_size_per_gpu: Whole = AUTO
    gradient_accumulation_steps: Whole = AUTO
    gradient_clipping: Number = AUTO
