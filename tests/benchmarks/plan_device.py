"""Write the device memory of the recipes, and compare it with what is counted on the meta device.

    python tests/benchmarks/plan_device.py

Needs no device. Runs forward, recomputation, loss and backward of the recipes' models, with one to four layers and with
all, at the recipes' own batch and length, and counts the storages that are alive. Writes results/plan_device.json and
results/plan_device.md.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from superoffload.planning.budget import device  # noqa: E402
from superoffload.planning.budget.job import Job  # noqa: E402
from superoffload.planning.budget.shape import built_in, of_model  # noqa: E402
from superoffload.setting import AUTO  # noqa: E402
from tests.helpers import builtin_shapes, counted_memory  # noqa: E402
from tests.helpers.recipe_jobs import recipe_job  # noqa: E402
from tests.helpers.recipes import RECIPES  # noqa: E402

GIB = 2**30
DEVICE_BYTES = 80e9  # what the name of an 80 GB device promises; the devices have 79 to 80 GiB
RESULTS = Path(__file__).parent / "results"
PLAIN = Job(
    mode="superoffload", ranks=1, ranks_per_node=1, batch=4, length=4096, accumulation=1, ratio=1.0,
    sub_group=400_000_000, bucket=400_000_000, recompute=True, chunked_loss=True, eager=False, bf16_state=False,
    offload_params=False, pin_memory=True, saves=False, kept=2, exports=False,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model with some of its layers, and what differs from `PLAIN`."""

    model: str
    layers: int
    changes: dict[str, Any]

    @property
    def job(self) -> Job:
        """Return the job to count."""
        return Job(**{**asdict(PLAIN), **self.changes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was predicted and what was counted, in bytes, beside weights and optimizer."""

    model: str
    layers: int
    batch: int
    length: int
    recompute: bool
    chunked_loss: bool
    eager: bool
    packed: bool
    tiled: int | Literal["auto"]
    predicted: int
    counted: int
    offload_activations: bool = False

    @property
    def error(self) -> float:
        """Return by how much the prediction is too high, as a share of what was counted."""
        return self.predicted / self.counted - 1


def _recipes() -> list[Case]:
    """List the recipes' models with their own batch and length, in all ways of computing activations and loss."""
    cases = []
    for model in ("llama-8b", "phi-4", "qwen3-14b", "qwen3-30b-a3b", "seed-oss-36b", "llama-70b"):
        batch = {"qwen3-30b-a3b": 2, "seed-oss-36b": 2, "llama-70b": 1}.get(model, 4)
        for layers in (1, 2, 4, builtin_shapes.MODELS[model][2]["num_hidden_layers"]):
            cases.append(Case(model=model, layers=layers, changes={"batch": batch}))
        for changes in ({"recompute": False}, {"chunked_loss": False}, {"eager": True, "length": 1024}):
            cases.append(Case(model=model, layers=2, changes={"batch": batch, **changes}))
    for layers, changes in (
        (1, {}),
        (2, {}),
        (4, {}),
        (24, {}),
        (2, {"recompute": False}),
        (2, {"length": 4096, "batch": 1}),
    ):
        oss = {
            "batch": 4,
            "length": 1024,
            "eager": True,
            "packed": False,
            "bucket": 800_000_000,
            "sub_group": 800_000_000,
            **changes,
        }
        cases.append(Case(model="gpt-oss-20b", layers=layers, changes=oss))
    return cases


def _others() -> list[Case]:
    """List models with a tied output layer, long rows, and rows that are not packed."""
    return [
        Case(model="llama-1b", layers=4, changes={"batch": 1, "length": 2048}),
        Case(model="llama-1b", layers=16, changes={}),
        Case(model="qwen3-4b", layers=4, changes={"batch": 2}),
        Case(model="qwen3-4b", layers=36, changes={"batch": 2}),
        Case(model="qwen2.5-7b", layers=4, changes={"batch": 1, "length": 32768}),
        Case(model="mixtral-8x7b", layers=1, changes={"batch": 2}),
        Case(model="llama-8b", layers=4, changes={"packed": False}),
        Case(model="qwen3-4b", layers=2, changes={"packed": False, "recompute": False}),
        Case(model="mistral-7b", layers=4, changes={"batch": 8, "recompute": False}),
        Case(model="llama-8b", layers=1, changes={"offload_activations": True}),
        Case(model="llama-8b", layers=32, changes={"offload_activations": True}),
        Case(model="llama-8b", layers=32, changes={"offload_activations": True, "batch": 1, "length": 131072}),
        Case(model="qwen3-30b-a3b", layers=48, changes={"offload_activations": True, "batch": 2}),
        *(
            Case(model=model, layers=layers, changes={"batch": 1, "length": 32768, "tiled": AUTO, **changes})
            for model, layers, changes in (
                ("llama-8b", 4, {}),
                ("llama-8b", 4, {"recompute": False}),
                ("llama-8b", 4, {"tiled": 32}),
                ("llama-1b", 4, {}),
                ("qwen3-30b-a3b", 2, {}),
                ("llama-70b", 2, {}),
            )
        ),
    ]


CASES = [*_recipes(), *_others()]


def predict(case: Case) -> int:
    """Compute what `counted_memory.count` counts."""
    shape = of_model(case.model, builtin_shapes.skeleton(case.model, **_changes(case)))
    parts = device.device_bytes(shape, case.job)
    return parts["bucket"] + parts["activations"] + parts["working"]


def _changes(case: Case) -> dict[str, Any]:
    return {"num_hidden_layers": case.layers, "layer_types": None}


def measure(case: Case) -> Row:
    """Predict and count a case."""
    job = case.job
    return Row(
        model=case.model,
        layers=case.layers,
        batch=job.batch,
        length=job.length,
        recompute=job.recompute,
        chunked_loss=job.chunked_loss,
        eager=job.eager,
        packed=job.packed,
        offload_activations=job.offload_activations,
        tiled=job.tiled,
        predicted=predict(case),
        counted=counted_memory.count(case.model, job, **_changes(case)),
    )


def report(rows: list[Row]) -> str:
    """Write the rows as a Markdown table."""
    lines = [
        "| model | layers | batch x length | activations | MLP | loss | attention "
        "| predicted, GiB | counted, GiB | error |",
        "| --- " * 10 + "|",
    ]
    for row in rows:
        words = (
            row.model, str(row.layers), f"{row.batch} x {row.length}", _activations(row),
            f"tiles: {row.tiled}" if row.tiled else "whole", "chunked" if row.chunked_loss else "plain",
            "eager" if row.eager else "flash" if row.packed else "masked",
            f"{row.predicted / GIB:.2f}", f"{row.counted / GIB:.2f}", f"{row.error:+.1%}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join([*lines, ""])


def _activations(row: Row) -> str:
    return "kept" if not row.recompute else "inputs on the host" if row.offload_activations else "recomputed"


def recipes() -> str:
    """Write the device memory of every recipe as a Markdown table, in GiB."""
    lines: list[str] = []
    for name in RECIPES:
        job = recipe_job(name)
        parts = device.device_bytes(built_in(RECIPES[name][0]), job)
        if not lines:
            lines = [f"| recipe | ratio | {' | '.join(parts)} | sum |", "| --- " * (len(parts) + 3) + "|"]
        sizes = (*parts.values(), sum(parts.values()))
        lines.append(f"| {name} | {job.ratio:.2f} | " + " | ".join(f"{size / GIB:.1f}" for size in sizes) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure all cases and write the results."""
    rows = []
    for case in CASES:
        rows.append(measure(case))
        sys.stderr.write(report(rows[-1:]).splitlines()[-1] + "\n")
    worst = max(abs(row.error) for row in rows)
    text = (
        f"# Device memory of the recipes\n\nGiB on one device; an 80 GB device has {DEVICE_BYTES / GIB:.1f}.\n\n"
        f"{recipes()}\n# Predicted and counted\n\n"
        "Bucket, activations and working memory of a step on one rank, counted on the meta device. "
        f"The largest error is {worst:.1%}.\n\n{report(rows)}"
    )
    (RESULTS / "plan_device.md").write_text(text, encoding="utf-8")
    (RESULTS / "plan_device.json").write_text(
        json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
