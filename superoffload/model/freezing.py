"""`--freeze`: parameters that are used, but not trained."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from superoffload.errors import UserError, nearest
from superoffload.log import logger
from superoffload.model.flops import count_parameters, numel
from superoffload.protocols import Model


def freeze(skeleton: Model, patterns: Sequence[str]) -> frozenset[str]:
    """Take the parameters that the patterns find out of training; return the names of those that were trained.

    A pattern is a regular expression that is searched for in the names. Tied parameters have several names, any of
    which will do. Raises `UserError` for a pattern that finds none, and if none is left to train.
    """
    model: Any = skeleton
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: set[int] = set()
    for pattern in patterns:
        matching = {key for key, known in names.items() if any(re.search(pattern, name) for name in known)}
        if not matching:
            every = [name for known in names.values() for name in known]
            raise UserError(
                f"--freeze {pattern}: no parameter has such a name{nearest(pattern, every) or f'; one is {every[0]}'}"
            )
        found |= matching
    frozen = set()
    for name, parameter in skeleton.named_parameters():
        if id(parameter) in found and parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.add(name)
            if len(names[id(parameter)]) > 1:
                logger.info("--freeze: %s are one tied parameter", " and ".join(names[id(parameter)]))
    if frozen and not count_parameters(skeleton, trained_only=True):
        raise UserError(f"--freeze {' '.join(patterns)}: leaves nothing to train; use a pattern that finds fewer names")
    return frozenset(frozen)


def apply(model: Model, frozen: Iterable[str]) -> None:
    """Take the parameters of these names out of training, and log how many are left."""
    names = set(frozen)
    if not names:
        return
    count = 0
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
            count += numel(parameter)
    trained = count_parameters(model, trained_only=True)
    logger.info(
        "--freeze: %s parameters in %d tensors are frozen, %s are trained", f"{count:,}", len(names), f"{trained:,}"
    )
