"""Flags with several values -> the configurations of a benchmark. Pure."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superoffload import config
from superoffload.errors import UserError

MODES = ("superoffload", "zerooffload")
STOCK = "deepspeed"
"""The mode of DeepSpeed's own SuperOffload."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "padding": "longest"},
    "padded": {"packing": False, "padding": "longest"},
    "max_length": {"packing": False, "padding": "max_length"},
}
SETTINGS = (
    "batch_size",
    "max_length",
    "gradient_accumulation_steps",
    "activation_checkpointing",
    "tiled_mlp",
    "loss_kernel",
    "attn_implementation",
    "kernels",
)
"""The settings of a run that can differ between configurations."""
SHARED = {
    config.ModelSettings: ("model_name", "revision", "trust_remote_code", "leaf_module"),
    config.DataSettings: (
        "dataset_name", "dataset_config", "dataset_split", "dataset_format", "columns", "chat_template",
        "dataset_percentage", "num_proc",
    ),
    config.TrainingSettings: ("max_grad_norm", "seed"),
    config.OffloadSettings: ("preflight", "offload_ratio", "optimizer_state", "offload_params", "sub_group_size"),
}  # fmt: skip
"""The flags of a run that all configurations share."""
HAND = ("layers", "hidden", "intermediate", "heads", "kv_heads", "vocabulary")
"""The flags that describe a shape by hand."""
AXES = ("mode", "layout", *SETTINGS)
AGAINST: dict[str, dict[str, str]] = {"deepspeed": {"mode": STOCK}, "upstream-shape": {"layout": "max_length"}}
"""Alternatives: how each differs from the first configuration."""
MOST = 24
RECOMPUTING = {"none": "not recomputing", "full": "recomputing", "offload": "recomputing from the host"}

Values = dict[str, Any]
"""One value for each axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One configuration: its name, and its value on each axis."""

    name: str
    values: Values

    @property
    def flags(self) -> dict[str, Any]:
        """Return the settings of a run, by the names of its flags, except for the ds_config."""
        own = {name: value for name, value in self.values.items() if name in SETTINGS}
        return {**own, **LAYOUTS[self.values["layout"]]}

    @property
    def ds_config(self) -> str:
        """Return the name of the file of DeepSpeed's JSON in configs/."""
        mode = self.values["mode"]
        return f"{'superoffload' if mode == STOCK else mode}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a worker sets up: the settings of a run, the mode, and what is not read but made.

    random_weights: the model has none to read. documents: how many rows to make; 0: they are read.
    """

    flags: dict[str, Any]
    mode: str
    random_weights: bool
    documents: int


def cases(axes: Mapping[str, Sequence[Any]], against: Sequence[str]) -> list[Case]:
    """Return every combination of the axes' values, in order, and the alternatives to the first one.

    Raises `UserError` if there are too many.
    """
    wanted = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*(axes[name] for name in AXES))]
    wanted += [{**wanted[0], **AGAINST[name]} for name in against]
    unique = [values for number, values in enumerate(wanted) if values not in wanted[:number]]
    if len(unique) > MOST:
        sizes = " x ".join(f"{len(axes[name])} --{name}" for name in AXES if len(axes[name]) > 1)
        raise UserError(f"{sizes}: {len(unique)} configurations are too many; give at most {MOST}")
    return [Case(name=name, values=values) for name, values in zip(_names(unique), unique, strict=True)]


def _names(wanted: Sequence[Values]) -> list[str]:
    """Name configurations by what differs between them; a single one by its mode."""
    differing = [axis for axis in AXES if any(values[axis] != wanted[0][axis] for values in wanted)]
    return [", ".join(_word(axis, values[axis]) for axis in differing or AXES[:1]) for values in wanted]


def constant(found: Sequence[Values]) -> Values:
    """Return the values that all configurations share."""
    return {axis: found[0][axis] for axis in found[0] if all(values.get(axis) == found[0][axis] for values in found)}


def _word(axis: str, value: Any) -> str:
    words = {
        "mode": {STOCK: "DeepSpeed's SuperOffload"}.get(value, value),
        "layout": {"max_length": "padded to max_length"}.get(value, value),
        "batch_size": f"batch {value}",
        "max_length": f"length {value}",
        "gradient_accumulation_steps": f"{value} micro-batches",
        "activation_checkpointing": RECOMPUTING.get(value, value),
        "tiled_mlp": "untiled" if value == 0 else f"{value} tiles",
        "loss_kernel": f"{value} loss",
        "attn_implementation": f"{value} attention",
        "kernels": f"{value} kernels",
    }
    return str(words.get(axis, f"{axis} {value}"))
