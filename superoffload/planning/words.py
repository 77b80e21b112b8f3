"""A plan in words: lines of at most 80 columns. Imports no torch."""

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest

from superoffload.planning.budget.host import memlock_bytes, shm_bytes
from superoffload.planning.budget.memory import Budget, budget, deepspeed_estimate
from superoffload.planning.machine import Machine
from superoffload.planning.plan import Plan
from superoffload.planning.remedies import Capacity, Remedy
from superoffload.planning.speed import LINKS, SHARE_OF_PEAK, SHARE_OF_PRODUCT, step_time

GIB = 2**30
COLUMNS = 80
FLAGS_COLUMNS = 44  # of them, for the flags of a change
PLACES = {"device": "on the device", "host": "in host memory", "disk": "on the disk"}
MOST_REMEDIES = 8
CLOSE = 0.05  # of the capacity; the arithmetic is not more exact than that


def gib(size: float) -> str:
    """Write bytes in GiB, with one digit after the point."""
    return f"{size / GIB:.1f}"


def duration(seconds: float) -> str:
    """Write a time with two or three digits, in the unit that suits it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= size * 1.5 or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.{0 if seconds >= 100 * size else 1}f} {unit}"
    return f"{seconds * 1000:.0f} ms"


def count(number: float) -> str:
    """Write a large number with a unit: 8.03 billion, 1 million."""
    for unit, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def lines(plan: Plan, machine: Machine | None, packed: bool, epoch_tokens: float | None) -> list[str]:
    """Say everything about a plan. `machine` is this one, if its capacities count; `packed`: rows are packs."""
    paragraphs = (
        _title(plan, packed),
        _table(plan),
        [*_otherwise(plan), *_disk(plan), *_pinned(plan), *_deepspeed(plan)],
        _time(plan, epoch_tokens),
        [*_verdict(plan), *_limits(plan, machine)],
    )
    return [line for paragraph in paragraphs for line in (*paragraph, "")][:-1]


def _wrap(text: str, indent: int = 0) -> list[str]:
    """Break a sentence into lines; the second and later ones are indented."""
    return textwrap.wrap(text, COLUMNS, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _several(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _title(plan: Plan, packed: bool) -> list[str]:
    job = plan.job
    ranks = f"{_several(job.ranks, 'rank')} on {_several(job.ranks // job.ranks_per_node, 'machine')}"
    rows = f"{_several(job.batch, 'pack' if packed else 'row')} of {'' if packed else 'up to '}{job.length} tokens"
    whose = f"{job.parts} ranks that share them" if job.parts > 1 else "rank"
    more = f", {job.accumulation} micro-batches per step" if job.accumulation > 1 else ""
    return [
        *_wrap(f"{plan.shape.name}: {count(plan.shape.parameters)} parameters, {job.mode}, {ranks}", 2),
        *_wrap(f"{rows} per {whose} and micro-batch{more}; optimizer {job.ratio:.0%} on the host"),
    ]


def _table(plan: Plan) -> list[str]:
    """Set the parts of the device beside those of the host."""
    need, capacity = plan.budget, plan.capacity
    title = "In place of a device, GiB" if plan.job.on_cpu else "One device, GiB"
    device = [*_column(title, need.device), ("peak", gib(need.device_peak))]
    host = [*_column("One machine's host memory, GiB", need.host), ("between steps", gib(sum(need.host.values())))]
    host += [("", ""), *((f"peak, {phase}", gib(size)) for phase, size in need.host_peaks.items())]
    if not plan.job.on_cpu:
        device += [("capacity", "not known" if capacity.device is None else gib(capacity.device))]
    host += [("capacity", "not known" if capacity.host is None else gib(capacity.host))]
    rows = zip_longest(device, host, fillvalue=("", ""))
    return [f"{a:26}{b:>10}    {c:30}{d:>10}".rstrip() for (a, b), (c, d) in rows]


def _column(title: str, parts: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(title, ""), *((part, gib(size)) for part, size in parts.items() if size)]


def _otherwise(plan: Plan) -> Iterator[str]:
    """Say the peak of the device with the other loss and the other treatment of activations."""
    job = plan.job
    loss = "--loss_kernel plain" if job.chunked_loss else "--loss_kernel chunked"
    changes = {f"with {loss}": {"chunked_loss": not job.chunked_loss}}
    if not job.recompute:
        changes["with --activation_checkpointing"] = {"recompute": True}
    else:
        changes["without --activation_checkpointing"] = {"recompute": False, "offload_activations": False}
        other = "full" if job.offload_activations else "offload"
        changes[f"with --activation_checkpointing {other}"] = {"offload_activations": not job.offload_activations}
    peaks = {
        words: gib(budget(plan.shape, replace(job, **change)).device_peak)  # type: ignore[arg-type]
        for words, change in changes.items()
    }
    yield from _wrap("Peak of the device " + ", ".join(f"{words} {size}" for words, size in peaks.items()) + " GiB", 2)


def _disk(plan: Plan) -> Iterator[str]:
    need, free = plan.budget, plan.capacity.disk
    text = f"Disk: a checkpoint has {gib(need.checkpoint)} GiB"
    if need.disk:
        text += f"; the run needs {gib(need.disk)} GiB free, for {plan.job.kept + 1} at a time (--keep_checkpoints)"
    else:
        text += "; this run saves none (--save_checkpoint, --save_steps)"
    if free is not None:
        text += f"; {gib(free)} GiB are free"
    yield from _wrap(text, 2)


def _pinned(plan: Plan) -> Iterator[str]:
    """Say what the rounding of page-locked memory costs."""
    rounding = plan.budget.host["pinned"]
    if plan.job.pinned_rounding and rounding > CLOSE * sum(plan.budget.host.values()):
        yield from _wrap(
            f"Torch rounds page-locked memory up to powers of two, here by {gib(rounding)} GiB; set "
            "PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:64, as recipes do",
            2,
        )


def _deepspeed(plan: Plan) -> Iterator[str]:
    """Show DeepSpeed's estimator, and why it says something else."""
    theirs = deepspeed_estimate(plan.shape, plan.job)
    yield from _wrap(
        f"DeepSpeed's own estimator says {gib(theirs['device'])} GiB and {gib(theirs['host'])} GiB: on the device it "
        "knows no activations, loss, buckets or optimizer, and on the host it adds half as much again for buffers",
        2,
    )


def _time(plan: Plan, epoch_tokens: float | None) -> list[str]:
    if plan.job.on_cpu:
        return ["The time of a step is not estimated for the CPU"]
    step, job, hardware = plan.step, plan.job, plan.hardware
    took = duration((epoch_tokens or 1e6) / step.tokens_per_s)
    each = f"{took} for an epoch of {count(epoch_tokens)} tokens" if epoch_tokens else f"{took} per million tokens"
    share = f"{SHARE_OF_PEAK:.0%} of the peak of {'an assumed' if hardware.assumed else 'the'} {hardware.device}"
    if "flops" in hardware.measured:
        share = f"{SHARE_OF_PRODUCT:.0%} of the rate measured by superoffload doctor"
    found = {"copies": f"{LINKS[hardware.link].text}, assumed", "adam": "assumed"}
    found |= dict.fromkeys(set(hardware.measured) & found.keys(), "measured by superoffload doctor")
    memory = hardware.machine_memory(job.ranks_per_node)
    rates = " and ".join(dict.fromkeys(f"{rate / 1e9:.0f}" for rate in (hardware.down, hardware.up)))
    result = [
        f"Estimated time: {duration(step.step_s)} a step, {step.tokens_per_s:,.0f} tokens/s, {each}",
        f"  computing {duration(step.compute_s)}, at {hardware.flops / 1e12:,.0f} TFLOP/s ({share})",
    ]
    if step.adam_s:
        result += [
            f"  gradients down {duration(step.gradients_s)}, weights up {duration(step.weights_s)}, at {rates} GB/s "
            f"({found['copies']})",
            f"  Adam on the host {duration(step.adam_s)}, at {memory / 1e9:.0f} GB/s ({found['adam']})",
        ]
    if job.ranks > 1:
        result.append(f"  gathers between ranks {duration(step.gathers_s)}, a rough figure")
    result.append(f"  beyond computing, the step takes {duration(step.exposed_s)}; the rest overlaps")
    return [line for text in [*result, _mode(plan)] for line in _wrap(text, 4)]


def _mode(plan: Plan) -> str:
    """Say which mode to use, and why."""
    times = {mode: duration(step.step_s) for mode, step in plan.steps.items()}
    against = f"{times['superoffload']} a step against {times['zerooffload']} in zerooffload"
    if not plan.step.adam_s:
        return "Mode: either one; no part of the optimizer is on the host"
    if plan.best_mode == "superoffload":
        return f"Mode: superoffload, {against}, because copies and Adam run beside backward and forward"
    why = "there is little to overlap"
    if plan.steps["superoffload"].step_s > plan.steps["zerooffload"].step_s:
        why = "the host is the slower side, and superoffload gives it more to do"
    return f"Mode: zerooffload is enough: superoffload would take {against}, because {why}"


def _verdict(plan: Plan) -> list[str]:
    capacity, need = plan.capacity, plan.budget
    result: list[str] = []
    if plan.job.on_cpu:
        result = _wrap(
            "There is no GPU here. This is a run on the CPU, where host memory holds a device's part too. Give "
            "--gpu_memory 80GiB, for instance, to plan for another machine"
        )
    elif capacity.device is None:
        result = _wrap("The device was not checked: give its memory, e.g. --gpu_memory 80GiB")
    if not plan.fits:
        over = " and ".join(f"{gib(size)} GiB too much {PLACES[place]}" for place, size in plan.missing.items())
        return [*result, *_wrap(f"IT DOES NOT FIT: {over}"), *_changes(plan)]
    text = " and ".join(f"{gib(left)} GiB {PLACES[place]}" for place, (left, _) in _spare(capacity, need).items())
    unchecked = capacity.device is None and not plan.job.on_cpu
    result += _wrap(f"{'AS FAR AS IT WAS CHECKED, ' if unchecked else ''}IT FITS: {text} to spare")
    if _is_close(capacity, need):
        result += _wrap(f"  That is close: the arithmetic is no more exact than about {CLOSE:.0%}", 2)
    if capacity.device is not None and plan.largest_batch and plan.largest_length:
        result += _wrap(f"The most that fits: --batch_size {plan.largest_batch}, or --max_length {plan.largest_length}")
        result += [
            line
            for flags, length in plan.longest.items()
            if flags and length and length > plan.largest_length
            for line in _wrap(f"  with {flags}: --max_length {length}", 4)
        ]
    return result


def _spare(capacity: Capacity, need: Budget) -> dict[str, tuple[int, int]]:
    """Return what is left by place, and of how much."""
    sizes = {"device": (capacity.device, need.device_peak), "host": (capacity.host, need.host_peak)}
    return {place: (most - size, most) for place, (most, size) in sizes.items() if most is not None}


def _is_close(capacity: Capacity, need: Budget) -> bool:
    return any(left < CLOSE * most for left, most in _spare(capacity, need).values())


def _changes(plan: Plan) -> list[str]:
    """List the changes that make it fit."""
    if plan.nearest:
        over = plan.capacity.missing(plan.nearest.budget)
        missing = " and ".join(f"{gib(size)} GiB {PLACES[place]}" for place, size in over.items())
        flags = " ".join(plan.nearest.flags) or "the settings as they are"
        return _wrap(f"No two flags are enough. The nearest: {flags}; still missing: {missing}")
    result = [
        "Each of these is enough:",
        f"  {'':{FLAGS_COLUMNS}}{'device':>8}{'host':>9}{'' if plan.job.on_cpu else 'tokens/s':>11}".rstrip(),
    ]
    for remedy in plan.remedies[:MOST_REMEDIES]:
        result += _change(plan, remedy)
    if len(plan.remedies) > MOST_REMEDIES:
        result.append(f"  and {len(plan.remedies) - MOST_REMEDIES} more; --json has all")
    if any(_is_close(plan.capacity, remedy.budget) for remedy in plan.remedies[:MOST_REMEDIES]):
        result.append(f"* leaves less than {CLOSE:.0%}, and the arithmetic is no more exact than that")
    if any("--optimizer_state bf16" in remedy.flags for remedy in plan.remedies[:MOST_REMEDIES]):
        result.append("With --optimizer_state bf16, small updates are lost: see docs/memory.md")
    return result


def _change(plan: Plan, remedy: Remedy) -> list[str]:
    speed = "" if plan.job.on_cpu else f"{step_time(plan.shape, remedy.job, plan.hardware).tokens_per_s:,.0f}"
    figures = f"{gib(remedy.budget.device_peak):>8}{gib(remedy.budget.host_peak):>9}{speed:>11}"
    figures += " *" if _is_close(plan.capacity, remedy.budget) else ""
    text = " ".join(remedy.flags)
    if len(text) <= FLAGS_COLUMNS:
        return [f"  {text:{FLAGS_COLUMNS}}{figures}".rstrip()]
    first, second = remedy.flags
    return [f"  {first}", f"  {'  and ' + second:{FLAGS_COLUMNS}}{figures}".rstrip()]


def _limits(plan: Plan, machine: Machine | None) -> Iterator[str]:
    """Say what is in use on this machine now, and where /dev/shm or the limit on locked memory is too small."""
    if machine is None:
        return
    job, need = plan.job, plan.budget
    free = min((device.free_bytes for device in machine.devices), default=None)
    if free is not None and free < need.device_peak and "device" not in plan.missing:
        yield from _wrap(f"But now only {gib(free)} GiB of a device are free: other processes use the rest", 2)
    if machine.host_available_bytes < need.host_peak and "host" not in plan.missing:
        yield from _wrap(f"But now only {gib(machine.host_available_bytes)} GiB of host memory are available", 2)
    if machine.shm_bytes < shm_bytes(plan.shape, job):
        yield from _wrap(
            f"/dev/shm has {machine.shm_bytes / 2**20:.0f} MiB, but the ranks' communication may need "
            f"{shm_bytes(plan.shape, job) / 2**20:.0f}: start a container with --shm-size",
            2,
        )
    if machine.memlock_bytes is not None and machine.memlock_bytes < memlock_bytes(plan.shape, job):
        yield from _wrap(
            f"ulimit -l is {machine.memlock_bytes / 2**20:.0f} MiB: InfiniBand between machines needs it unlimited", 2
        )
