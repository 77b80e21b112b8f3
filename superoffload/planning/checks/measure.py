"""The measurements of `superoffload doctor`, each run as a program by child.py: `python -m ... PART`.

Results are lines of JSON on standard output, with a prefix, because libraries write there too.
"""

import importlib
import json
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from superoffload.errors import FAILURES, first_line
from superoffload.offload import operators
from superoffload.offload.worker import fused
from superoffload.planning.checks import link as device_link
from superoffload.planning.checks.child import PREFIX
from superoffload.planning.machine import look

ADAM_NUMEL = 1 << 26
"""Parameters; 1 GiB of state, more than the caches of any processor."""
LINK_NUMEL = 1 << 27
MATRIX = 8192
ROUNDS = 7


def report(**values: Any) -> None:
    """Write one result."""
    sys.stdout.write(f"{PREFIX}{json.dumps(values)}\n")
    sys.stdout.flush()


def compile_operators() -> None:
    """Compile and load each operator that a run needs; report when each starts, and its error or its path."""
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"  # there the ranks communicate by an operator
    for builder in ("CPUAdamBuilder", *(("ShareMemCommBuilder",) if on_cpu else ())):
        operator = accelerator.create_op_builder(builder)
        _attempt(operator.name, operator.load)
    _attempt(operators.FUSED, fused.load)


def _attempt(name: str, load: Callable[..., Any]) -> None:
    report(started=name)
    try:
        with operators.compiled(name):
            load(verbose=False)
    except FAILURES as error:  # of the compiler, the linker or the loader
        sys.stderr.write(f"{error}\n")  # for a person who runs this by hand
        report(operator=name, error=str(error) or type(error).__name__)
    else:
        report(operator=name, error=None)


def adam() -> None:
    """Time a step of DeepSpeed's compiled Adam, and a copy in host memory with the same threads."""
    operator = get_accelerator().create_op_builder("CPUAdamBuilder")
    with operators.compiled(operator.name):
        op = operator.load(verbose=False)
    machine = look(devices=())
    torch.set_num_threads(machine.cores)
    numel = min(ADAM_NUMEL, machine.host_available_bytes // 64 // 1024 * 1024)
    parameters, gradients, exp_avg, exp_avg_sq = (torch.full((numel,), 1e-3) for _ in range(4))
    op.create_adam(0, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)
    steps = iter(range(1, 1000))

    def step() -> None:
        op.adam_update(
            0, next(steps), 1e-3, 0.9, 0.999, 1e-8, 0.0, True, parameters, gradients, exp_avg, exp_avg_sq
        )  # fmt: skip

    step_s, copy_s = _shortest_s(step, lambda: gradients.copy_(parameters))
    report(adam_parameters_per_s=numel / step_s, host_copy_bytes_per_s=parameters.nbytes / copy_s)


def _shortest_s(*works: Callable[[], Any], device: str = "cpu") -> list[float]:
    """Return the shortest time of each work in seconds; they take turns, and other processes only lengthen times."""
    rounds = [[device_link.time_s(work, device) for work in works] for _ in range(ROUNDS)]
    return [min(times) for times in zip(*rounds, strict=True)]


def link() -> None:
    """Measure the link between host and device, and a large bf16 matrix product."""
    free_bytes, _ = torch.cuda.mem_get_info()
    host_bytes = look(devices=()).host_available_bytes
    device_rates("cuda", numel=min(LINK_NUMEL, free_bytes // 16, host_bytes // 64), side=MATRIX)


def device_rates(device: str, *, numel: int, side: int) -> None:
    """Report the rates of copies of `numel` elements and of a product of square matrices; "cpu" rehearses both."""
    rates, locked = device_link.measure(numel, ROUNDS, device)
    report(rates=rates, locked=locked)
    left = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    (elapsed_s,) = _shortest_s(lambda: left @ left, device=device)
    report(device_bf16_flops_per_s=2 * side**3 / elapsed_s)


def attention() -> None:
    """Load flash-attn, and try torch's kernel for packs."""
    try:
        importlib.import_module("flash_attn")
    except FAILURES as error:  # of its library, not only of its absence
        report(flash=first_line(error))
    from superoffload.model import attention as kernels  # imports transformers, which the other parts do not need

    report(varlen=kernels.problem_of_varlen(128, torch.bfloat16))


PARTS: Mapping[str, Callable[[], None]] = {
    "operators": compile_operators,
    "adam": adam,
    "link": link,
    "attention": attention,
}

if __name__ == "__main__":
    # As with Ctrl-C, torch then removes the lock of a build, for which the next process would wait.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    PARTS[sys.argv[1]]()
