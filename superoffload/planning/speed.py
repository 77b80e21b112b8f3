"""Shape and job -> about how long a step takes, and in which mode. Pure arithmetic, an estimate; imports no torch.

What overlaps what is the design of each mode, see `superoffload/offload/__init__.py`. Two things that overlap take as
long as the longer of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from superoffload.model.flops import hardware_flops, model_flops
from superoffload.planning.budget.activations import layer_input_bytes, tiles
from superoffload.planning.budget.device import on_device, sub_groups
from superoffload.planning.budget.job import Job
from superoffload.planning.budget.shape import Shape
from superoffload.planning.machine import Rates

# Dense bf16 FLOP/s and the usual link to the host, by a part of the device's name; the first match counts. From
# NVIDIA's data sheets, without sparsity.
DEVICES: tuple[tuple[str, float, str], ...] = (
    ("GB300", 2.5e15, "c2c"),
    ("GB200", 2.5e15, "c2c"),
    ("B200", 2.25e15, "pcie5"),
    ("GH200", 989e12, "c2c"),
    ("H100 PCIe", 756e12, "pcie5"),
    ("H100 NVL", 835e12, "pcie5"),
    ("H20 ", 148e12, "pcie5"),
    ("H100", 989e12, "pcie5"),
    ("H200", 989e12, "pcie5"),
    ("A100", 312e12, "pcie4"),
    ("L40S", 362e12, "pcie4"),
    ("RTX 5090", 209e12, "pcie5"),
    ("RTX 4090", 165e12, "pcie4"),
    ("RTX 3090", 71e12, "pcie4"),
)
ASSUMED_DEVICE = "H100"
# Upstream reports 500 to 600 TFLOPS on a GH200, with recomputation counted, of 989.
SHARE_OF_PEAK = 0.5
SHARE_OF_PRODUCT = 0.63  # the same, of the rate of one large matrix product, which is about 790 TFLOP/s there


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A kind of link between device and host, and the memory of the hosts that have it; bytes/s.

    rate: of one device in one direction. host_memory: of one machine, or of one device if each has a host of its own.
    """

    text: str
    rate: float
    host_memory: float
    host_per_device: bool = False


# PCIe: 80 % of the rate of 16 lanes. C2C: 330 GB/s measured on a GB200 (torchtitan #3519) of 450.
# Host memory of two sockets: a quarter of the data sheets' rates, of 8 channels of DDR4-3200 or DDR5-4800 each, 410 and
# 614 GB/s. Published figures leave no more for Adam: 141, 324 and 420 TFLOPS at 8, 32 and 128 thousand tokens, of Llama
# 8B with ZeRO-3 and Adam on the host of 8 H200 (stas00/ml-engineering), mean computing at 440 to 455 TFLOP/s and 2.5 to
# 2.75 s more a step. Of one Grace: 60 % of its LPDDR5X, because upstream's figures for a GH200 need as much.
LINKS = {
    "pcie4": Link(text="PCIe 4", rate=25e9, host_memory=100e9),
    "pcie5": Link(text="PCIe 5", rate=50e9, host_memory=150e9),
    "c2c": Link(text="NVLink-C2C", rate=330e9, host_memory=300e9, host_per_device=True),
}
NODE_GATHER, NETWORK_GATHER = 200e9, 25e9  # bytes/s into one device: NVLink within a machine, 400 Gbit/s between them


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates of a machine; bytes/s and FLOP/s.

    device: its short name. assumed: what it is was not known. flops: what training reaches on one device. down, up:
    from and to one device. host_memory: reads and writes of Adam, all cores of one machine together, or of one device
    if each has a host of its own. measured: names of the rates that were measured, of `flops`, `copies` and `adam`.
    """

    device: str
    assumed: bool = False
    link: str
    flops: float
    down: float
    up: float
    host_memory: float
    host_per_device: bool = False
    measured: tuple[str, ...] = ()

    def machine_memory(self, devices: int) -> float:
        """Return the rate of the memory of one machine with so many devices."""
        return self.host_memory * (devices if self.host_per_device else 1)


def known(name: str) -> tuple[str, float, str] | None:
    """Return what is known of a device by its name: a short name, its peak, and its usual link."""
    return next((entry for entry in DEVICES if entry[0] in f"{name} "), None)


def hardware(device: str | None, link: str | None, devices: int, rates: Rates | None) -> Hardware:
    """Choose the rates of a machine: measured ones first, else those of the tables.

    `device` is its name, if it is known, and `devices` their number on a machine. `rates` were measured on this very
    machine; a given `link` means another.
    """
    name, peak, usual = known(device or "") or known(ASSUMED_DEVICE) or DEVICES[0]
    kind = LINKS[link or usual]
    product = rates.device_bf16_flops_per_s if rates else None
    down, up = (rates.from_device_bytes_per_s, rates.to_device_bytes_per_s) if rates and not link else (None, None)
    adam = rates.adam_parameters_per_s if rates and not link else None
    hosts = devices if kind.host_per_device else 1
    return Hardware(
        device=name,
        assumed=known(device or "") is None,
        link=link or usual,
        flops=product * SHARE_OF_PRODUCT if product else peak * SHARE_OF_PEAK,
        down=down or kind.rate,
        up=up or kind.rate,
        host_memory=adam * adam_bytes(4)[0] / hosts if adam else kind.host_memory,
        host_per_device=kind.host_per_device,
        measured=tuple(name for name, found in (("flops", product), ("copies", down and up), ("adam", adam)) if found),
    )


def adam_bytes(width: int) -> tuple[int, int, int]:
    """Return the bytes of host memory that Adam reads and writes per parameter: in place, to speculate, to convert.

    In place (DeepSpeed's csrc/adam/cpu_adam_impl.cpp) it reads master, gradient and two moments and writes all but the
    gradient. A speculation (offload/worker/fused.cpp) reads the same and writes bf16 weights alone. ZeRO-Offload
    converts the masters to bf16 in a pass of its own. `width`: bytes of a master, gradient or moment.
    """
    return 7 * width, 4 * width + 2, width + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The parts of an optimizer step, in seconds, each as if it ran alone; and the step, with what overlaps.

    compute: all micro-batches. gathers: weights and gradients between ranks. gradients, weights: copies down and up.
    adam: all of the host's work on the optimizer's state. exposed: what the step takes beyond computing.
    """

    compute_s: float
    gathers_s: float
    gradients_s: float
    weights_s: float
    adam_s: float
    step_s: float
    tokens: int

    @property
    def exposed_s(self) -> float:
        """Return what the step takes beyond computing."""
        return self.step_s - self.compute_s

    @property
    def tokens_per_s(self) -> float:
        """Return the tokens of all ranks per second."""
        return self.tokens / self.step_s


def host_elements(shape: Shape, job: Job) -> int:
    """Return the elements that one rank's host steps: the sub-groups that are not on the device."""
    return sum(sub_groups(shape, job)) - sum(on_device(shape, job))


def _host_sub_groups(shape: Shape, job: Job) -> int:
    return len(sub_groups(shape, job)) - len(on_device(shape, job))


def step_time(shape: Shape, job: Job, machine: Hardware) -> StepTime:
    """Estimate one optimizer step of one rank, with full rows."""
    once = job.batch / job.parts * model_flops(shape.flops, [job.length])
    again = 6.0 * shape.hidden * shape.intermediate * shape.layers * job.tokens if tiles(shape, job) else 0.0
    micro = hardware_flops(once, job.recompute, again) / machine.flops
    forward = once / 3 / machine.flops
    backward = micro - forward
    gather = _gather_s(shape, job)  # in forward, again in backward, and once more to reduce the gradients
    stream = 2 * shape.parameters / job.ranks / machine.up if job.offload_params else 0.0
    inputs = layer_input_bytes(shape) * shape.layers * job.tokens if job.offload_activations else 0
    forward, backward = (
        max(forward, gather, stream, inputs / machine.down),
        max(backward, gather, stream, inputs / machine.up) + gather,
    )

    number = host_elements(shape, job)
    memory = machine.machine_memory(job.ranks_per_node) / job.ranks_per_node
    in_place, speculate, convert = (number * size / memory for size in adam_bytes(2 if job.bf16_state else 4))
    weights = 2 * number / machine.up
    copies = _gradient_copies_s(job, number, machine)
    if job.mode == "superoffload":
        # Copies and speculation run during the last backward; uploads and commits until the next one.
        first = max(forward, weights, in_place - (job.accumulation - 1) * (forward + backward))
        others = sum(max(backward, copy) for copy in copies[:-1]) + (job.accumulation - 1) * forward
        # The last sub-group's copy, speculation and upload have nothing left to run beside.
        tail = (copies[-1] + speculate + weights) / max(1, _host_sub_groups(shape, job))
        step = first + others + max(backward, copies[-1], speculate) + tail
        adam = speculate + in_place
    else:
        step = job.accumulation * (forward + backward) + sum(copies) + in_place + convert + weights
        adam = in_place + convert
    return StepTime(
        compute_s=micro * job.accumulation,
        gathers_s=3 * gather * job.accumulation,
        gradients_s=sum(copies),
        weights_s=weights,
        adam_s=adam,
        step_s=step,
        tokens=job.tokens * job.accumulation * job.ranks,
    )


def _gather_s(shape: Shape, job: Job) -> float:
    """Return the time of one gather of all weights: each rank receives what the others have."""
    rate = NODE_GATHER if job.ranks == job.ranks_per_node else NETWORK_GATHER
    return 2 * shape.parameters * (job.ranks - 1) / job.ranks / rate


def _gradient_copies_s(job: Job, number: int, machine: Hardware) -> Sequence[float]:
    """Return the time of the copies of gradients in each micro-batch of a step.

    SuperOffload with one micro-batch copies them once, in the precision of the masters. Otherwise they pass through
    DeepSpeed's accumulation buffer in bf16 (stage3.partition_grads): down, and up again for the sum and the norm; at
    last down in the precision of the masters.
    """
    final = (2 if job.bf16_state else 4) * number / machine.down
    if job.mode == "superoffload" and job.accumulation == 1:
        return (final,)
    buffer = 2 * number / machine.down + 2 * number / machine.up
    return [buffer] * (job.accumulation - 1) + [buffer + final]


def in_mode(shape: Shape, job: Job, machine: Hardware, mode: str) -> StepTime:
    """Estimate a step in another mode."""
    return step_time(shape, replace(job, mode=mode), machine)
