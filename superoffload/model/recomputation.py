"""Activation checkpointing: keep the input of each layer alone, on the device or on the host, and compute it again.

What is recomputed is torch's business (torch.utils.checkpoint). With `offload`, the inputs that it keeps pass through
`HostStates`.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from superoffload.errors import UserError
from superoffload.log import logger

BITS = 3  # a buffer has 8 to 16 times a power of two bytes


def enable(model: Any, where: str) -> None:
    """Make a model recompute its layers, for `--activation_checkpointing` `where`.

    Raises `UserError` if its layers cannot be recomputed, or if it does so by itself and their inputs stay where they
    are.
    """
    if where == "none":
        return
    # Newer versions of transformers warn about the older name.
    start = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    name = type(model).__name__
    try:
        start({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"--activation_checkpointing {where}: {name} cannot recompute its layers; use none") from error
    if where == "offload":
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        if not any(hasattr(layer, "_gradient_checkpointing_func") for layer in layers):
            raise UserError(f"--activation_checkpointing offload: {name} recomputes its layers by itself; use full")
        states = HostStates()
        for layer in layers:
            layer._gradient_checkpointing_func = states.checkpoint


def _nothing() -> None:
    """Stand for a reference to an input that is gone."""


class HostStates:
    """Keeps the inputs of checkpointed layers on the host, from the forward to the backward of each.

    On a device with streams, copies have a stream of their own. In forward, an input is copied while its layer runs,
    and leaves the device when the next one begins; the last one is still there when backward begins. In backward, the
    input of the layer before is copied back while a layer runs. So the device holds two inputs at a time, and one
    between forward and backward. The host waits for no copy, unless a buffer must grow.

    Buffers on the host are reused, in this order: autograd drops what the buffer held, another input takes it. That
    needs no event, because all copies are in the order of their stream.
    """

    def __init__(self) -> None:
        """Take no memory yet."""
        accelerator = get_accelerator()
        self.stream: Any = None if accelerator.is_synchronized_device() else accelerator.Stream()
        self._free: list[torch.Tensor] = []
        self._newest: Callable[[], _Kept | None] = _nothing
        self._warned = False

    def checkpoint(self, layer: Any, *inputs: Any, **options: Any) -> Any:
        """Run a layer without keeping anything but its inputs, on the host (torch.utils.checkpoint.checkpoint)."""
        before = self._newest
        with saved_tensors_hooks(self._keep, self._fetch):  # those of checkpoint itself replace them within the layer
            result = checkpoint(layer, *inputs, use_reentrant=False, **options)
        if self._newest is before and torch.is_grad_enabled() and not self._warned:
            self._warned = True
            logger.warning(
                "--activation_checkpointing offload: inputs of layers stay on the device, "
                "because this model passes them by name"
            )
        return result

    def _keep(self, tensor: torch.Tensor) -> Any:
        """Copy an input to the host; masks, positions and the like have no gradient, and layers share them."""
        if not tensor.requires_grad or not tensor.is_contiguous():
            return tensor
        before = self._newest()
        if before is not None:
            before.leave_device()
        kept = _Kept(self, tensor.detach(), self._newest)
        self._newest = weakref.ref(kept)
        return kept

    def _fetch(self, kept: Any) -> torch.Tensor:
        """Return an input on the device, and begin to copy the one that backward will ask for next."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._newest = kept.before
        tensor: torch.Tensor = kept.fetch()
        before = kept.before()
        if before is not None:
            before.begin_fetch()
        return tensor

    def take_buffer(self, size: int) -> torch.Tensor:
        """Return a buffer of at least `size` bytes, uint8, page-locked if the device has streams.

        Packs differ in length: sizes are rounded up, so that buffers seldom have to grow.
        """
        for number, buffer in enumerate(self._free):
            if buffer.numel() >= size:
                return self._free.pop(number)
        if self._free:  # and all are too small
            if self.stream is not None:
                self.stream.synchronize()  # copies from it have ended, before its memory is released
            self._free.pop()
        return self.allocate(buffer_bytes(size))

    def allocate(self, size: int) -> torch.Tensor:
        """Return new memory of the host."""
        if self.stream is None:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        memory: torch.Tensor = get_accelerator().pin_empty(size, dtype=torch.uint8)
        return memory

    def give_back(self, buffer: torch.Tensor) -> None:
        """Take back a buffer that is no longer in use."""
        self._free.append(buffer)


class _Kept:
    """One input: on the host, and on the device while it is needed there. Autograd owns it."""

    def __init__(self, states: HostStates, tensor: torch.Tensor, before: "Callable[[], _Kept | None]") -> None:
        """Begin to copy the tensor to the host. `before` returns the input that was kept before it, if it is alive."""
        self._states, self.before = states, before
        self._event: Any = None  # of the last copy
        self._on_device: torch.Tensor | None = tensor
        self._version = tensor._version
        buffer = states.take_buffer(tensor.nbytes)
        weakref.finalize(self, states.give_back, buffer).atexit = False
        self._on_host = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._device = tensor.device
        self._copy(self._on_host, tensor)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy after all that the current stream has been asked so far."""
        stream = self._states.stream
        if stream is None:
            target.copy_(source)
            return
        stream.wait_stream(get_accelerator().current_stream())
        with get_accelerator().stream(stream):
            target.copy_(source, non_blocking=True)
        self._event = stream.record_event()

    def _wait(self) -> None:
        """Let the current stream wait for the last copy."""
        if self._event is not None:
            get_accelerator().current_stream().wait_event(self._event)

    def leave_device(self) -> None:
        """Drop the tensor on the device: its memory is used again only after the copy to the host."""
        if self._on_device is not None:
            self._take()

    def begin_fetch(self) -> None:
        """Begin to copy the tensor to the device, unless it is there. Its memory belongs to the current stream."""
        if self._on_device is None:
            self._on_device = torch.empty(self._on_host.shape, dtype=self._on_host.dtype, device=self._device)
            self._copy(self._on_device, self._on_host)
            self._version = self._on_device._version

    def fetch(self) -> torch.Tensor:
        """Return the tensor on the device, and keep it there no longer than the caller does."""
        self.begin_fetch()
        return self._take()

    def _take(self) -> torch.Tensor:
        """Take the tensor away, once it has been copied."""
        self._wait()
        tensor, self._on_device = self._on_device, None
        assert tensor is not None
        if tensor._version != self._version:  # autograd notices it without hooks
            raise RuntimeError(
                "a layer has changed its input in place, so that it cannot be computed again; use "
                "--activation_checkpointing none"
            )
        return tensor


def buffer_bytes(size: int) -> int:
    """Return the size of the buffer for an input of `size` bytes: an eighth of it is unused at most."""
    unit = 1 << max(0, size.bit_length() - 1 - BITS)
    return -(-size // unit) * unit
