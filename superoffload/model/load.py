"""Load the model: check its configuration, shard its weights as they load, set leaf modules."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.integrations import HfDeepSpeedConfig

from superoffload.config import ModelSettings
from superoffload.ds_config import DsConfig, dtype_name
from superoffload.errors import UserError
from superoffload.log import hide_bars_of_transformers, logger
from superoffload.model import architecture, buffers, freezing, quantization, vocabulary, weights
from superoffload.model.flops import count_parameters, numel
from superoffload.model.leaf_modules import SPARSE_BLOCK, class_names, make_leaf, sparse_blocks
from superoffload.model.tokenizer import check_name, explain, load_tokenizer
from superoffload.protocols import Model, Tokenizer


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Read the model's configuration from a folder or the hub.

    Raises `UserError`, also for weights that are quantized in a form that cannot be trained.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"--model_name {name}: the folder has no config.json, so it is not a model")
    check_name(name, "config.json", revision)
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name {name}: {explain(error)}") from error
    except architecture.UNFIT as error:
        raise UserError(f"--model_name {name}: {architecture.unfit(error)}") from error
    quantization.check(name, config)
    return config


def load_whole(folder: Path) -> tuple[Model, Tokenizer]:
    """Load a model in fp32, unsharded in this process, and its tokenizer."""
    hide_bars_of_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), load_tokenizer(str(folder))


def load_unsharded(settings: ModelSettings, config: Any, skeleton: Model, attention: str | None) -> Model:
    """Load a model in bfloat16, whole in this process, on the host.

    `config` and `skeleton`, the model on the meta device, which is of no further use, are those of the model;
    `attention` is the result of `attention.choose`. Raises `UserError` as `load_model` does.
    """
    name = settings.model_name
    tensors = weights.describe(name, weights.find(name, settings.revision))
    options = _options(settings, {"bf16": {"enabled": True}}, attention)
    if quantized := quantization.dequantizing(config):
        options["quantization_config"] = quantized
    else:
        weights.check(name, skeleton, tensors, init_missing=False)
    hide_bars_of_transformers()
    try:
        with architecture.without_zero3():
            model, found = transformers.AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name {name}: {explain(error)}") from error
    if quantized:
        weights.report(name, found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"], False)
    return model.eval()  # type: ignore[no-any-return]  # transformers is untyped


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What is known of a model before its weights are read.

    config: its configuration. skeleton: the model on the meta device; parameters that are not trained are frozen.
    frozen: the names of those that are used, but not trained, because of `--freeze`.
    """

    config: Any
    skeleton: Model
    frozen: frozenset[str] = frozenset()


def load_architecture(settings: ModelSettings, max_length: int = 0) -> Architecture:
    """Read the configuration of the model and build it without weights, which takes seconds.

    Raises `UserError`, also if `--leaf_module`, `--freeze` or `--max_length` does not fit the model.
    """
    config = load_config(*settings.origin)
    skeleton = architecture.trained_model(config, settings.trust_remote_code)
    check_leaf_module(settings.leaf_module, skeleton)
    architecture.check_positions(skeleton, max_length)
    return Architecture(config=config, skeleton=skeleton, frozen=freezing.freeze(skeleton, settings.freeze))


def check_leaf_module(requested: str | None, skeleton: Model) -> None:
    """Raise `UserError` if no module of the model has the class `requested`, and suggest candidates."""
    names = class_names(skeleton)
    if requested is not None and requested not in names:
        candidates = ", ".join(name for name in names if SPARSE_BLOCK.search(name))
        hint = f"candidates: {candidates}" if candidates else "none looks like a sparse block; omit the flag"
        raise UserError(f"--leaf_module {requested}: no module of this model has that class; {hint}")


def load_model(
    settings: ModelSettings,
    described: Architecture,
    ds_config: DsConfig,
    attention: str | None,
    embedding_rows: int = 0,
) -> Model:
    """Load the model with each rank holding only its partition (collective), ready for ZeRO-3.

    `ds_config` must be final: `from_pretrained` partitions every parameter as it is created. `attention` is the result
    of `attention.choose`. The embedding and the output layer get `embedding_rows` rows, if they have fewer. Raises
    `UserError` if weights are missing, damaged or not finite, or the architecture is unknown.
    """
    skeleton, untrained = described.skeleton, _untrained(described)
    files = weights.find(settings.model_name, settings.revision)
    tensors = weights.describe(settings.model_name, files)
    options = _options(settings, ds_config, attention)
    if quantized := quantization.dequantizing(described.config):
        options["quantization_config"] = quantized
        logger.info("%s weights are dequantized to %s", quantized.quant_method.upper(), dtype_name(ds_config))
    else:
        weights.check(settings.model_name, skeleton, tensors, settings.init_missing)  # replaces its parameters
    hide_bars_of_transformers()
    # transformers keeps only a weak reference, so the model holds it for as long as it lives.
    keep_alive = HfDeepSpeedConfig(ds_config)
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(settings.model_name, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--model_name {settings.model_name}: {explain(error)}") from error
    if quantized:
        lists = (found["missing_keys"], found["unexpected_keys"], found["mismatched_keys"])
        weights.report(settings.model_name, *lists, settings.init_missing)
    model.hf_deepspeed_config = keep_alive
    weights.check_finite(settings.model_name, model)
    if embedding_rows:
        vocabulary.grow(model, embedding_rows, ds_config)
    _make_ready(settings, model, untrained, options["dtype"])
    freezing.apply(model, described.frozen)
    _log(settings.model_name + weights.commit_of(files), model, dtype_name(ds_config))
    return model  # type: ignore[no-any-return]  # transformers is untyped


def random_model(settings: ModelSettings, described: Architecture, ds_config: DsConfig, attention: str | None) -> Model:
    """Build a model with random weights, without reading any; else as `load_model` (collective)."""
    options = _options(settings, ds_config, attention)
    keep_alive = HfDeepSpeedConfig(ds_config)
    model = transformers.AutoModelForCausalLM.from_config(
        described.config,
        **{key: value for key, value in options.items() if key not in ("revision", "output_loading_info")},
    )
    model.hf_deepspeed_config = keep_alive
    _make_ready(settings, model, _untrained(described), options["dtype"])
    freezing.apply(model, described.frozen)
    _log(f"{settings.model_name} with random weights", model, dtype_name(ds_config))
    return model  # type: ignore[no-any-return]  # transformers is untyped


def end_answers_with(model: Any, end_ids: Sequence[int]) -> None:
    """Add the tokens that end answers in the rows to those at which the model, and so its export, stops to generate."""
    settings = getattr(model, "generation_config", None)
    known = getattr(settings, "eos_token_id", None)
    every = known if isinstance(known, list) else [] if known is None else [known]
    new = [token for token in end_ids if token not in every]
    if settings is not None and new:
        settings.eos_token_id = [*every, *new]


def _untrained(described: Architecture) -> set[str]:
    """Name the parameters that text does not reach."""
    parameters = described.skeleton.named_parameters()
    return {name for name, parameter in parameters if not parameter.requires_grad} - described.frozen


def _make_ready(settings: ModelSettings, model: Any, untrained: set[str], dtype: torch.dtype) -> None:
    """Set what a model that has its weights needs for training."""
    model.config.use_cache = False
    buffers.restore_precision(model, dtype)
    _freeze(model, untrained)
    _set_leaf_modules(model, settings.leaf_module)
    from superoffload.model import kernels, recomputation, tiled_mlp  # only here: an export loads no DeepSpeed

    recomputation.enable(model, settings.activation_checkpointing)
    kernels.use(settings.kernels, model)
    tiled_mlp.use(settings.tiled_mlp, model)


def _options(settings: ModelSettings, ds_config: DsConfig, attention: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype_name(ds_config)),
        "revision": settings.revision or "main",
        "trust_remote_code": settings.trust_remote_code,
        "output_loading_info": True,
    }
    return {**options, "attn_implementation": attention} if attention else options


def _freeze(model: Model, unused: set[str]) -> None:
    """Take parameters out of training that get no gradient: Adam would only let them decay."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if name in unused and parameter.requires_grad:
            parameter.requires_grad_(False)
            part = ".".join(name.split(".")[:2])
            parts[part] = parts.get(part, 0) + numel(parameter)
    if parts:
        counted = ", ".join(f"{part} ({count:,} parameters)" for part, count in parts.items())
        logger.info("Not trained, because text does not reach it: %s", counted)


def _log(name: str, model: Model, dtype: str) -> None:
    total, trained = count_parameters(model), count_parameters(model, trained_only=True)
    logger.info(
        "Model %s: %s parameters%s, attention %s, %s",
        name,
        f"{total:,}",
        "" if trained == total else f", {trained:,} of them trained",
        model.config._attn_implementation,
        dtype,
    )


def _set_leaf_modules(model: Model, requested: str | None) -> None:
    leaves = [requested] if requested else sparse_blocks(model)
    for module in model.modules():
        if type(module).__name__ in leaves:
            make_leaf(module)
    if leaves:
        logger.info("ZeRO-3 leaf modules: %s", ", ".join(leaves))
