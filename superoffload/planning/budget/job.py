"""What the settings of a run say about its memory and its time."""

import os
from dataclasses import dataclass
from typing import Literal

from superoffload.config import Config
from superoffload.ds_config import DsConfig, has_bf16_state

MAX_LIVE, PREFETCH, REUSE = 10**9, 5 * 10**7, 10**9  # DeepSpeed's defaults, deepspeed/runtime/zero/config.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The settings that memory and time depend on.

    mode: `superoffload` or `zerooffload`. ranks: of the whole job; ranks_per_node: of one machine.
    batch: rows or packs per rank and micro-batch; length: tokens per row or pack, at most. packed: they are packs.
    ratio: share of the optimizer's sub-groups on the host. sub_group, bucket: in elements.
    max_live, prefetch, reuse: of gathered parameters, in elements: how many there may be before no more are fetched
        ahead, how many are fetched ahead, and how soon one must be needed again to be kept.
    saves: a checkpoint is written; kept: how many complete ones may be there meanwhile, 0 if only one is ever written.
    sum_bytes: of an element of DeepSpeed's sums of gradients. on_cpu: there is no device, so the host holds its part.
    pinned_rounding: torch rounds pinned memory of any size up to a power of two, as without the recipes' options.
    parts: the ranks that share each row (`--sequence_parallel_size`); the rows of a batch are then theirs together.
    tiled: number of tiles of an MLP, 0 if it is not tiled.
    divided: the batch of all ranks that a recipe's script divides among them; 0 where `batch` was given.
    offload_activations: with `recompute`, the inputs of the layers are kept on the host.
    """

    mode: str
    ranks: int
    ranks_per_node: int
    batch: int
    length: int
    accumulation: int
    ratio: float
    sub_group: int
    bucket: int
    recompute: bool
    chunked_loss: bool
    eager: bool
    bf16_state: bool
    offload_params: bool
    pin_memory: bool
    saves: bool
    kept: int
    exports: bool
    packed: bool = True
    max_live: int = MAX_LIVE
    prefetch: int = PREFETCH
    reuse: int = REUSE
    sum_bytes: int = 2
    on_cpu: bool = False
    pinned_rounding: bool = False
    parts: int = 1
    divided: int = 0
    offload_activations: bool = False
    tiled: int | Literal["auto"] = 0

    @property
    def tokens(self) -> int:
        """Return the tokens of one micro-batch on one rank, which has a part of them if it shares its rows."""
        return -(-self.batch * self.length // self.parts)


ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ROUNDING = "pinned_max_round_threshold_mb"  # the option that limits the rounding of pinned memory; recipes pass it


def rounds_pinned_memory() -> bool:
    """Return whether torch rounds large pinned tensors up in this environment."""
    return not any(ROUNDING in os.environ.get(name, "") for name in ALLOCATOR)


def of(config: Config, ds_config: DsConfig, ranks: int, ranks_per_node: int) -> Job:
    """Read a job from the merged settings (`ds_config.merge_flags`), for devices and with the recipes' options."""
    zero = ds_config["zero_optimization"]
    offload = zero["offload_optimizer"]
    checkpoint = config.checkpoint
    return Job(
        mode="superoffload" if offload.get("super_offload") else "zerooffload",
        ranks=ranks,
        ranks_per_node=ranks_per_node,
        batch=config.training.batch_size,
        length=config.data.max_length,
        accumulation=config.training.gradient_accumulation_steps,
        ratio=offload["ratio"],
        sub_group=zero["sub_group_size"],
        bucket=zero["reduce_bucket_size"],
        recompute=config.model.recomputes,
        offload_activations=config.model.activation_checkpointing == "offload",
        chunked_loss=config.model.loss_kernel != "plain",
        tiled=config.model.tiled_mlp,
        eager=config.model.attn_implementation == "eager",
        bf16_state=has_bf16_state(ds_config),
        offload_params=config.offload.offload_params,
        pin_memory=offload.get("pin_memory", False),
        saves=bool(checkpoint.save_checkpoint or checkpoint.save_steps or checkpoint.save_minutes),
        kept=checkpoint.keep_checkpoints if checkpoint.save_steps or checkpoint.save_minutes else 0,
        exports=checkpoint.export,
        packed=config.data.packs or config.training.sequence_parallel_size > 1,  # without a mask
        parts=config.training.sequence_parallel_size,
        max_live=zero.get("stage3_max_live_parameters", MAX_LIVE),
        prefetch=zero.get("stage3_prefetch_bucket_size", PREFETCH),
        reuse=zero.get("stage3_max_reuse_distance", REUSE),
        sum_bytes=4 if ds_config.get("data_types", {}).get("grad_accum_dtype") == "fp32" else 2,
    )
