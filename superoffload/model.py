"""Tokenizer and model: errors that say the way out, weights born sharded, leaf modules."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.utils import set_z3_leaf_modules
from huggingface_hub import try_to_load_from_cache
from transformers.integrations import HfDeepSpeedConfig

from superoffload import hub
from superoffload.config import ModelSettings
from superoffload.ds_config import Document, dtype_name
from superoffload.errors import UserError
from superoffload.flops import ModelShape
from superoffload.log import hide_bars_of_transformers, logger
from superoffload.tokenizer import load_tokenizer

# Sparse blocks as transformers names them. Each rank may route to other experts, so ZeRO-3 must fetch such a
# block as a whole, or the ranks wait for different parameters for ever.
SPARSE_BLOCK = re.compile(r"(SparseMoeBlock|MoELayer|MoE|Moe|Experts)$")


def load_config(name: str) -> Any:
    """Read the model's configuration from a folder or the hub; raise `UserError` where that fails."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model_name {name}: the folder holds no config.json, so it is not a model")
    if not path.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"--model_name {name}: no such folder")
        hub.check("model_name", name, "model", lambda: isinstance(try_to_load_from_cache(name, "config.json"), str))
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _user_error(name, error) from error


def _user_error(name: str, error: BaseException) -> UserError:
    """Put a library's explanation into one line."""
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"--model_name {name}: {first_line}")


def load_whole(folder: Path) -> tuple[Any, Any]:
    """Load a model, all of it in this process and in float32, and its tokenizer."""
    hide_bars_of_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(str(folder))


def check_leaf_module(requested: str | None, config: Any) -> None:
    """Raise `UserError` for a leaf module that no module of the model bears, with what could be meant.

    The model is built without memory for its weights, so this takes a second for any size.
    """
    if requested is None:
        return
    with torch.device("meta"):
        names = _class_names(transformers.AutoModelForCausalLM.from_config(config))
    if requested not in names:
        candidates = ", ".join(name for name in names if SPARSE_BLOCK.search(name))
        hint = f"candidates: {candidates}" if candidates else "none looks like a sparse block; leave the flag out"
        raise UserError(f"--leaf_module {requested}: no module of this model has that class; {hint}")


def load_model(settings: ModelSettings, config: Any, document: Document, attn: str | None) -> Any:
    """Load the model with each rank holding its shard only (collective), ready for ZeRO-3.

    DeepSpeed's dict must be final: `from_pretrained` partitions every parameter as it is made. `attn` is what
    `attention.choose` chose. Raises `UserError` where weights are missing or the architecture is unknown.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype_name(document))}
    if attn:
        options["attn_implementation"] = attn
    quantization = getattr(config, "quantization_config", None) or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    if method == "mxfp4":  # 4-bit experts cannot be trained
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
        logger.info("MXFP4 weights are dequantized to %s", dtype_name(document))
    hide_bars_of_transformers()
    # transformers keeps only a weak reference: the model carries it for as long as it lives.
    keep_alive = HfDeepSpeedConfig(document)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(settings.model_name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _user_error(settings.model_name, error) from error
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
        dtype_name(document),
    )
    return model


def _class_names(model: Any) -> list[str]:
    return sorted({type(module).__name__ for module in model.modules()})


def _set_leaf_modules(model: Any, requested: str | None) -> None:
    found = [name for name in _class_names(model) if SPARSE_BLOCK.search(name)]
    leaves = [requested] if requested else _outermost(model, found)
    if leaves:
        set_z3_leaf_modules(model, leaves)
        logger.info("ZeRO-3 leaf modules: %s", ", ".join(leaves))


def _outermost(model: Any, names: list[str]) -> list[str]:
    """Keep the classes that do not only occur inside another of them (the experts inside their block)."""
    inside = {
        type(inner).__name__
        for module in model.modules()
        if type(module).__name__ in names
        for inner in module.modules()
        if inner is not module
    }
    return [name for name in names if name not in inside]


def numel(parameter: Any) -> int:
    """Count the elements of a parameter, also where ZeRO-3 holds only a share of it here."""
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())


def count_parameters(model: Any) -> int:
    """Count the elements of all parameters, tied ones once."""
    return sum(numel(parameter) for parameter in model.parameters())


def parameter_groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into decayed ones and, without decay, norms and biases."""
    decayed: list[Any] = []
    plain: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (plain if dimensions < 2 or name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def shape_of(model: Any) -> ModelShape:
    """Read from a model what its FLOPs depend on.

    Parameters of experts count by the share of them that a token is routed to. The table of input embeddings
    is looked up, not multiplied, and counts only where it is tied to the output layer.
    """
    config = model.config.get_text_config()
    experts = next(
        (
            n
            for n in (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
            if n
        ),
        0,
    )
    per_token = getattr(config, "num_experts_per_tok", None) or experts
    share = min(1.0, per_token / experts) if experts else 1.0
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    tied = output is not None and output.weight is embedding
    active = sum(
        numel(parameter) * (share if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if parameter is not embedding or tied
    )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or 0
    return ModelShape(
        active_parameters=int(active),
        attention_width=heads * head_dim,
        attention_windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
    )
