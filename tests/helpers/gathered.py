"""Measure how many parameters DeepSpeed keeps gathered while a small model trains."""

from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from superoffload.model import recomputation
from superoffload.model.parameter_groups import parameter_groups
from tests.helpers.models import make_model

STEPS = 4  # the order of modules is recorded in the first two; only then parameters are fetched ahead


def measure(kind: str, changes: dict[str, Any], zero: dict[str, Any], recompute: bool) -> int:
    """Return the most elements that were gathered, or about to be, at a time on this rank (collective).

    `changes` are those of the model's configuration, `zero` those of DeepSpeed's section zero_optimization.
    """
    model = make_model(kind, **changes)
    model.train()
    if recompute:
        recomputation.enable(model, "full")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu"},
            **zero,
        },
    }
    optimizer = DeepSpeedCPUAdam(parameter_groups(model, 0.0))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    parameters = list(model.parameters())
    most = 0
    before = PartitionedParameterCoordinator.fetch_sub_module

    def fetch(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal most
        result = before(self, *arguments, **options)
        most = max(most, sum(p.ds_numel for p in parameters if p.ds_status != ZeroParamStatus.NOT_AVAILABLE))
        return result

    PartitionedParameterCoordinator.fetch_sub_module = fetch
    try:
        for _ in range(STEPS):
            ids = torch.arange(16)[None]
            engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
            engine.step()
    finally:
        PartitionedParameterCoordinator.fetch_sub_module = before
    return most
