"""Count the device memory of a forward and backward without a device: meta tensors, whose storages are watched."""

import weakref
from typing import Any
from unittest import mock

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import eager_mask

from superoffload.model import head, recomputation, tiled_mlp
from superoffload.model.recomputation import HostStates
from superoffload.planning.budget.device import NORM_PIECE
from superoffload.planning.budget.job import Job
from tests.helpers.builtin_shapes import skeleton

COUNTED, MASKED = "counted", "counted_masked"


def _attend(module: Any, *states: Any, scaling: float | None = None, **options: Any) -> tuple[torch.Tensor, None]:
    """Attend with torch's flash kernel, whose results have the sizes of every flash kernel's, packs or not."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    return operator(*states[:3], 0.0, True, False, scale=scaling)[0].transpose(1, 2), None


def _attend_masked(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend with the kernel that torch takes on CUDA if there is a mask."""
    keys, values = (repeat_kv(state, module.num_key_value_groups) for state in (key, value))
    bias = mask.expand(-1, query.shape[1], -1, -1)
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(query, keys, values, bias, True, 0.0, False, scale=scaling)[0].transpose(1, 2), None


transformers.AttentionInterface.register(COUNTED, _attend)
transformers.AttentionInterface.register(MASKED, _attend_masked)
transformers.AttentionMaskInterface.register(MASKED, eager_mask)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is partly untyped
    """Counts the bytes of the storages that are alive, among those created while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and watch the storages of what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def ignore(self, tensors: Any) -> None:
        """Leave tensors out that exist already."""
        for tensor in tensors:
            self._seen[tensor.untyped_storage()._cdata] = tensor

    def host_memory(self, size: int) -> torch.Tensor:
        """Make memory of the host, which does not count, as `HostStates.allocate` does."""
        with _disable_current_modes():
            memory = torch.empty(size, dtype=torch.uint8, device="meta")
        self.ignore([memory])
        return memory

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)


class Bucket:
    """Takes gradients as DeepSpeed's bucket does, and drops them where they would go to the host (one rank)."""

    def __init__(self, elements: int) -> None:
        self._size = elements
        self._buffer = torch.empty(elements, dtype=torch.bfloat16)
        self._gradients: list[torch.Tensor] = []

    def take(self, parameter: torch.nn.Parameter) -> None:
        """Move the gradient of a parameter to the bucket: stage3, __add_grad_to_ipg_bucket."""
        gradient = parameter.grad
        parameter.grad = None
        assert gradient is not None
        used = sum(other.numel() for other in self._gradients)
        if used + gradient.numel() > self._size:
            self.empty()
            used = 0
        if gradient.numel() <= self._size:
            place = self._buffer[used : used + gradient.numel()]
            gradient = place.copy_(gradient.view(-1))
        self._gradients.append(gradient.view(-1))

    def empty(self) -> None:
        """Copy the gradients together (reduce_scatter_coalesced), and take their norms (_constant_buffered_norm2)."""
        if len(self._gradients) > 1:
            flat = torch.cat(self._gradients)
            parts = list(torch.split(flat, [gradient.numel() for gradient in self._gradients]))
        else:
            parts = self._gradients[:]
        self._gradients.clear()
        for part in parts:
            for piece in torch.split(part, NORM_PIECE):
                piece.to(torch.float64).norm()


def count(name: str, job: Job, **changes: Any) -> int:
    """Return the most bytes that one step on one rank holds on the device, beside weights and optimizer.

    The model has the configuration of a built-in shape with `changes`. All positions are targets, rows are full.
    """
    with torch.device("meta"):
        model = skeleton(name, **changes)
        model.config.use_cache = False
        model.set_attn_implementation("eager" if job.eager else COUNTED if job.packed else MASKED)
        model.train()
        recomputation.enable(model, recomputed(job))
        if job.tiled:
            for layer in model.model.layers:
                tiled_mlp._tile(layer.mlp, job.tiled)
        live = LiveBytes()
        live.ignore([*model.parameters(), *model.buffers()])
        with live, mock.patch.object(HostStates, "allocate", live.host_memory):
            bucket = Bucket(job.bucket)
            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(bucket.take)
            loss(model, job).backward()
            bucket.empty()
    return live.peak


def recomputed(job: Job) -> str:
    """Return the value of `--activation_checkpointing` of a job."""
    return "none" if not job.recompute else "offload" if job.offload_activations else "full"


def loss(model: Any, job: Job) -> Any:
    """Run the forward of a step, whose rows are full and all targets; return the sum of its losses."""
    ids = torch.zeros((job.batch, job.length), dtype=torch.int64)
    # Packs that all scores are computed for have a mask too, which transformers would make from their positions.
    masked = job.eager or not job.packed
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if masked else None}
    if not job.chunked_loss:
        return head.summed_loss(model(**inputs).logits, ids)
    targets = torch.zeros(job.tokens, dtype=torch.int64)

    def losses(layer: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        states = hidden.flatten(0, 1).index_select(0, torch.arange(job.tokens))
        return head.token_losses(states, layer.weight, layer.bias, targets)

    with head._returning(losses, model):
        return model(**inputs).sum()
