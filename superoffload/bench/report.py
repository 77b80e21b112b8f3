"""The report of a benchmark, as bench.json has it."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from superoffload import config
from superoffload.bench import alternatives, documents, summary
from superoffload.bench.grid import STOCK, Case
from superoffload.bench.rounds import Measured, Plan
from superoffload.bench.subject import Subject
from superoffload.bench.summary import Report
from superoffload.ds_config import REPOSITORY
from superoffload.planning import environment


def make(cases: Sequence[Case], found: Measured, plan: Plan, subject: Subject, values: Mapping[str, Any]) -> Report:
    """Return the report: what was measured, where, and the numbers of each configuration."""
    outcomes = [found.outcomes[case.name] for case in cases]
    described = [outcome.described for outcome in outcomes]
    product = summary.product_rate(found.product_flops_per_s, described, plan.ranks)
    packages, machine = environment.packages(), environment.machine()
    on_cpu = any(one.get("device") == "cpu" for one in described)
    return {
        "format": 1,
        "command": shlex.join(["superoffload", *sys.argv[1:]]),
        "model": {
            "name": subject.name,
            "parameters": next((one["parameters"] for one in described if one), None),
            "random_weights": subject.config is not None,
        },
        "rows": config.shown(values["dataset_name"]) if values["dataset_name"] else documents.DESCRIPTION,
        "ranks": plan.ranks,
        "rounds": plan.rounds,
        "steps": plan.steps,
        "warmup_steps": plan.warmup_steps,
        "interleaved": plan.alone is None,
        "alone_because": plan.alone,
        "interrupted": found.interrupted,
        "machine": {key: machine[key] for key in ("processor", "cores", "devices")},
        "versions": {
            "superoffload": environment.commit(REPOSITORY),
            **{key: packages[key].split(" ")[0] for key in ("Python", "torch", "deepspeed", "transformers")},
        },
        "product_flops_per_s": (
            summary.spread(found.product_flops_per_s) if found.product_flops_per_s else None
        ),
        "notes": [alternatives.NOTE] if on_cpu and any(case.values["mode"] == STOCK for case in cases) else [],
        "configurations": [
            {
                "name": case.name,
                "settings": case.values,
                "failure": outcome.failure,
                **outcome.described,
                **outcome.memory,
                **summary.configuration(outcome.turns, outcomes[0].turns, product),
            }
            for case, outcome in zip(cases, outcomes, strict=True)
        ],
    }  # fmt: skip
