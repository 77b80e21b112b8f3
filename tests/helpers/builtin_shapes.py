"""The configurations of well-known models, and the file of their shapes.

    python -m tests.helpers.builtin_shapes

writes superoffload/planning/budget/shapes.json. A test compares the file with the models, and their numbers of
parameters with those that their authors publish.
"""

import json
from dataclasses import asdict, fields
from typing import Any

from superoffload.planning.budget.shape import BUILT_IN, Shape, of_model

TIED = {"tie_word_embeddings": True}


def _config(
    hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": keys, "vocab_size": vocabulary, "tie_word_embeddings": False, **more,
    }  # fmt: skip


def _qwen3(hidden: int, inner: int, layers: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    return _config(hidden, inner, layers, heads, keys, 151936, head_dim=128, **more)


# name: (hub ids, model type, configuration, number of parameters)
MODELS: dict[str, tuple[tuple[str, ...], str, dict[str, Any], int]] = {
    "llama-1b": (
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
        "llama", _config(2048, 8192, 16, 32, 8, 128256, **TIED), 1_235_814_400,
    ),
    "llama-3b": (
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
        "llama", _config(3072, 8192, 28, 24, 8, 128256, **TIED), 3_212_749_824,
    ),
    "llama-8b": (
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Meta-Llama-3-8B"),
        "llama", _config(4096, 14336, 32, 32, 8, 128256), 8_030_261_248,
    ),
    "llama-70b": (
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-70B-Instruct"),
        "llama", _config(8192, 28672, 80, 64, 8, 128256), 70_553_706_496,
    ),
    "phi-4": (("microsoft/phi-4",), "phi3", _config(5120, 17920, 40, 40, 10, 100352), 14_659_507_200),
    "qwen3-0.6b": (("Qwen/Qwen3-0.6B",), "qwen3", _qwen3(1024, 3072, 28, 16, 8, **TIED), 596_049_920),
    "qwen3-1.7b": (("Qwen/Qwen3-1.7B",), "qwen3", _qwen3(2048, 6144, 28, 16, 8, **TIED), 1_720_574_976),
    "qwen3-4b": (("Qwen/Qwen3-4B",), "qwen3", _qwen3(2560, 9728, 36, 32, 8, **TIED), 4_022_468_096),
    "qwen3-8b": (("Qwen/Qwen3-8B",), "qwen3", _qwen3(4096, 12288, 36, 32, 8), 8_190_735_360),
    "qwen3-14b": (("Qwen/Qwen3-14B",), "qwen3", _qwen3(5120, 17408, 40, 40, 8), 14_768_307_200),
    "qwen3-32b": (("Qwen/Qwen3-32B",), "qwen3", _qwen3(5120, 25600, 64, 64, 8), 32_762_123_264),
    "qwen3-30b-a3b": (
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
        "qwen3_moe",
        _qwen3(2048, 6144, 48, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        30_532_122_624,
    ),
    "qwen2.5-0.5b": (
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"),
        "qwen2", _config(896, 4864, 24, 14, 2, 151936, **TIED), 494_032_768,
    ),
    "qwen2.5-1.5b": (
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B-Instruct"),
        "qwen2", _config(1536, 8960, 28, 12, 2, 151936, **TIED), 1_543_714_304,
    ),
    "qwen2.5-7b": (
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"),
        "qwen2", _config(3584, 18944, 28, 28, 4, 152064), 7_615_616_512,
    ),
    "qwen2.5-14b": (
        ("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-14B-Instruct"),
        "qwen2", _config(5120, 13824, 48, 40, 8, 152064), 14_770_033_664,
    ),
    "qwen2.5-32b": (
        ("Qwen/Qwen2.5-32B", "Qwen/Qwen2.5-32B-Instruct"),
        "qwen2", _config(5120, 27648, 64, 40, 8, 152064), 32_763_876_352,
    ),
    "qwen2.5-72b": (
        ("Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-72B-Instruct"),
        "qwen2", _config(8192, 29568, 80, 64, 8, 152064), 72_706_203_648,
    ),
    "mistral-7b": (
        ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
        "mistral", _config(4096, 14336, 32, 32, 8, 32768, sliding_window=None), 7_248_023_552,
    ),
    "mixtral-8x7b": (
        ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
        "mixtral",
        _config(4096, 14336, 32, 32, 8, 32000, num_local_experts=8, num_experts_per_tok=2), 46_702_792_704,
    ),
    "gemma-3-1b": (
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
        "gemma3_text",
        _config(1152, 6912, 26, 4, 1, 262144, head_dim=256, sliding_window=512, **TIED), 999_885_952,
    ),
    "gpt-oss-20b": (
        ("openai/gpt-oss-20b",),
        "gpt_oss",
        _config(2880, 2880, 24, 64, 8, 201088, head_dim=64, num_local_experts=32, num_experts_per_tok=4),
        20_914_757_184,
    ),
    "gpt-oss-120b": (
        ("openai/gpt-oss-120b",),
        "gpt_oss",
        _config(2880, 2880, 36, 64, 8, 201088, head_dim=64, num_local_experts=128, num_experts_per_tok=4),
        116_829_156_672,
    ),
    "seed-oss-36b": (
        ("ByteDance-Seed/Seed-OSS-36B-Instruct", "ByteDance-Seed/Seed-OSS-36B-Base"),
        "seed_oss", _config(5120, 27648, 64, 80, 8, 155136, head_dim=128), 36_151_104_512,
    ),
}  # fmt: skip


def skeleton(name: str, **changes: Any) -> Any:
    """Build a model on the meta device, with changes to its configuration."""
    import transformers

    from superoffload.model.architecture import empty_model

    _, kind, values, _ = MODELS[name]
    return empty_model(transformers.AutoConfig.for_model(kind, **{**values, **changes}))


def compressed(numbers: tuple[int, ...]) -> list[Any]:
    """Write numbers as `shape._expand` reads them: repeated parts once, with their count."""
    result: list[Any] = []
    start = 0
    while start < len(numbers):
        count, length = max(
            ((_repeats(numbers[start:], length), length) for length in range(1, 65)), key=lambda pair: _saved(*pair)
        )
        part = list(numbers[start : start + length])
        result += [[count, part]] if count > 1 else part[:1]
        start += count * length if count > 1 else 1
    return result


def _repeats(numbers: tuple[int, ...], length: int) -> int:
    count = 1
    while len(numbers) >= (count + 1) * length and numbers[:length] == numbers[count * length : (count + 1) * length]:
        count += 1
    return count


def _saved(count: int, length: int) -> int:
    return (count - 1) * length


def entry(shape: Shape, hub_ids: tuple[str, ...]) -> dict[str, Any]:
    """Return what the file holds about a model."""
    values = {field.name: getattr(shape, field.name) for field in fields(shape)}
    flops = asdict(shape.flops)
    _, kind, settings, _ = MODELS[shape.name]
    return {
        **values,
        "hub_ids": list(hub_ids),
        "config": {"model_type": kind, **settings},
        "groups": [compressed(group) for group in shape.groups],
        "flops": {**flops, "attention_windows": compressed(flops["attention_windows"])},
    }


def text() -> str:
    """Write the file: one field of a model per line."""
    models = []
    for name, (hub_ids, *_) in MODELS.items():
        values = entry(of_model(name, skeleton(name)), hub_ids)
        models.append("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n}")
    return "[" + ",\n".join(models) + "]\n"


if __name__ == "__main__":
    BUILT_IN.write_text(text(), encoding="utf-8")
