"""The report of a benchmark in Markdown. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from superoffload.bench.grid import AXES, constant
from superoffload.bench.report import REST, Report
from superoffload.training.step_parts import PARTS

GIB = 2**30
NONE = "-"


def markdown(report: Report) -> str:
    """Return the report as a document: what was measured, the speeds, where the time of a step goes, and notes."""
    found = report["configurations"]
    measured = [one for one in found if one.get("step_time_s")]
    failed = [one for one in found if one["failure"]]
    lines = ["# Benchmark", "", *_head(report), ""]
    if measured or failed:
        lines += [*_speeds(found), ""]
    if measured:
        lines += ["Milliseconds per step:", "", *_parts(measured), ""]
    return "\n".join([*lines, *_notes(report, measured)]).rstrip() + "\n"


def _head(report: Report) -> list[str]:
    model, machine = report["model"], report["machine"]
    weights = ", random weights" if model["random_weights"] else ""
    shared = constant([one["settings"] for one in report["configurations"]])
    product = report["product_flops_per_s"]
    items = {
        "Command": f"`{report['command']}`",
        "Model": f"{model['name']}, {_count(model['parameters'])}{weights}",
        "Rows": report["rows"],
        "In common": ", ".join(f"{axis} {_flag(shared[axis])}" for axis in AXES if axis in shared) or "nothing",
        "Ranks": report["ranks"],
        "Machine": ", ".join(f"{name}: {value}" for name, value in machine.items()),
        "Versions": ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        "Measured": _how(report),
        "Matrix product": _product(product) if product else "not measured",
    }
    return [f"* {name}: {value}" for name, value in items.items()]


def _how(report: Report) -> str:
    order = (
        "taking turns"
        if report["interleaved"]
        else f"one configuration after the other ({report['alone_because']}), so that ratios include changes of the "
        "machine's load"
    )
    return (
        f"{report['rounds']} rounds of {report['steps']} steps, {order}; one step before each turn and "
        f"{report['warmup_steps']} at the start left out"
    )


def _product(rate: Mapping[str, float]) -> str:
    low, high = rate["min"] / 1e12, rate["max"] / 1e12
    return f"bf16, {rate['median'] / 1e12:.3g} TFLOP/s ({low:.3g}-{high:.3g})"


def _speeds(found: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [
        "configuration", "step", "tokens/s", "target tokens/s", "ratio (min-max)", "TFLOPS", "with recomputation",
        "of the matrix product", "device", "host",
    ]  # fmt: skip
    return _table(names, [_speed(one, len(names)) for one in found])


def _speed(one: Mapping[str, Any], columns: int) -> list[str]:
    if not one.get("step_time_s"):
        return [one["name"], f"failed: {one['failure']}" if one["failure"] else "not measured", *[""] * (columns - 2)]
    name = f"{one['name']} (failed later: {one['failure']})" if one["failure"] else one["name"]
    ratio, share = one["ratio"], one["share_of_product"]
    return [
        name,
        f"{1000 * one['step_time_s']['median']:,.0f} ms",
        f"{one['tokens_per_s']['median']:,.0f}",
        f"{one['target_tokens_per_s']['median']:,.0f}",
        f"{ratio['median']:.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})" if ratio else NONE,
        f"{one['tflops_per_gpu']['median']:.3g}",
        f"{one['hardware_tflops_per_gpu']['median']:.3g}",
        f"{share:.{0 if share >= 0.1 else 2}%}" if share is not None else NONE,
        _gib(one.get("peak_device_bytes")),
        _gib(one.get("peak_host_bytes")),
    ]


def _parts(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [*PARTS, REST]
    rows = [
        [one["name"], *(f"{1000 * one['parts_s'][part]:,.1f}" if part in one["parts_s"] else NONE for part in names)]
        for one in measured
    ]
    return _table(["configuration", *names], rows)


def _notes(report: Report, measured: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [*report["notes"]]
    clipped = [f"{one['name']} {one['clipped_share']:.0%}" for one in measured if one["clipped_share"]]
    if clipped:
        notes.append(f"Steps whose gradient was clipped: {', '.join(clipped)}.")
    if report["interrupted"]:
        notes.append("Interrupted: this is what had been measured by then.")
    return [f"* {note}" for note in notes]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [_row(names), _row(["---", *["---:"] * (len(names) - 1)]), *map(_row, cells)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(size: int | None) -> str:
    return f"{size / GIB:.1f} GiB" if size else NONE


def _flag(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def _count(parameters: int | None) -> str:
    return f"{parameters / 1e6:,.1f} M parameters" if parameters else "parameters not counted"
