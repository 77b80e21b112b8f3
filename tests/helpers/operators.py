"""Compile the operators, as a program, so that no test with a time limit has to: a minute or two, then cached."""

from deepspeed.accelerator import get_accelerator

from superoffload import ops
from superoffload.offload.worker import fused

if __name__ == "__main__":
    ops.prepare()
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"  # there the ranks communicate by an operator
    for builder in ("CPUAdamBuilder", *(("ShareMemCommBuilder",) if on_cpu else ())):
        accelerator.create_op_builder(builder).load(verbose=False)
    fused.build()
