"""The charts of a run: which numbers of its records are drawn, and how. Pure."""

from typing import Any

from superoffload.reporting.charts import Chart, Series, chart, smoothed, stacked
from superoffload.reporting.records import Points, Records, number, points

GIB = 2**30
PART_COLORS = {"data": 7, "forward": 2, "loss": 5, "backward": 0, "optimizer": 1, "upload": 4, "rest": 6}


def training(records: Records) -> list[Chart]:
    """Return the charts of what was learned."""
    return _drawn(_loss(records), _by_source(records), _learning_rate(records), _gradient_norm(records))


def speed(records: Records) -> list[Chart]:
    """Return the charts of how fast it was."""
    rates = [
        Series(name="target tokens/s", points=records.series("target_tokens_per_s")),
        Series(name="tokens/s", points=records.series("tokens_per_s"), color=1),
    ]
    parts = {name: _scaled(values, 1000.0) for name, values in step_parts(records).items()}
    return _drawn(
        chart("Throughput", rates, unit="per second", from_zero=True),
        chart("Where the time of a step goes", stacked(parts, PART_COLORS), unit="ms per step")
        if len(records.steps) > 1
        else None,
    )


def memory(records: Records) -> list[Chart]:
    """Return the charts of the memory in use against the plan."""
    return _drawn(
        _memory(records, "device", "Device memory", "What torch has allocated on rank 0's device."),
        _memory(
            records,
            "host",
            "Host memory",
            "In use on rank 0's machine, by all programs. The plan is on top of what others had in use at the start.",
        ),
    )


def lengths(histogram: Any) -> list[Chart]:
    """Return the chart of the rows' lengths, given pairs of the upper end of a bin and the number of rows in it."""
    pairs = [(float(upper), number(count)) for upper, count in histogram or ()]
    if not pairs:
        return []
    bars = Series(name="rows", points=[(0.0, None), *pairs], kind="bars")
    return _drawn(chart("Lengths of rows", [bars], unit="number of rows", x_name="tokens"))


def clipped(records: Records) -> tuple[Points, float]:
    """Return the logged steps whose gradient was clipped, and the limit; 0 if there is none."""
    limit = number(records.settings.get("max_grad_norm")) or 0.0
    norms = records.series("grad_norm")
    return [(x, norm) for x, norm in norms if limit and norm is not None and norm > limit], limit


def step_parts(records: Records) -> dict[str, Points]:
    """Return the seconds of each part of a step, and of the rest, for every logged step that has them."""
    lines = [line for line in records.steps if "forward_s" in line]
    keys = dict.fromkeys(key for line in lines for key in line)  # in the order of a step
    known = [key.removesuffix("_s") for key in keys if key.endswith("_s") and not key.endswith(("_time_s", "_per_s"))]
    found = {part: [(float(line["step"]), number(line.get(f"{part}_s"))) for line in lines] for part in known}
    rest: Points = []
    for place, line in enumerate(lines):
        in_parts_s = sum(values[place][1] or 0.0 for values in found.values())
        rest.append((float(line["step"]), max(0.0, (number(line.get("step_time_s")) or 0.0) - in_parts_s)))
    return {**found, "rest": rest} if found else {}


def _drawn(*charts: Chart | None) -> list[Chart]:
    return [one for one in charts if one is not None]


def _loss(records: Records) -> Chart | None:
    losses = records.series("loss")
    held_out = points(records.evaluations, "eval_loss")
    lines = [
        Series(name="as logged", points=losses, kind="faint", hidden=True),
        Series(name="training, smoothed", points=smoothed(losses)),
    ]
    bad = sum(value is None for _, value in losses)
    return chart(
        "Loss",
        [*lines, *_evaluated("held out", held_out, 1)],
        note=f"{bad} logged steps have a loss that is infinite or NaN" if bad else "",
        wide=True,
    )


def _evaluated(name: str, values: Points, color: int) -> list[Series]:
    """Return an evaluated number as dots, joined by a line."""
    return [
        Series(name=name, points=values, kind="faint", color=color, hidden=True),
        Series(name=name, points=values, kind="dots", color=color),
    ]


def _by_source(records: Records) -> Chart | None:
    lines: list[Series] = []
    for color, name in enumerate(records.sources):
        found = records.series(f"loss/{name}")
        lines.append(Series(name=name, points=smoothed(found), color=color))
        held_out = points(records.evaluations, f"eval_loss/{name}")
        lines.append(Series(name=f"{name}, held out", points=held_out, kind="dots", color=color))
    return chart("Loss of each data set", lines, wide=True)


def _learning_rate(records: Records) -> Chart | None:
    return chart("Learning rate", [Series(name="lr", points=records.series("lr"))], from_zero=True)


def _gradient_norm(records: Records) -> Chart | None:
    norms = records.series("grad_norm")
    over, limit = clipped(records)
    infinite = sum(norm is None for _, norm in norms)
    notes = [f"{len(over)} of {len(norms)} logged steps were clipped to {limit:g}"] if limit else []
    notes += [f"{infinite} were infinite or NaN"] if infinite else []
    lines = [
        Series(name="gradient norm", points=norms),
        *([Series(name=f"limit {limit:g}", points=[(0.0, limit)], kind="limit", color=7)] if over else []),
        Series(name="clipped", points=over, kind="dots", color=1),
    ]
    return chart("Gradient norm before clipping", lines, note=", ".join(notes), from_zero=True)


def _memory(records: Records, place: str, title: str, what: str) -> Chart | None:
    plan = records.run.get("planned_memory") or {}
    used = _scaled(records.series(f"{place}_bytes"), 1 / GIB)
    peak = _scaled(records.series(f"{place}_peak_bytes"), 1 / GIB)
    total = next((value for _, value in records.series(f"{place}_total_bytes") if value), None)
    planned, available = number(plan.get(f"{place}_bytes")), number(plan.get(f"{place}_available_bytes"))
    if place == "host" and planned and total and available:
        planned += max(0.0, total - available)
    limits = {"planned": planned, "total": total}
    return chart(
        title,
        [
            Series(name="in use", points=used),
            Series(name="peak", points=peak, color=2),
            *(
                Series(name=f"{name} {value / GIB:.1f}", points=[(0.0, value / GIB)], kind="limit", color=color)
                for (name, value), color in zip(limits.items(), (1, 7), strict=True)
                if value and used
            ),
        ],
        unit="GiB",
        note=what,
        from_zero=True,
    )


def _scaled(values: Points, factor: float) -> Points:
    return [(x, None if value is None else value * factor) for x, value in values]
