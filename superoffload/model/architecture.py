"""A model without weights, on the meta device: what it has can be checked before any weight is read."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed as integration

from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.protocols import Model

# What transformers and torch raise for values in config.json that make no model.
UNFIT = (StrictDataclassError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)
PROBE_LENGTH = 8  # tokens
POSITION_TABLE = re.compile(r"(wpe|position|pos_emb|pos_encoding)")  # names such as `wpe` and `embed_positions`
TABLE_MARGIN = 8  # rows that a table may have besides one per position


@contextmanager
def without_zero3() -> Iterator[None]:
    """Build models whole within the block, also in the process of a run, where transformers would shard them."""
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def trained_model(config: Any, trust_remote_code: bool = False) -> Model:
    """Build the model on the meta device as a run trains it: parameters that get no gradient are frozen.

    Adam would only let them decay. Raises `UserError` if there is no such model.
    """
    skeleton = empty_model(config, trust_remote_code)
    unused = unused_parameters(skeleton)
    for name, parameter in skeleton.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in unused)
    return skeleton


def empty_model(config: Any, trust_remote_code: bool = False) -> Model:
    """Build the causal language model of a configuration on the meta device, where weights take no memory.

    Takes about a second for any size, and draws no random numbers. Raises `UserError` if there is no such model.
    """
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    try:
        with torch.device("meta"), without_zero3(), torch.random.fork_rng(devices=[]):
            return transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-any-return]  # untyped
                config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
            )
    except UNFIT as error:
        if isinstance(error, AttributeError):  # how transformers says that it has no such class
            raise UserError(_not_causal(config, error)) from error
        raise UserError(f"--model_name: {unfit(error)}") from error
    except (OSError, ValueError, ImportError) as error:
        raise UserError(_not_causal(config, error)) from error


def blank_model(config: Any, trust_remote_code: bool, attention: str | None) -> Model:
    """Build a model in bfloat16 on the host, of which everything but the weights is as it should be.

    The weights have no values yet. `attention` is the result of `attention.choose`.
    """
    options = {"attn_implementation": attention} if attention else {}
    with no_init_weights(), without_zero3():
        model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code, **options
        )
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]  # transformers is untyped


def unfit(error: BaseException) -> str:
    """Describe an error of `UNFIT`, which may say little but its type."""
    return f"its config.json describes no model ({type(error).__name__}: {' '.join(str(error).split())})"


def _not_causal(config: Any, error: BaseException) -> str:
    kind = getattr(config, "model_type", type(config).__name__)
    return f"--model_name: {kind} is no causal language model: {first_line(error)}"


def check_positions(skeleton: Model, max_length: int) -> None:
    """Compare `--max_length` with the positions that a model knows.

    Raises `UserError` if the model looks positions up in a table that has fewer; warns if it only was not made for
    them, as with rotary embeddings.
    """
    config = skeleton.config.get_text_config()
    known = getattr(config, "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0 or max_length <= known:
        return
    table = _position_table(skeleton, known)
    if table:
        raise UserError(
            f"--max_length {max_length}: the model has a table of {known} positions ({table}); "
            f"use --max_length {known} or less"
        )
    logger.warning(
        "--max_length %d: the model was made for %d positions; rows longer than that train it on positions it does not "
        "know, which may also make it worse on short rows (packs of shorter rows are not affected)",
        max_length,
        known,
    )


def _position_table(skeleton: Model, known: int) -> str | None:
    """Return the name of a parameter or buffer with one row per position, None if there is none."""
    for path, module in skeleton.named_modules():
        if "Sinusoidal" in type(module).__name__:  # computed, and extended when needed
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            rows = tensor.shape[0] if tensor.dim() == 2 else 0
            if POSITION_TABLE.search(f"{path}.{name}") and known <= rows <= known + TABLE_MARGIN:
                return f"{path}.{name}"
    return None


def unused_parameters(skeleton: Model) -> set[str]:
    """Return the names of the parameters that get no gradient when the model is trained on text.

    Runs the model forward and backward without numbers. If that is impossible, because the model looks at numbers on
    the way, these are the parameters outside the text model and its head.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
            ids = torch.zeros((1, PROBE_LENGTH), dtype=torch.int64)
            skeleton(input_ids=ids, use_cache=False).logits.sum().backward()  # type: ignore[operator]
    except (*UNFIT, ImportError, ValueError) as error:  # only the structure is known then
        logger.debug("The model does not run without numbers: %s", error)
        return _outside_text_model(skeleton)
    unused = {name for name, parameter in skeleton.named_parameters() if parameter.grad is None}
    for parameter in skeleton.parameters():
        parameter.grad = None
    return unused


def _outside_text_model(skeleton: Model) -> set[str]:
    model: Any = skeleton
    decoder = model.get_decoder() if skeleton.config is not skeleton.config.get_text_config() else None
    if decoder is None:
        return set()
    parts = (decoder, skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    inside = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    return {name for name, parameter in skeleton.named_parameters() if id(parameter) not in inside}
