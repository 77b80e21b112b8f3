"""Preflight: compare what a run needs with what there is, before its weights are read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from superoffload import distributed
from superoffload.checkpoint.resume import Source
from superoffload.config import CheckpointSettings
from superoffload.ds_config import Merged, with_offload_ratio
from superoffload.errors import FAILURES, UserError, first_line
from superoffload.log import logger
from superoffload.model.load import Architecture
from superoffload.planning import plan, ratio, sight, speed
from superoffload.planning.budget import job, shape
from superoffload.planning.forecast import Forecast
from superoffload.setting import AUTO

Found = TypeVar("Found")


def check(
    merged: Merged, architecture: Architecture, longest: int, checkpoints: Sequence[Source]
) -> tuple[Merged, Forecast | None]:
    """Choose the ratio if it is `auto`, and stop a run that needs clearly more than there is (collective).

    `architecture` is the model without weights, `longest` the most tokens of a row in a batch, and `checkpoints` those
    that the run may resume from. Returns the settings, and the forecast, None if memory is not known beforehand. Raises
    `UserError`, on every rank or on none.
    """
    name, folder = merged.config.model.model_name, merged.config.output.output_dir
    own = _attempt(lambda: (sight.see(folder), shape.of_model(name, architecture.skeleton, architecture.frozen)))
    found = distributed.all_gather_objects(own)
    saved = checkpoints[0].manifest["config"].get("offload_ratio") if checkpoints else None
    planned = _attempt(lambda: _planned(merged, found, longest, saved, resumes=bool(checkpoints)))
    if isinstance(planned, str):
        logger.warning("Memory is not known beforehand: %s", planned)
        chosen = (1.0, "because memory is not known beforehand") if saved is None else (saved, "as in the checkpoint")
        return _with_ratio(merged, *chosen), None
    merged, forecast = planned
    _judge(forecast, stops=merged.config.offload.preflight)
    return merged, forecast


def _attempt(look: Callable[[], Found]) -> Found | str:
    """Return what `look` returns, or what went wrong: the preflight must not stop a run because of its own error.

    An error that only this rank has becomes a value, because the others wait for what it found.
    """
    try:
        return look()
    except FAILURES as error:
        logger.debug("The preflight failed", exc_info=True)
        return f"{type(error).__name__}: {first_line(error)}"


def _planned(
    merged: Merged, found: Sequence[Any], longest: int, saved: float | None, *, resumes: bool
) -> tuple[Merged, Forecast]:
    """Choose the ratio if it is `auto`, `saved` being the checkpoint's, and plan the run with it."""
    forecast = _forecast(merged, found, longest, resumes=resumes)
    if merged.config.offload.offload_ratio != AUTO:
        return merged, forecast
    whole = forecast.plan
    merged = _with_ratio(merged, *ratio.auto(whole.shape, whole.job, whole.capacity.device, saved))
    return merged, _forecast(merged, found, longest, resumes=resumes)


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
        pinned_rounding=any(seen.pinned_rounding for seen in sights),
        kept=_kept(merged.config.checkpoint, sights),
    )
    hardware = speed.hardware(devices[0] if devices else None, None, per_node, None)
    made = plan.make(shapes[0], asked, there, hardware)
    return Forecast(plan=made, packed=merged.config.data.packs, resumes=resumes)


def _kept(checkpoint: CheckpointSettings, sights: Sequence[sight.Sight]) -> int:
    """Return how many checkpoints there are when the last one is written: a run that saves only then adds no other."""
    if checkpoint.save_steps or checkpoint.save_minutes:
        return checkpoint.keep_checkpoints
    return min(checkpoint.keep_checkpoints, max(seen.checkpoints for seen in sights))


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
            f"{', '.join(map(str, over))}; {forecast.advice()}; --no_preflight runs it anyway"
        )
