"""Reports of benchmarks, for the tests of what is made of them."""

from typing import Any

from superoffload.bench.report import summarise

ONE: dict[str, tuple[Any, ...]] = {
    "mode": ("superoffload",), "layout": ("packed",), "batch_size": (2,), "max_length": (64,),
    "gradient_accumulation_steps": (1,), "activation_checkpointing": ("none",), "tiled_mlp": (0,),
    "loss_kernel": ("auto",), "attn_implementation": ("auto",), "kernels": ("auto",),
}  # fmt: skip
"""One value on each axis of the grid."""


def configuration(name: str, rates: list[float], failure: str | None = None, **settings: Any) -> dict[str, Any]:
    turns = [
        {
            "round": number, "steps": 2, "step_time_s": 100 / rate, "tokens_per_s": 2 * rate,
            "target_tokens_per_s": rate, "tflops_per_gpu": 0.2, "hardware_tflops_per_gpu": 0.25, "padding_share": 0.1,
            "parts": {"data": 0.01, "forward": 20 / rate, "backward": 70 / rate, "optimizer": 5 / rate},
            "clipped_steps": 0, "loss": 1.0,
        }
        for number, rate in enumerate(rates)
    ]  # fmt: skip
    return {
        "name": name,
        "settings": {axis: values[0] for axis, values in ONE.items()} | settings,
        "failure": failure,
        "peak_device_bytes": 0,
        "peak_host_bytes": 3 * 2**30,
        **summarise(turns, turns, 1e12),
    }


def report(*configurations: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "command": "superoffload bench",
        "model": {"name": "llama-1b", "parameters": 1_235_814_400, "random_weights": True},
        "rows": "rows.jsonl",
        "ranks": 1,
        "rounds": 3,
        "steps": 2,
        "warmup_steps": 4,
        "interleaved": True,
        "alone_because": None,
        "interrupted": False,
        "machine": {"processor": "a processor", "cores": "2"},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "product_flops_per_s": {"median": 4e11, "min": 3e11, "max": 5e11},
        "notes": [],
        "configurations": list(configurations),
        **changes,
    }
