"""Compile the operators, as a program, so that no test with a time limit has to: a minute or two, then cached."""

import logging

from deepspeed.accelerator import get_accelerator

from superoffload.offload import operators
from superoffload.offload.worker import fused

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what is compiled, and what is waited for
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"  # there the ranks communicate by an operator
    for builder in ("CPUAdamBuilder", *(("ShareMemCommBuilder",) if on_cpu else ())):
        operator = accelerator.create_op_builder(builder)
        with operators.compiled(operator.name):
            operator.load(verbose=False)
    fused.build()
