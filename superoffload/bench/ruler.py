"""The machine's rate of large bf16 matrix products: what a step is compared with. A process; see channel.py."""

import statistics
from typing import Any

import torch

from superoffload.bench import channel
from superoffload.planning.checks.link import time_s

SIDE = {"cuda": 8192, "cpu": 2048}
REPEATS = 5


class Ruler:
    """Measures one product again and again, on the first device, or on all cores without a device."""

    def __init__(self, _: Any) -> None:
        """Make the matrix, and wait until the libraries have chosen their kernels."""
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._side = SIDE[self._device]
        self._matrix = torch.randn(self._side, self._side, device=self._device, dtype=torch.bfloat16)
        self.measure()

    def measure(self) -> float:
        """Return the median rate of a few products, in FLOP/s."""
        times_s = [time_s(lambda: self._matrix @ self._matrix, self._device) for _ in range(REPEATS)]
        return 2 * self._side**3 / statistics.median(times_s)

    def close(self) -> None:
        """Do nothing: the process ends."""


if __name__ == "__main__":
    channel.serve(Ruler)
