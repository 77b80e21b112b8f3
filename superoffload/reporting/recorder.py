"""Record a run on rank 0: `run.json` at its start, the report at its end. A failure is a warning, never an error.

Nothing here is collective, so a rank that fails alone, or is slow to record, makes no other rank hang.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from superoffload import distributed
from superoffload.checkpoint.manifest import replace_text
from superoffload.errors import FAILURES, first_line
from superoffload.log import logger
from superoffload.reporting import report
from superoffload.reporting.records import RUN_FILE, json_object, starts
from superoffload.training.run import Run


@contextmanager
def recording(run: Run, plan: Mapping[str, Any], environment: Callable[[], Any]) -> Iterator[None]:
    """Record a run around its steps, however they end; then end its trackers. The arguments are those of `start`."""
    start(run, plan, environment)
    try:
        yield
    finally:
        end(run, sys.exception())
        run.samples.finish()
        run.trackers.finish()


def start(run: Run, plan: Mapping[str, Any], environment: Callable[[], Any]) -> None:
    """Write `run.json`, which says what the run is, while it is under way and afterwards.

    `plan` is what was planned, empty if nothing was; `environment` looks at versions and the machine.
    """
    if not distributed.is_rank_0():
        return
    path = Path(run.config.output.output_dir) / RUN_FILE
    try:
        record = _record(run, plan, environment(), starts(json_object(path, [])) if run.progress.step else [])
        replace_text(path, json.dumps(record, indent=1) + "\n")
    except FAILURES as error:
        logger.warning("%s was not written: %s", RUN_FILE, first_line(error))


def end(run: Run, failure: BaseException | None = None) -> None:
    """Write the report of a run, and give it to the trackers; add the error that ended the run to `run.json`."""
    if not distributed.is_rank_0():
        return
    folder = Path(run.config.output.output_dir)
    try:
        if failure is not None:
            record = {**json_object(folder / RUN_FILE, []), "error": first_line(failure)}
            replace_text(folder / RUN_FILE, json.dumps(record, indent=1) + "\n")
        path = report.write(folder, folder / report.REPORT_FILE)
    except report.FAILURES as error:
        logger.warning("No report was written: %s", first_line(error))
        return
    run.trackers.attach(path)
    logger.info("Report: %s", path)


def _record(run: Run, plan: Mapping[str, Any], environment: Any, before: list[dict[str, Any]]) -> dict[str, Any]:
    settings, step = run.config, run.progress.step
    return {
        "model": {
            "name": settings.model.model_name,
            "parameters": plan.get("parameters"),
            "trained_parameters": plan.get("trained_parameters"),
        },
        "mode": Path(settings.offload.deepspeed_config).stem,
        "device": distributed.device_name(),
        "ranks": distributed.world_size(),
        "total_steps": run.last_step,
        "starts": [*before, {"at": time.time(), "step": step}],
        "planned_memory": plan.get("planned_memory"),
        "data": asdict(run.batches.statistics()),
        "environment": environment,
    }
