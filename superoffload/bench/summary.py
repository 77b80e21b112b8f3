"""The numbers of all turns -> medians, and ratios with their spread over the rounds. Pure."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Numbers = dict[str, Any]
Report = dict[str, Any]

RATES = ("step_time_s", "tokens_per_s", "target_tokens_per_s", "tflops_per_gpu", "hardware_tflops_per_gpu")
REST = "rest"
"""What a step does besides its parts, such as counting."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the largest of some values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def configuration(turns: Sequence[Numbers], first: Sequence[Numbers], product_flops_per_s: float | None) -> Numbers:
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
