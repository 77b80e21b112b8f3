"""Count how the memory of activations grows with the length of a row, without a device.

    python tests/benchmarks/activation_memory.py

Runs forward, loss and backward of Llama 1B on torch's meta device, where tensors have sizes and no contents, in every
combination of the flags that change what is kept, and counts the storages that are alive: not the weights, not the
gradients of weights, and not what is copied to the host. Writes activation_memory.json and activation_memory.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from superoffload import config
from superoffload.model import load
from superoffload.model.recomputation import HostStates
from superoffload.planning.budget import device, job
from superoffload.planning.budget.shape import Shape, of_model
from superoffload.setting import settings_of
from tests.helpers import builtin_shapes, counted_memory
from tests.helpers.planning import job_of

GIB = 2**30
MODEL = "llama-1b"
LENGTHS = (4096, 8192, 16384, 32768, 65536)
LOSSES = ("plain", "chunked")
KEPT = (
    {"activation_checkpointing": "none"},
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "offload"},
    {"activation_checkpointing": "none", "tiled_mlp": "auto"},
    {"activation_checkpointing": "full", "tiled_mlp": "auto"},
    {"activation_checkpointing": "offload", "tiled_mlp": "auto"},
)
"""What may be kept. Rows with a flag that this version of the program does not have are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Bytes of one combination at one length: kept from forward to backward by the layers, and the peak of a step.

    kept: of each layer and token. predicted_kept, predicted_peak: what the plan computes.
    """

    flags: dict[str, Any]
    length: int
    kept: float
    peak: int
    predicted_kept: float
    predicted_peak: int


def combinations() -> list[dict[str, Any]]:
    """List the combinations of flags that this version of the program has."""
    known = {spec.name for spec in settings_of(config.ModelSettings)}
    return [{**kept, "loss_kernel": loss} for kept in KEPT if kept.keys() <= known for loss in LOSSES]


def count(flags: dict[str, Any], length: int, layers: int) -> tuple[int, int]:
    """Return the bytes that are alive when the loss begins, and the most in the whole step, of one row."""
    wanted = _job(flags, length)
    at_loss: list[int] = []
    with torch.device("meta"):
        model = _model(flags, layers)
        live = counted_memory.LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        model.get_output_embeddings().register_forward_pre_hook(lambda *_: at_loss.append(live.now))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        with live, mock.patch.object(HostStates, "allocate", live.host_memory):
            counted_memory.loss(model, wanted).backward()
    return at_loss[0], live.peak


def _model(flags: dict[str, Any], layers: int) -> Any:
    """Make the model on the meta device, ready for training as a run makes it."""
    model = builtin_shapes.skeleton(MODEL, num_hidden_layers=layers)
    settings = config.ModelSettings(model_name=MODEL, kernels="none", **flags)
    with ExitStack() as stack:
        if "tiled_mlp" in flags:  # what suits is found by comparing numbers, which the meta device does not have
            found = [layer.mlp for layer in model.model.layers], None
            stack.enter_context(mock.patch("superoffload.model.tiled_mlp._find", return_value=found))
        load._make_ready(settings, model, set(), torch.bfloat16)
    model.set_attn_implementation(counted_memory.COUNTED)
    return model.train()


def _job(flags: dict[str, Any], length: int) -> job.Job:
    return job_of(max_length=length, batch_size=1, **flags)


def measure(flags: dict[str, Any], length: int, layers: int) -> Row:
    """Count one combination with all layers and with half of them."""
    kept, peak = count(flags, length, layers)
    half, _ = count(flags, length, layers // 2)
    shape, wanted = of_model(MODEL, builtin_shapes.skeleton(MODEL, num_hidden_layers=layers)), _job(flags, length)
    return Row(
        flags=flags,
        length=length,
        kept=(kept - half) / (layers - layers // 2) / length,
        peak=peak,
        predicted_kept=_predicted_kept(shape, wanted),
        predicted_peak=_predicted_peak(shape, wanted),
    )


def _predicted_kept(shape: Shape, wanted: job.Job) -> float:
    one, two = (device.activation_bytes(replace(shape, layers=layers), wanted) for layers in (1, 2))
    return (two - one) / wanted.tokens


def _predicted_peak(shape: Shape, wanted: job.Job) -> int:
    """Return what the plan has of this: activations and the loss or a layer; no bucket.

    Short rows: the gradients of a tied embedding from both its places, and their sum.
    """
    moments = device.moments(shape, wanted)
    largest = max(size for moment, size in moments.items() if moment in ("loss", "layer", "tile"))
    rows = device.activation_bytes(shape, wanted) + largest
    return max(rows, 6 * shape.head if shape.tied else 0)


def slope(rows: Sequence[Row]) -> float:
    """Return the bytes of the peak per token, between the two longest rows of one combination."""
    before, last = sorted(rows, key=lambda row: row.length)[-2:]
    return (last.peak - before.peak) / (last.length - before.length)


def report(rows: Sequence[Row], layers: int) -> str:
    """Write the rows as Markdown tables."""
    lengths = sorted({row.length for row in rows})
    heads = " | ".join(f"{length // 1024}K" for length in lengths)
    lines = [
        "# Memory of activations", "",
        f"Llama 1B with {layers} layers, one row: GiB that are alive at the peak of forward, loss and backward, beside "
        "weights and optimizer, and the growth between the two longest rows.", "",
        f"| activations | loss | {heads} | bytes per token |", "| --- " * (len(lengths) + 3) + "|",
    ]  # fmt: skip
    groups = _groups(rows)
    for (kept, loss), group in groups.items():
        sizes = " | ".join(f"{row.peak / GIB:.2f}" for row in group)
        lines.append(f"| {kept} | {loss} | {sizes} | {slope(group):,.0f} |")
    lines += ["", "What the layers keep from forward to backward, per token and layer, at every length:", "",
              "| activations | counted, bytes | planned, bytes |", "| --- | --- | --- |"]  # fmt: skip
    for (kept, loss), group in groups.items():
        if loss == rows[0].flags["loss_kernel"]:
            lines.append(f"| {kept} | {group[-1].kept:,.0f} | {group[-1].predicted_kept:,.0f} |")
    worst = max(abs(row.predicted_peak / row.peak - 1) for row in rows)
    return "\n".join([*lines, "", f"The plan's peaks differ from these by at most {worst:.1%}.", ""])


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        tiled = ", tiled MLP" if "tiled_mlp" in row.flags else ""
        groups.setdefault((row.flags["activation_checkpointing"] + tiled, row.flags["loss_kernel"]), []).append(row)
    return groups


def main() -> None:
    """Count all combinations and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows = []
    for flags in combinations():
        for length in options.lengths:
            rows.append(measure(flags, length, options.layers))
            sys.stderr.write(f"{flags} {length}: {rows[-1].peak / GIB:.2f} GiB\n")
    text = report(rows, options.layers)
    sys.stdout.write(text)
    (options.results / "activation_memory.md").write_text(text, encoding="utf-8")
    found = {"model": MODEL, "layers": options.layers, "rows": [asdict(row) for row in rows]}
    (options.results / "activation_memory.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
