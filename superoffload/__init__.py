"""Full fine-tuning of language models on one machine with ZeRO-3 and host offload."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from superoffload.api import finetune

__all__ = ["finetune"]


def __getattr__(name: str) -> Any:
    """Import `finetune` when it is asked for: importing the package imports nothing else."""
    if name == "finetune":
        from superoffload.api import finetune

        return finetune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
