"""The report of a benchmark, as bench.json has it: medians, and ratios with their spread over the rounds."""

import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from superoffload.bench import alternatives, documents
from superoffload.bench.grid import STOCK, Case
from superoffload.bench.rounds import Measured, Plan
from superoffload.bench.subject import Subject
from superoffload.ds_config import REPOSITORY
from superoffload.planning import environment
from superoffload.setting import shown

Numbers = dict[str, Any]
Report = dict[str, Any]

RATES = ("step_time_s", "tokens_per_s", "target_tokens_per_s", "tflops_per_gpu", "hardware_tflops_per_gpu")
REST = "rest"
"""What a step does besides its parts, such as counting."""


def make(cases: Sequence[Case], found: Measured, plan: Plan, subject: Subject, values: Mapping[str, Any]) -> Report:
    """Return the report: what was measured, where, and the numbers of each configuration."""
    outcomes = [found.outcomes[case.name] for case in cases]
    described = [outcome.described for outcome in outcomes]
    product = product_rate(found.product_flops_per_s, described, plan.ranks)
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
        "rows": shown(values["dataset_name"]) if values["dataset_name"] else documents.DESCRIPTION,
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
            spread(found.product_flops_per_s) if found.product_flops_per_s else None
        ),
        "notes": [alternatives.NOTE] if on_cpu and any(case.values["mode"] == STOCK for case in cases) else [],
        "configurations": [
            {
                "name": case.name,
                "settings": case.values,
                "failure": outcome.failure,
                **outcome.described,
                **outcome.memory,
                **summarise(outcome.turns, outcomes[0].turns, product),
            }
            for case, outcome in zip(cases, outcomes, strict=True)
        ],
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the largest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(turns: Sequence[Numbers], first: Sequence[Numbers], product_flops_per_s: float | None) -> Numbers:
    """Summarise the turns of one configuration beside those of the first one; empty without turns.

    Parts are medians over the rounds of the means of a turn, in seconds per step; so is the rest. `ratio` is that of
    target tokens per second to the first configuration's in the same round. `product_flops_per_s` is the machine's rate
    for as many devices as `tflops_per_gpu` is for.
    """
    if not turns:
        return {}
    parts = [{**turn["parts"], REST: turn["step_time_s"] - sum(turn["parts"].values())} for turn in turns]
    names = list(dict.fromkeys(name for of_turn in parts for name in of_turn))
    rates = {name: spread([turn[name] for turn in turns]) for name in RATES}
    at_first = {turn["round"]: turn["target_tokens_per_s"] for turn in first}
    ratios = [
        turn["target_tokens_per_s"] / at_first[turn["round"]] for turn in turns if at_first.get(turn["round"])
    ]  # fmt: skip
    share = rates["tflops_per_gpu"]["median"] * 1e12 / product_flops_per_s if product_flops_per_s else None
    steps = sum(turn["steps"] for turn in turns)
    return {
        **rates,
        "ratio": spread(ratios) if ratios else None,
        "parts_s": {name: statistics.median(of_turn.get(name, 0.0) for of_turn in parts) for name in names},
        "padding_share": statistics.fmean(turn["padding_share"] for turn in turns),
        "share_of_product": share,
        "clipped_share": sum(turn["clipped_steps"] for turn in turns) / steps,
        "steps": steps,
        "turns": list(turns),
    }


def product_rate(measured: Sequence[float], described: Sequence[Mapping[str, Any]], ranks: int) -> float | None:
    """Return the rate of the matrix product for one rank: that of its device, or its share of the cores of the CPU."""
    if not measured:
        return None
    on_cpu = any(one.get("device") == "cpu" for one in described)
    return statistics.median(measured) / (ranks if on_cpu else 1)
