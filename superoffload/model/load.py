"""Load the model: check its configuration, shard its weights as they load, set leaf modules."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig

from superoffload.config import ModelSettings
from superoffload.ds_config import DsConfig, dtype_name
from superoffload.errors import UserError, first_line
from superoffload.log import hide_bars_of_transformers, logger
from superoffload.model.flops import count_parameters
from superoffload.model.tokenizer import check_name, load_tokenizer
from superoffload.protocols import Model, Tokenizer

# Sparse blocks as transformers names them. Ranks may route to different experts, so ZeRO-3 must fetch such a block as a
# whole; otherwise the ranks wait for different parameters forever.
SPARSE_BLOCK = re.compile(r"(SparseMoeBlock|MoELayer|MoE|Moe|Experts)$")


def load_config(name: str) -> Any:
    """Read the model's configuration from a folder or the hub; raises `UserError`."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model_name {name}: the folder has no config.json, so it is not a model")
    check_name(name, "config.json")
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model_name {name}: {first_line(error)}") from error


def load_whole(folder: Path) -> tuple[Model, Tokenizer]:
    """Load a model in fp32, unsharded in this process, and its tokenizer."""
    hide_bars_of_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(str(folder))


def check_leaf_module(requested: str | None, config: Any) -> None:
    """Raise `UserError` if no module of the model has the class `requested`, and suggest candidates.

    Builds the model on the meta device, which takes about a second for any size.
    """
    if requested is None:
        return
    with torch.device("meta"):
        names = _class_names(transformers.AutoModelForCausalLM.from_config(config))
    if requested not in names:
        candidates = ", ".join(name for name in names if SPARSE_BLOCK.search(name))
        hint = f"candidates: {candidates}" if candidates else "none looks like a sparse block; omit the flag"
        raise UserError(f"--leaf_module {requested}: no module of this model has that class; {hint}")


def load_model(settings: ModelSettings, config: Any, ds_config: DsConfig, attention: str | None) -> Model:
    """Load the model with each rank holding only its partition (collective), ready for ZeRO-3.

    `ds_config` must be final: `from_pretrained` partitions every parameter as it is created. `attention` is the result
    of `attention.choose`. Raises `UserError` if weights are missing or the architecture is unknown.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype_name(ds_config))}
    if attention:
        options["attn_implementation"] = attention
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == "mxfp4":  # 4-bit experts cannot be trained
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        logger.info("MXFP4 weights are dequantized to %s", dtype_name(ds_config))
    hide_bars_of_transformers()
    # transformers keeps only a weak reference, so the model holds it for as long as it lives.
    keep_alive = HfDeepSpeedConfig(ds_config)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(settings.model_name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name {settings.model_name}: {first_line(error)}") from error
    model.hf_deepspeed_config = keep_alive
    model.config.use_cache = False
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _set_leaf_modules(model, settings.leaf_module)
    logger.info(
        "Model %s: %s parameters, attention %s, %s",
        settings.model_name,
        f"{count_parameters(model):,}",
        model.config._attn_implementation,
        dtype_name(ds_config),
    )
    return model  # type: ignore[no-any-return]  # transformers is untyped


def _class_names(model: Model) -> list[str]:
    return sorted({type(module).__name__ for module in model.modules()})


def _set_leaf_modules(model: Model, requested: str | None) -> None:
    found = [name for name in _class_names(model) if SPARSE_BLOCK.search(name)]
    leaves = [requested] if requested else _outermost(model, found)
    if leaves:
        from deepspeed.utils import set_z3_leaf_modules  # only here: an export loads no DeepSpeed

        set_z3_leaf_modules(model, leaves)
        logger.info("ZeRO-3 leaf modules: %s", ", ".join(leaves))


def _outermost(model: Model, names: list[str]) -> list[str]:
    """Drop the classes that also occur inside another of them, such as the experts inside their block."""
    inside = {
        type(inner).__name__
        for module in model.modules()
        if type(module).__name__ in names
        for inner in module.modules()
        if inner is not module
    }
    return [name for name in names if name not in inside]
