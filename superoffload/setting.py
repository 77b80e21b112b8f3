"""What a setting is: a field of a frozen dataclass with a help text, a default and limits.

`config.py` declares the settings of a run with these functions.
"""

import math
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal

from superoffload.errors import UserError

AUTO = "auto"
NumberOrAuto = float | Literal["auto"]
"""The type of a setting that the program can choose itself; until it has, the value is `AUTO`."""
CountOrAuto = int | Literal["auto"]
"""The same for a whole number."""
OR_AUTO = (NumberOrAuto, CountOrAuto)


def setting(help_text: str, default: Any = MISSING, **limits: Any) -> Any:
    """Declare a setting: its help, its default, and its limits.

    `limits` may hold `minimum` and `maximum` (inclusive), `above` and `below` (exclusive), `choices` (a tuple),
    `several` (the flag takes one or more values), `alone` (the choice that the flag means without a value; the setting
    was a switch once, so it takes true for that choice, and false for the first), `path` (it names a file or folder, or
    may do so) and `shapes_run` (changing it makes a different run, which does not resume from the checkpoint). A
    setting without a default is a required flag.
    """
    metadata = {"help": help_text, **limits}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def allowed(spec: Field[Any]) -> str:
    """Describe the values that a setting accepts, e.g. `0 < value <= 100`; empty if it accepts all."""
    limits = spec.metadata
    if "choices" in limits:
        return "one of " + ", ".join(limits["choices"])
    or_auto = f" or {AUTO}" if spec.type in OR_AUTO else ""
    low = f"{limits['above']} < " if "above" in limits else f"{limits['minimum']} <= " if "minimum" in limits else ""
    high = f" <= {limits['maximum']}" if "maximum" in limits else f" < {limits['below']}" if "below" in limits else ""
    return f"{low}value{high}{or_auto}" if low or high else ""


def settings_of(group: Any) -> tuple[Field[Any], ...]:
    """List the settings of a group, given its class or an instance."""
    return fields(group)


def accepts(spec: Field[Any], value: Any) -> bool:
    """Return whether a value is within the limits of a setting; None always is."""
    limits = spec.metadata
    if value is None or (value == AUTO and spec.type in OR_AUTO):
        return True
    if isinstance(value, tuple):
        return all(accepts(spec, item) for item in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return not (
        ("choices" in limits and value not in limits["choices"])
        or ("above" in limits and value <= limits["above"])
        or ("minimum" in limits and value < limits["minimum"])
        or ("maximum" in limits and value > limits["maximum"])
        or ("below" in limits and value >= limits["below"])
    )


def several(value: Any) -> tuple[Any, ...]:
    """Return the values of a setting that takes several, given as a sequence, or as a text that is the only one."""
    return (value,) if isinstance(value, str) else tuple(value)


def whole_number(text: str) -> int:
    """Read a whole number, which may be written as `4e8`, as in DeepSpeed's files; raise ValueError for any other."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(number) if "e" in text.lower() or "." in text else int(text)


def from_switch(spec: Field[Any], value: Any) -> Any:
    """Return the choice that true or false stands for in a setting that was a switch once; any other value as it is."""
    if isinstance(value, bool) and "alone" in spec.metadata:
        return spec.metadata["alone"] if value else spec.metadata["choices"][0]
    return value


def shown(value: Any) -> str:
    """Write a value as on the command line; several values, if there are none, as `(none)`."""
    return " ".join(map(str, value)) or "(none)" if isinstance(value, tuple) else str(value)


class Settings:
    """Base of the groups in `config.py`; checks every field against its limits on construction."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Raise `UserError` for the first value outside its limits; make several values a tuple."""
        for spec in settings_of(self):
            given = getattr(self, spec.name)
            value = several(given) if "several" in spec.metadata else from_switch(spec, given)
            object.__setattr__(self, spec.name, value)
            if not accepts(spec, value):
                raise UserError(f"--{spec.name} {shown(value)}: must be {allowed(spec)}")
