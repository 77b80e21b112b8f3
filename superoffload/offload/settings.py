"""Settings of the offload engine that DeepSpeed's JSON does not have."""

from __future__ import annotations

from dataclasses import dataclass


class VerificationError(RuntimeError):
    """A sample of one of the first steps differs from plain arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSettings:
    """Choices that affect speed, never results.

    speculate: compute new weights during backward. If off, every sub-group is stepped once the norm is known. None
        measures which is faster where the trainer computes on the same cores, and speculates elsewhere.
    bind_trainer: restrict the trainer to its share of the cores. None decides by accelerator: on a GPU the
        trainer only feeds the device and is bound; on the CPU accelerator its cores *are* the device, so it
        keeps all of them and only the optimizer process is bound.
    fused: speculate and step with the kernel of worker/fused.cpp where it applies (bf16 weights, fp32 masters).
    direct_gradients: if a step has one micro-batch, write gradients straight into the shared memory instead
        of through DeepSpeed's accumulation buffer.
    chunk_numel_per_thread: elements that one thread of the optimizer process computes before the process
        checks for new messages; four fp32 arrays of this length should fit a core's L2 cache.
    notice_interval_s: seconds between two warnings that the trainer still waits for a living optimizer process.
    verify_steps: how many of the first steps are checked (zero3/verification.py); None: 3 on CUDA, else 0.
    report_folder: where the samples behind a mismatch are written. verify_error: what is raised then.
    """

    speculate: bool | None = None
    bind_trainer: bool | None = None
    fused: bool = True
    direct_gradients: bool = True
    chunk_numel_per_thread: int = 1 << 17
    notice_interval_s: float = 60.0
    verify_steps: int | None = None
    report_folder: str = "."
    verify_error: type[Exception] = VerificationError

    def __post_init__(self) -> None:
        """Reject a chunk size that would move the boundary between DeepSpeed's vector loop and its scalar tail."""
        if self.chunk_numel_per_thread <= 0 or self.chunk_numel_per_thread % 1024:
            raise ValueError(
                f"chunk_numel_per_thread={self.chunk_numel_per_thread} must be a positive multiple of 1024"
            )
