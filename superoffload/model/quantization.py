"""Quantized weights: which forms can be trained after they are dequantized, and which cannot be trained at all."""

from typing import Any

import transformers

from superoffload.errors import UserError


def method_of(config: Any) -> str:
    """Return how the weights of a model are quantized, e.g. `gptq`; empty if they are not."""
    described = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not described:
        return ""
    method = described.get("quant_method") if isinstance(described, dict) else described.quant_method
    return str(getattr(method, "value", method) or "bitsandbytes")  # older bitsandbytes files name no method


def check(name: str, config: Any) -> None:
    """Raise `UserError` if a model's weights are quantized in a form whose weights cannot be trained."""
    method = method_of(config)
    if method and dequantizing(config) is None:
        raise UserError(
            f"--model_name {name}: its weights are quantized ({method}), so they cannot be trained; use the model that "
            "they were made from"
        )


def dequantizing(config: Any) -> Any:
    """Return the configuration that makes transformers dequantize as it loads; None if that is not needed or possible.

    FP8 keeps the parts of the model that its configuration leaves out of quantization.
    """
    method = method_of(config)
    if method == "mxfp4":  # 4-bit experts cannot be trained
        return transformers.Mxfp4Config(dequantize=True)
    if method in ("fp8", "mxfp8"):
        described = config.quantization_config
        values = described if isinstance(described, dict) else described.to_dict()
        return transformers.FineGrainedFP8Config(**{**values, "dequantize": True})
    return None
