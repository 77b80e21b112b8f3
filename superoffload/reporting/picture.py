"""The picture of the display in the documentation: `python -m superoffload.reporting.picture docs/display.svg`.

The numbers are made up, those of a run of Llama 3.1 8B on one device.
"""

import io
import math
import re
import sys
from pathlib import Path

from rich.console import Console

from superoffload.reporting.panel import Panel
from superoffload.training.metrics import Rates, StepMetrics

GIB = 2**30


def example() -> Panel:
    """Build a display in the middle of a run."""
    now_s = [0.0]
    panel = Panel("meta-llama/Llama-3.1-8B | superoffload | 1 x NVIDIA H200", 3000, 0, lambda: now_s[0])
    for step in range(1, 1241):
        now_s[0] += 3.1
        panel.advance(step)
        if step % 20 == 0:
            numbers = StepMetrics(
                step=step,
                epoch=step / 1500,
                loss=0.92 + 0.6 * math.exp(-step / 220) + 0.03 * math.sin(step / 17) + 0.02 * math.sin(step / 5.3),
                lr=1e-5 * (1 + math.cos(math.pi * step / 3000)) / 2,
                grad_norm=0.8 + 0.1 * math.sin(step / 9),
                rates=Rates(
                    step_time_s=3.1,
                    tokens_per_s=10410.0,
                    target_tokens_per_s=6830.0,
                    padding_share=0.01,
                    tflops_per_gpu=521.4,
                    hardware_tflops_per_gpu=695.2,
                ),
            )
            panel.show(
                numbers,
                {
                    "device_bytes": int(71.2 * GIB),
                    "device_peak_bytes": int(118.6 * GIB),
                    "device_total_bytes": int(139.8 * GIB),
                    "host_bytes": int(142.5 * GIB),
                    "host_total_bytes": int(503.6 * GIB),
                },
            )
    panel.add_event("10:41:20", "Step 1000 | Held-out loss: 0.9873 | Perplexity: 2.684")
    panel.add_event("10:42:01", "Checkpoint saved in llama-8b_output/global_step1000")
    return panel


def svg(width: int = 90) -> str:
    """Draw the example in a terminal of so many columns."""
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(example())
    drawn = console.export_svg(title="superoffload", unique_id="display")
    return re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)  # it would be fetched from the network


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(svg(), encoding="utf-8")
