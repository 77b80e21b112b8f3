"""What tests of training and evaluation share."""

from superoffload.ds_config import DsConfig

# ZeRO-3 with the optimizer on the host and weights in fp32, so that results can be compared closely.
FP32: DsConfig = {
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}
