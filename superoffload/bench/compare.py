"""What became faster or slower since another benchmark, beyond the spread of both. Pure."""

from collections.abc import Mapping
from typing import Any

from superoffload.bench.report import Report

SUBJECT = ("model", "rows", "ranks")
"""What must be equal for two benchmarks to have a configuration in common."""
PLACE = ("machine", "versions", "interleaved", "rounds", "steps")
"""What may differ, and is named."""


def lines(before: Report, now: Report) -> list[str]:
    """Say what changed since `before`: one line for each configuration, then what else differs.

    A configuration is faster if its slowest round has more target tokens per second than the fastest round before.
    """
    other = [
        f"{key} was {_short(before.get(key))}, is {_short(now[key])}"
        for key in SUBJECT
        if not _same(before.get(key), now[key])
    ]
    if other:
        return [f"Nothing to compare with: {'; '.join(other)}."]
    old = {_key(one): one for one in before["configurations"]}
    found = [_line(old.pop(_key(one), None), one) for one in now["configurations"]]
    found += [f"{one['name']}: only in the benchmark before" for one in old.values()]
    differences = [text for key in PLACE for text in _differences(key, before.get(key), now.get(key))]
    product = _ratio_of_products(before, now)
    if product:
        found.append(product)
    return [*found, f"What differs: {'; '.join(differences) or 'neither machine nor versions'}."]


def _key(configuration: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(configuration["settings"].items()))


def _line(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    name = now["name"]
    if before is None:
        return f"{name}: not in the benchmark before"
    old, new = before.get("target_tokens_per_s"), now.get("target_tokens_per_s")
    if not (old and new):
        return f"{name}: {_state(before)} before, {_state(now)} now"
    ratio = f"{new['median'] / old['median']:.3f} of the target tokens/s"
    within = f"{new['min'] / old['max']:.3f}-{new['max'] / old['min']:.3f}"
    verdict = "faster" if new["min"] > old["max"] else "slower" if new["max"] < old["min"] else ""
    if not verdict:
        return f"{name}: no change beyond the spread, {ratio} ({within})"
    return f"{name}: {verdict}, {ratio} ({within}); {_largest_change(before, now)}"


def _state(configuration: Mapping[str, Any]) -> str:
    measured = "measured" if configuration.get("target_tokens_per_s") else "not measured"
    return "failed" if configuration["failure"] else measured


def _largest_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the part of a step that changed most."""
    old, new = before["parts_s"], now["parts_s"]
    changes = {part: new.get(part, 0.0) - old.get(part, 0.0) for part in {**old, **new}}
    part = max(changes, key=lambda name: abs(changes[name]))
    return f"most of it in {part}, {1000 * changes[part]:+.0f} ms per step"


def _ratio_of_products(before: Report, now: Report) -> str | None:
    old, new = (one.get("product_flops_per_s") for one in (before, now))
    if not (old and new):
        return None
    return f"The machine's bf16 matrix product: {new['median'] / old['median']:.3f} of before"


def _differences(key: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted({**before, **now})
        return [
            f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if before.get(name) != now.get(name)
        ]
    return [] if before == now else [f"{key} was {before}, is {now}"]


def _same(before: Any, now: Any) -> bool:
    """Compare two subjects; parameters that nothing has counted, because it was interrupted, do not differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(before.get(key) == value for key, value in now.items() if None not in (before.get(key), value))
    return bool(before == now)


def _short(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    count = value.get("parameters")
    return f"{value.get('name')} of {count:,} parameters" if count else str(value.get("name"))
