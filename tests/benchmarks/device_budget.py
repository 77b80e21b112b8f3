"""Compute how much device memory each recipe needs, in superoffload mode, and write results/device_budget.md.

    python tests/benchmarks/device_budget.py

An estimate from shapes; nothing is run, and no GPU is needed. The recipes' own values are read from scripts/. Sources:
DeepSpeed 0.19.8 (runtime/zero/stage3.py: sub-groups, buckets, norms) and superoffload/model/head.py.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

GIB = 2**30
DEVICE_BYTES = 80e9  # what the name of an 80 GB device promises; the devices have 79 to 80 GiB
CONTEXT_BYTES, NCCL_BYTES = GIB, GIB  # CUDA context, kernels and workspaces; buffers of the communication
MAX_LIVE = 10**9  # parameters that DeepSpeed keeps gathered, stage3_max_live_parameters
NORM_PIECE = 250_000_000  # elements that DeepSpeed converts to float64 at a time to compute a norm
SLACK = 0.05  # fragmentation
ALPACA_LENGTH = 1024  # the longest rows of Alpaca, where rows are not packed

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
PHI_4 = {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN_14B = {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40}
QWEN_MOE = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32}
GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64}
SEED_36B = {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 80}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-8b": ("llama", {**LLAMA_8B, "num_key_value_heads": 8, "vocab_size": 128256}),
    "phi-4": ("phi3", {**PHI_4, "num_key_value_heads": 10, "vocab_size": 100352, "tie_word_embeddings": False}),
    "qwen3-14b": ("qwen3", {**QWEN_14B, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}),
    "gpt-oss-20b": (
        "gpt_oss",
        {**GPT_OSS, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088, "num_local_experts": 32},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {**QWEN_MOE, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128},
    ),
    "seed-oss-36b": ("seed_oss", {**SEED_36B, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 155136}),
    "llama-70b": ("llama", {**LLAMA_70B, "num_key_value_heads": 8, "vocab_size": 128256}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a recipe says about memory; `batch` is that of one rank, `bucket` the elements of a sub-group."""

    ranks: int
    batch: int
    length: int
    bucket: int
    ratio: float
    eager: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The numbers of elements of the parameters, in the order of the optimizer's groups, and the configuration."""

    groups: tuple[tuple[int, ...], ...]
    config: Any

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(sum(group) for group in self.groups)


def read_recipe(name: str) -> Recipe:
    """Read the values of a recipe."""
    (path,) = (ROOT / "scripts").glob(f"finetune_{name}_*gpu.sh")
    values = dict(re.findall(r'^([A-Z_]+)="?([^"\s]*)"?', path.read_text(encoding="utf-8"), re.M))
    ranks = int(values["GPUS_PER_NODE"])
    packed = values["PACKING"] == "true"
    return Recipe(
        ranks=ranks,
        batch=int(values["BATCH_SIZE"]) // ranks,
        length=int(values["MAX_LENGTH"]) if packed else ALPACA_LENGTH,
        bucket=int(float(values["SUB_GROUP_SIZE"])),
        ratio=float(values["OFFLOAD_RATIO"]),
        eager=values["ATTN_IMPLEMENTATION"] == "eager",
    )


def make_model(name: str) -> Model:
    """Build the model of a recipe on the meta device."""
    import torch
    import transformers

    from superoffload.model.parameter_groups import parameter_groups

    kind, shape = SHAPES[name]
    config = transformers.AutoConfig.for_model(kind, **shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    groups = parameter_groups(model, 0.01)
    return Model(groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups), config=config)


def device_sub_groups(model: Model, ranks: int, bucket: int, ratio: float) -> list[int]:
    """Return the elements, on one rank, of the sub-groups that the device steps (stage3._create_fp16_sub_groups)."""
    sub_groups: list[int] = []
    for group in model.groups:
        size = 0
        for number, numel in enumerate(group, 1):
            size += -(-numel // ranks)
            if size >= bucket or number == len(group):
                sub_groups.append(size)
                size = 0
    return sub_groups[: int((1 - ratio) * len(sub_groups))]


def layer_bytes_per_token(config: Any, recipe: Recipe) -> int:
    """Return what recomputing one layer and running it backward holds, in bf16, per token of the micro-batch."""
    hidden: int = config.hidden_size
    heads: int = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * head_dim, config.num_key_value_heads * head_dim
    experts = getattr(config, "num_experts_per_tok", None) or 1
    inner: int = experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
    attention: int = 6 * (queries + keys)  # queries, keys and values, before and after their rotation; the result
    attention += 14 * heads * recipe.length if recipe.eager else 0  # scores, in float32 too, and their gradients
    routed = 8 * experts * hidden if experts > 1 else 0  # tokens sorted by expert, in and out, and their gradients
    return attention + 18 * hidden + 14 * inner + routed  # norms in float32; gate, up, product, and their gradients


def budget(model: Model, recipe: Recipe) -> dict[str, float]:
    """Return the bytes of each part on one device, and their `sum`.

    What is there all the time: weights, optimizer, bucket, gathered, checkpoints. `working` is the largest of what
    comes and goes: the head's loss and gradient, one layer backward, or the step of one sub-group.
    """
    config, ranks = model.config, recipe.ranks
    tokens = recipe.batch * recipe.length
    head = config.vocab_size * config.hidden_size
    largest = max(numel for group in model.groups for numel in group if numel != head)
    on_device = device_sub_groups(model, ranks, recipe.bucket, recipe.ratio)
    loss = 2 * head + 8 * tokens * config.hidden_size  # gradient of the weight; states and their gradient
    layer = layer_bytes_per_token(config, recipe) * tokens + 2 * recipe.bucket + 2 * largest + _to_host(largest, ranks)
    parts = {
        "weights": 2 * model.parameters / ranks,
        "optimizer": 16.0 * sum(on_device),
        "bucket": 2.0 * recipe.bucket,
        "gathered": 2.0 * MAX_LIVE if ranks > 1 else 0.0,
        "checkpoints": 2.0 * tokens * config.hidden_size * config.num_hidden_layers,
        "working": float(max(loss, 2 * head + _to_host(head, ranks), layer, 4 * max(on_device, default=0))),
    }
    parts["other"] = SLACK * sum(parts.values()) + CONTEXT_BYTES + (NCCL_BYTES if ranks > 1 else 0)
    return {**parts, "sum": sum(parts.values())}


def _to_host(numel: int, ranks: int) -> int:
    """Return the bytes of the copies of a gradient on its way to the host: in float32, or a piece for the norm."""
    return max(4 * numel // ranks, 8 * min(numel // ranks, NORM_PIECE))


def report() -> str:
    """Write the budget of every recipe as a Markdown table, in GiB."""
    names = ("weights", "optimizer", "bucket", "gathered", "checkpoints", "working", "other", "sum")
    lines = [
        f"| recipe | ratio | {' | '.join(names)} |",
        "| --- | --- " + "| --- " * len(names) + "|",
    ]
    for name in SHAPES:
        recipe = read_recipe(name)
        parts = budget(make_model(name), recipe)
        lines.append(f"| {name} | {recipe.ratio:.2f} | " + " | ".join(f"{parts[n] / GIB:.1f}" for n in names) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Write the table."""
    text = f"# Device memory of the recipes\n\nGiB on one device; an 80 GB device has {DEVICE_BYTES / GIB:.1f}.\n\n"
    (Path(__file__).parent / "results" / "device_budget.md").write_text(text + report(), encoding="utf-8")
    sys.stdout.write(text + report())


if __name__ == "__main__":
    main()
