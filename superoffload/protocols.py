"""What the package uses of a tokenizer, a model and DeepSpeed's engine; the libraries themselves are untyped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Tokenizer(Protocol):
    """A transformers tokenizer."""

    eos_token: str | None
    eos_token_id: int
    pad_token: str | None
    pad_token_id: int
    chat_template: Any
    is_fast: bool
    backend_tokenizer: Any
    special_tokens_map: dict[str, Any]
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, Any]

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise one text, or a batch of them."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """Render a conversation, as text or as tokens."""

    def get_chat_template(self) -> str:
        """Return the text of the default chat template."""

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        """Look tokens up in the vocabulary."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Return the text of tokens."""

    def get_vocab(self) -> dict[str, int]:
        """Return every token with its id."""

    def save_pretrained(self, folder: str | Path) -> Any:
        """Write the tokenizer's files."""


class Model(Protocol):
    """A transformers causal language model."""

    config: Any
    training: bool
    generation_config: Any
    all_tied_weights_keys: Mapping[str, str] | None
    _keys_to_ignore_on_save: Iterable[str] | None

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the parameters, tied ones once."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Iterate over the parameters and their names, tied ones once."""

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the buffers and their names."""

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Iterate over all modules and their names, the model itself first, with an empty name."""

    def modules(self) -> Iterator[torch.nn.Module]:
        """Iterate over all modules, the model itself first."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return parameters and buffers by name."""

    def get_input_embeddings(self) -> Any:
        """Return the module that holds the table of input embeddings."""

    def get_output_embeddings(self) -> Any:
        """Return the output layer, None if there is none."""

    def register_forward_hook(self, hook: Callable[..., Any], *, prepend: bool = False) -> Any:
        """Register a function to call after forward, which may replace the output; return its handle."""

    def set_attn_implementation(self, name: str) -> None:
        """Switch to another attention implementation."""

    def generate(self, **options: Any) -> torch.Tensor:
        """Generate tokens, int64 `[batch, length]`, the prompt included."""


class Engine(Protocol):
    """DeepSpeed's engine around a model."""

    module: Model
    optimizer: Any
    lr_scheduler: Any
    checkpoint_engine: Any
    training: bool

    @property
    def device(self) -> torch.device:
        """Return the device that this rank computes on."""

    def __call__(self, **inputs: Any) -> Any:
        """Run the model forward (collective)."""

    def backward(self, loss: torch.Tensor) -> Any:
        """Run backward for one micro-batch (collective)."""

    def step(self) -> None:
        """End a micro-batch; step the optimizer after the last one of a step (collective)."""

    def train(self, mode: bool = True) -> Any:
        """Switch to training, or with `mode` False to evaluation."""

    def eval(self) -> Any:
        """Switch to evaluation."""

    def get_lr(self) -> Sequence[float]:
        """Return the learning rate of each parameter group."""

    def get_global_grad_norm(self) -> Any:
        """Return the gradient norm of the last step, before clipping."""

    def save_checkpoint(self, folder: str, **options: Any) -> Any:
        """Write a checkpoint (collective)."""

    def load_checkpoint(self, folder: str, **options: Any) -> tuple[str | None, dict[str, Any]]:
        """Load a checkpoint (collective); return its path, None if that failed, and the client's state."""
