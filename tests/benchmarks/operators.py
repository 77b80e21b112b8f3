"""Profile forward and backward of a packed batch: the ten most expensive operators, and the matrix products' rates.

    python tests/benchmarks/operators.py

A random Llama of hidden size 512, then 1024, 8 layers, bf16, on the CPU; documents of the lengths of one batch of
Alpaca rows (packing_speed.py, max_length 2048, batch size 4). Steps and a large square matrix product take turns, then
one step is profiled, then the shapes of its matrix products are timed alone. Needs quiet cores for about three minutes.
Writes operators.md and operators.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload.model import attention, head

# fmt: off
LENGTHS = (
    445, 445, 442, 440, 276, *([67] * 7), *([66] * 5), *([65] * 10), *([64] * 4), *([63] * 5), 187, *([186] *
    3), *([185] * 3), *([184] * 3), 182, 713, 702, 626, 1
)
# fmt: on
HEAD_SIZE, VOCABULARY, SHOWN = 64, 4096, 10
KERNELS = {  # self-contained kernels whose products the profiler does not see, and their products per pair and head
    "aten::_scaled_dot_product_flash_attention_for_cpu": 2,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")
Found = dict[str, Any]


def make_step(hidden: int, layers: int, lengths: tuple[int, ...]) -> Callable[[], None]:
    """Make a model and return a function that runs it forward and backward, with the loss of every other token."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=1376 * hidden // 512,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=hidden // HEAD_SIZE,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=attention.SDPA_VARLEN
    )
    model.config.use_cache = False
    ids = torch.randint(0, VOCABULARY, (1, sum(lengths)))
    inputs: Found = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "document_lengths": lengths,
    }

    def step() -> None:
        states = model.model(**inputs).last_hidden_state[0]
        losses = head.token_losses(states[:-1:2], model.lm_head.weight, None, ids[0, 1::2][: len(states[:-1:2])])
        losses.mean().backward()  # type: ignore[no-untyped-call]
        model.zero_grad()

    return step


def elapsed_s(work: Callable[[], Any], times: int = 1) -> float:
    """Return the time of one of several calls."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times


def square_product(size: int) -> Callable[[], Any]:
    """Return a function that multiplies two square bf16 matrices."""
    left, right = (torch.randn(size, size).bfloat16() for _ in range(2))
    return lambda: torch.mm(left, right)


def profiled(step: Callable[[], None]) -> list[Found]:
    """Return each operator's self time, calls and FLOPs, by input shapes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    return [
        {
            "name": event.key,
            "shapes": [shape for shape in event.input_shapes if shape],
            "calls": event.count,
            "self_time_s": event.self_cpu_time_total / 1e6,
            "flops": event.count * flops(event.key, [shape for shape in event.input_shapes if shape]),
        }
        for event in profiler.key_averages(group_by_input_shape=True)
    ]


def flops(name: str, shapes: list[list[int]]) -> float:
    """Return the FLOPs of one call in matrix products; attention counts the pairs below the diagonal."""
    if name in PRODUCTS:
        left, right = [shape for shape in shapes if len(shape) > 1][-2:]
        return 2.0 * torch.Size(left).numel() * right[-1]
    if name in KERNELS:
        batch, heads, length, width = shapes[0]
        return KERNELS[name] * batch * heads * length * (length + 1) * width
    return 0.0


def by_name(operators: list[Found]) -> list[Found]:
    """Add up the operators of each name; the slowest first."""
    totals: dict[str, Found] = {}
    for operator in operators:
        total = totals.setdefault(
            operator["name"], {"name": operator["name"], "calls": 0, "self_time_s": 0, "flops": 0}
        )
        for key in ("calls", "self_time_s", "flops"):
            total[key] += operator[key]
    return sorted(totals.values(), key=lambda total: -total["self_time_s"])


def products(operators: list[Found], positions: int) -> list[Found]:
    """Time the shapes of the large matrix products alone; the slowest first."""
    large = [one for one in operators if one["name"] == "aten::mm" and positions in one["shapes"][0]]
    found = []
    for one in sorted(large, key=lambda one: -one["self_time_s"])[:SHOWN]:
        (rows, inner), (_, columns) = one["shapes"][:2]
        # The product for a weight's gradient: the first factor is a transposed view, as in a step.
        left = torch.randn(inner, rows).bfloat16().t() if inner == positions else torch.randn(rows, inner).bfloat16()
        right = torch.randn(inner, columns).bfloat16()
        alone_s = min(elapsed_s(functools.partial(torch.mm, left, right), 3) for _ in range(3))
        found.append({**one, "alone_s": alone_s})
    return found


def measure(hidden: int, options: argparse.Namespace) -> Found:
    """Measure one size of model."""
    lengths = LENGTHS[: options.documents]
    step, square = make_step(hidden, options.layers, lengths), square_product(options.square)
    step(), square()
    times: dict[str, list[float]] = {"step_s": [], "square_s": []}
    for _ in range(options.rounds):
        times["square_s"].append(elapsed_s(square, 3))
        times["step_s"].append(elapsed_s(step))
    operators = profiled(step)
    total_s = sum(one["self_time_s"] for one in operators)
    total_flops = sum(one["flops"] for one in operators)
    step_s, square_s = (statistics.median(times[name]) for name in ("step_s", "square_s"))
    rate = 2 * options.square**3 / square_s
    return {
        "hidden": hidden,
        "layers": options.layers,
        "positions": sum(lengths),
        "documents": len(lengths),
        "times": times,
        "step_s": step_s,
        "square_flops_per_s": rate,
        "step_flops": total_flops,
        "share_of_rate": total_flops / step_s / rate,
        "profiled_s": total_s,
        "operators": by_name(operators)[:SHOWN],
        "products": products(operators, sum(lengths)),
    }


def table(found: Found) -> list[str]:
    """Write one size of model as Markdown."""
    rate = found["square_flops_per_s"]

    def reached(flops: float, time_s: float) -> str:
        return f"{flops / time_s / 1e12:.3f} | {flops / time_s / rate:.0%}" if flops else "| "

    lines = [
        "",
        f"## Hidden size {found['hidden']}, {found['layers']} layers",
        "",
        f"{found['positions']:,} positions in {found['documents']} documents. Forward and backward take "
        f"{found['step_s']:.2f} s for {found['step_flops'] / 1e12:.2f} TFLOP, **{found['share_of_rate']:.0%}** of the "
        f"rate of the square product, {rate / 1e12:.3f} TFLOP/s.",
        "",
        "| operator | self time | share | calls | TFLOP/s | share of rate |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| `{one['name'].removeprefix('aten::')}` | {one['self_time_s']:.3f} s | "
            f"{one['self_time_s'] / found['profiled_s']:.1%} | {one['calls']} | "
            f"{reached(one['flops'], one['self_time_s'])} |"
            for one in found["operators"]
        ),
        "",
        "| matrix product | self time | calls | TFLOP/s in the step | share of rate | TFLOP/s alone | share of rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {one['shapes'][0]} x {one['shapes'][1]} | {one['self_time_s']:.3f} s | {one['calls']} | "
            f"{reached(one['flops'], one['self_time_s'])} | {reached(one['flops'] / one['calls'], one['alone_s'])} |"
            for one in found["products"]
        ),
    ]
    return lines


def main() -> None:
    """Measure all sizes and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024], help=f"multiples of {HEAD_SIZE}")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--documents", type=int, default=len(LENGTHS), help="take the first of them only")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--square", type=int, default=4096, help="size of the square matrices")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: Found = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {options.threads} threads",
        "torch": torch.__version__,
        "sizes": [measure(hidden, options) for hidden in options.hidden],
    }
    lines = [
        "# Operators",
        "",
        f"{found['machine']}, torch {found['torch']}. Forward and backward in bf16, packed; FLOPs are those of matrix "
        "products. Rates of operators are those under the profiler.",
        *(line for size in found["sizes"] for line in table(size)),
        "",
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "operators.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.results / "operators.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
