"""The tokenizer's vocabulary against the rows of the embedding: refuse ids that have no row, or add rows."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from superoffload.config import ModelSettings
from superoffload.data.loader import Batches
from superoffload.ds_config import DsConfig
from superoffload.errors import UserError
from superoffload.log import logger
from superoffload.protocols import Model, Tokenizer

MULTIPLE = 64  # rows, for the matrix kernels


def rows_needed(
    settings: ModelSettings,
    config: Any,
    tokenizer: Tokenizer,
    batches: Sequence[Batches],
    prompt_ids: Iterable[Sequence[int]] = (),
) -> int:
    """Return how many rows the embedding must have; 0 if those that it has are enough (collective).

    A tokenizer may have tokens without a row as long as nothing uses them; only then is the data searched. Raises
    `UserError` if something does, unless `--resize_embeddings` adds rows.
    """
    rows = int(config.get_text_config().vocab_size)
    tokens = 1 + max(tokenizer.get_vocab().values())
    if tokens <= rows:
        return 0
    if settings.resize_embeddings:
        return -(-tokens // MULTIPLE) * MULTIPLE
    sizes = f"the tokenizer has {tokens} tokens, the embedding {rows} rows"
    largest = max(
        _largest_id(batches), tokenizer.pad_token_id, tokenizer.eos_token_id, *map(max, filter(None, prompt_ids))
    )
    if largest >= rows:
        raise UserError(
            f"--model_name {settings.model_name}: {sizes}, and token {largest} ({tokenizer.decode([largest])!r}) is in "
            "use; --resize_embeddings adds rows, or use the tokenizer that belongs to the model"
        )
    logger.warning("%s: %s; the data uses none of the tokens without a row", settings.model_name, sizes)
    return 0


def _largest_id(batches: Sequence[Batches]) -> int:
    """Return the largest id in the data, after every rank has read its share (collective)."""
    from superoffload import distributed  # only here: an export loads no DeepSpeed

    return int(max(distributed.all_gather_objects(max(part.largest_id() for part in batches))))


def grow(model: Model, rows: int, ds_config: DsConfig) -> None:
    """Give the embedding and the output layer `rows` rows; new ones are the mean of the others (collective)."""
    text = model.config.get_text_config()
    if rows <= text.vocab_size:
        return
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    logger.info("--resize_embeddings: %d rows instead of %d", rows, text.vocab_size)
    weights: dict[int, torch.nn.Parameter] = {}
    for table in filter(None, tables):
        for name in ("weight", "bias"):
            old = getattr(table, name, None)
            if old is None:
                continue
            if id(old) not in weights:
                weights[id(old)] = _longer(old, rows, ds_config)
            setattr(table, name, weights[id(old)])
        for name in ("num_embeddings", "out_features"):
            if hasattr(table, name):
                setattr(table, name, rows)
    for part in (model, model.base_model, model.config, text):  # type: ignore[attr-defined]
        if hasattr(part, "vocab_size"):
            part.vocab_size = rows


def _longer(old: torch.nn.Parameter, rows: int, ds_config: DsConfig) -> torch.nn.Parameter:
    """Return a parameter with more rows, partitioned like the others (collective)."""
    import deepspeed  # only here: an export loads no DeepSpeed

    with deepspeed.zero.GatheredParameters([old]), torch.no_grad():
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
        whole = torch.cat([old, mean.expand(rows - old.shape[0], *mean.shape[1:])])
    holder: Any = torch.nn.Module()
    holder.weight = torch.nn.Parameter(whole)
    deepspeed.zero.Init(module=holder, config_dict_or_path=ds_config, dtype=whole.dtype)  # partitions it in place
    return holder.weight  # type: ignore[no-any-return]
