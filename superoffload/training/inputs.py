"""What a run reads besides the model."""

from typing import NamedTuple

from superoffload import distributed
from superoffload.config import Config
from superoffload.data import collate, loader, template
from superoffload.data.loader import Batches
from superoffload.ds_config import DsConfig
from superoffload.log import logger
from superoffload.model import attention
from superoffload.model.load import Architecture
from superoffload.model.tokenizer import load_tokenizer
from superoffload.protocols import Tokenizer
from superoffload.training.evaluation import Evaluation, read_prompts


class Inputs(NamedTuple):
    """What a run reads besides the model, and the attention kernel, on which the layout of batches depends."""

    attention_kernel: str | None
    tokenizer: Tokenizer
    batches: Batches
    evaluation: Evaluation


def load(config: Config, ds_config: DsConfig, architecture: Architecture) -> Inputs:
    """Tokenise the rows once per machine, and build this rank's batches for training and evaluation."""
    parts = config.training.sequence_parallel_size
    attention_kernel = attention.choose(config.model, architecture.config, ds_config, config.data.packs, parts)
    tokenizer = load_tokenizer(*config.model.origin)
    with distributed.wait_without_collective("tokenising"):
        texts = read_prompts(config.evaluation.sample_prompts)
        rows, held_out_rows = loader.load(tokenizer, config.data, config.training.seed)
        prompts = loader.tokenize_prompts(texts, tokenizer, config.data)
    template.keep(tokenizer, config.data.chat_template)
    takes_documents = attention.takes_documents(attention_kernel)
    layout = collate.choose_layout(config.data, tokenizer.pad_token_id, takes_documents, parts)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batches = loader.Batches(rows, layout, config.training, **ranks)
    held_out = loader.Batches(held_out_rows, layout, config.training, **ranks) if held_out_rows else None
    for line in batches.statistics().short_lines():
        logger.info("%s", line)
    evaluation = Evaluation(held_out, prompts, config.evaluation.eval_steps)
    return Inputs(attention_kernel, tokenizer, batches, evaluation)
