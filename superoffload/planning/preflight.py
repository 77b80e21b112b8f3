"""Preflight: compare what a run needs with what there is, before its weights are read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from superoffload import distributed
from superoffload.checkpoint.resume import Source
from superoffload.config import AUTO
from superoffload.ds_config import Merged, with_offload_ratio
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.planning import job, plan, ratio, shape, sight, speed
from superoffload.planning.forecast import Forecast
from superoffload.protocols import Model

Found = TypeVar("Found")

# What unusual models, files and drivers make the arithmetic raise; not a reason to refuse a run.
UNKNOWN = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def check(
    merged: Merged, skeleton: Model, longest: int, checkpoints: Sequence[Source]
) -> tuple[Merged, Forecast | None]:
    """Choose the ratio if it is `auto`, and stop a run that needs clearly more than there is (collective).

    `skeleton` is the model without weights, `longest` the most tokens of a row in a batch, and `checkpoints` those that
    the run may resume from. Returns the settings and
    the forecast, None if memory is not known beforehand. Raises `UserError`, on every rank or on none.
    """
    name, folder = merged.config.model.model_name, merged.config.output.output_dir
    own = _attempt(lambda: (sight.see(folder), shape.of_model(name, skeleton)))
    found = distributed.all_gather_objects(own)
    forecast = _attempt(lambda: _forecast(merged, found, longest, resumes=bool(checkpoints)))
    if isinstance(forecast, str):
        logger.warning("Memory is not known beforehand: %s", forecast)
        return _with_ratio(merged, 1.0, "because memory is not known beforehand"), None
    if merged.config.offload.offload_ratio == AUTO:
        saved = checkpoints[0].manifest["config"].get("offload_ratio") if checkpoints else None
        planned = forecast.plan
        merged = _with_ratio(merged, *ratio.auto(planned.shape, planned.job, planned.capacity.device, saved))
        forecast = _forecast(merged, found, longest, resumes=bool(checkpoints))
    _judge(forecast, stops=merged.config.offload.preflight)
    return merged, forecast


def _attempt(look: Callable[[], Found]) -> Found | str:
    """Return what `look` returns, or what went wrong: the preflight must not stop a run because of its own error."""
    try:
        return look()
    except UNKNOWN as error:
        logger.debug("The preflight failed", exc_info=True)
        return f"{type(error).__name__}: {first_line(error)}"


def _forecast(merged: Merged, found: Sequence[Any], longest: int, *, resumes: bool) -> Forecast:
    """Plan the run with what every rank found; pure, so that all ranks come to the same result."""
    for problem in found:
        if isinstance(problem, str):
            raise LookupError(problem)
    sights, shapes = zip(*found, strict=True)
    per_node = sight.ranks_per_node(sights)
    devices = [device.name for seen in sights for device in seen.machine.devices]
    there = sight.capacity(sights)
    asked = replace(
        job.of(merged.config, merged.ds_config, len(sights), per_node),
        length=longest,
        on_cpu=there.device is None,
        pinned_rounding=job.rounds_pinned_memory(),
    )
    hardware = speed.hardware(devices[0] if devices else None, None, per_node, None)
    made = plan.make(shapes[0], asked, there, hardware)
    return Forecast(plan=made, packed=merged.config.data.packs, resumes=resumes)


def _with_ratio(merged: Merged, chosen: float, why: str) -> Merged:
    if merged.config.offload.offload_ratio != AUTO:
        return merged
    logger.info("--offload_ratio auto: %s, %s", chosen, why)
    return with_offload_ratio(merged, chosen)


def _judge(forecast: Forecast, *, stops: bool) -> None:
    """Log the forecast, and raise `UserError` if it is over the capacity and `stops` is true."""
    over = [need for need in forecast.needs if need.over]
    line = f"Memory: {', '.join(map(str, forecast.needs))} at the most (host: {forecast.phase})"
    if not over:
        tight = any(need.tight for need in forecast.needs)
        logger.log(logging.WARNING if tight else logging.INFO, "%s%s", line, ": it may not fit" if tight else "")
        return
    logger.log(logging.ERROR if stops else logging.WARNING, "%s", "\n".join([line, *forecast.lines()]))
    if stops:
        raise UserError(
            f"--model_name {forecast.plan.shape.name}: this run needs more than there is: "
            f"{', '.join(map(str, over))}; {forecast.advice()}; --no_preflight goes on all the same"
        )
