"""DeepSpeed's own SuperOffload on the CPU, to compare with."""

from superoffload.errors import UserError

NOTE = (
    "DeepSpeed's SuperOffload requires CUDA. For this comparison on the CPU its check is disabled, and the CPU's "
    "accelerator is given a stream whose work is always done."
)


class _Stream:
    def synchronize(self) -> None:
        """Return immediately: the CPU has no queue."""


def let_stock_run_without_cuda() -> None:
    """Let DeepSpeed's own class run in this process on the CPU.

    Raises `UserError` if this version of DeepSpeed has no such class.
    """
    from deepspeed.accelerator import get_accelerator

    try:
        from deepspeed.runtime.superoffload import superoffload_stage3
    except ImportError as error:
        raise UserError(f"--against deepspeed: this DeepSpeed has no SuperOffload ({error})") from error
    if get_accelerator().device_name() == "cuda":
        return
    superoffload_stage3._validate_superoffload_accelerator = lambda: None
    get_accelerator().current_stream = lambda device_index=None: _Stream()
