"""The tensors of a run's last checkpoint, to be compared bit for bit."""

from pathlib import Path
from typing import Any

import torch


def tensors(value: Any) -> list[torch.Tensor]:
    """List every tensor of a loaded state, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for key in sorted(value, key=str) for tensor in tensors(value[key])]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, list | tuple) else []


def states(out: Path) -> dict[str, list[torch.Tensor]]:
    """Return the tensors of each optimizer file of the newest checkpoint in an output folder."""
    folder = out / (out / "latest").read_text()
    return {
        path.name: tensors(torch.load(path, weights_only=False)["optimizer_state_dict"])
        for path in sorted(folder.glob("*_optim_states.pt"))
    }


def assert_equal_states(one: Path, other: Path) -> None:
    """Compare the newest checkpoints of two output folders bit for bit."""
    expected, found = states(one), states(other)
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        assert len(values) == len(found[name]) > 3
        for left, right in zip(values, found[name], strict=True):
            assert torch.equal(left, right), name
