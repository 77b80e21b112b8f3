"""Buffers that ZeRO-3's initialisation has rounded, such as the frequencies of rotary embeddings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from superoffload.log import logger
from superoffload.protocols import Model


def restore_precision(model: Model, dtype: torch.dtype) -> None:
    """Compute again the buffers that are in fewer digits than in a model that is not sharded.

    While ZeRO-3 initialises a model, torch makes every float tensor in the dtype of the weights
    (deepspeed/runtime/zero/partition_parameters.py, zero_wrapper_for_fp_tensor_constructor). transformers before 5.24
    thereby rounds the frequencies of rotary embeddings, by up to 0.4 %. A module without parameters that is made of the
    model's configuration is built once more, outside of that initialisation, to compare with.
    """
    restored = []
    for path, module in model.named_modules():
        rounded = [name for name in module._non_persistent_buffers_set if _is_rounded(module, name)]
        if not rounded or not hasattr(module, "config") or any(True for _ in module.parameters()):
            continue
        try:
            with _default_dtype(dtype), torch.random.fork_rng(devices=[]):
                exact = type(module)(module.config)
        except TypeError:  # it takes more than a configuration
            logger.warning("%s: its buffers %s are in %s", path, ", ".join(sorted(rounded)), dtype)
            continue
        for name in rounded:
            buffer, right = module.get_buffer(name), exact.get_buffer(name)
            if right.dtype != buffer.dtype:
                setattr(module, name, right.to(buffer.device))
                restored.append(f"{path}.{name}")
    if restored:
        logger.debug("Computed again, because ZeRO-3 had rounded them: %s", ", ".join(restored))


def _is_rounded(module: torch.nn.Module, name: str) -> bool:
    buffer = module._buffers.get(name)
    return buffer is not None and buffer.is_floating_point() and buffer.dtype.itemsize < torch.float32.itemsize


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype within the block, as transformers does while it builds a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
