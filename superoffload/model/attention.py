"""Attention: choose the kernel; without flash-attn, attend to packs by torch's own kernel or document by document."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import is_flash_attn_2_available

from superoffload.config import ModelSettings
from superoffload.ds_config import DsConfig, dtype_name
from superoffload.errors import UserError, first_line
from superoffload.log import logger
from superoffload.model import flash_cpu, flops, sequence_parallel
from superoffload.protocols import Model

try:
    from torch.nn.attention import varlen

    varlen_attn: Any = varlen.varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None

SDPA_VARLEN, TORCH_VARLEN = "sdpa_varlen", "torch_varlen"
PARAMETERS = {"scale", "window_size"}  # of varlen_attn; its first version lacks them
LARGEST_HEAD, HEAD_MULTIPLE = 256, 8  # sizes of a head that the kernel takes
SDPA_ONLY = ("position_bias", "softcap", "s_aux")  # options that the kernel cannot express; s_aux is a sink
TRIAL_LENGTHS, TRIAL_WINDOW = (40, 1, 23), 7
TRIAL_TOLERANCE = 2e-2  # of the largest element; a token of another document would change as much as the element itself


def choose(settings: ModelSettings, config: Any, ds_config: DsConfig, packs: bool, parts: int = 1) -> str | None:
    """Choose the attention implementation for transformers; None leaves the choice to the model (sdpa or eager).

    `parts` is the number of ranks that share each row: then it is one of the kernels for packs. Raises `UserError` if
    flash_attention_2 was requested and cannot run, or if ranks cannot share rows.
    """
    if parts > 1:
        return _for_parts(settings, config, ds_config, parts)
    installed = is_flash_attn_2_available()
    suitable = _on_cuda_in_half(ds_config)
    if settings.attn_implementation == "flash_attention_2":
        if not installed:
            raise UserError(
                "--attn_implementation flash_attention_2: the package flash-attn is not installed for this device; "
                "`pip install flash-attn`, or use auto"
            )
        if not suitable:
            raise UserError(
                "--attn_implementation flash_attention_2: needs a CUDA device and bf16 or fp16 weights; use auto"
            )
    if settings.attn_implementation != "auto":
        return settings.attn_implementation
    model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if not getattr(model_class, "_supports_flash_attn", False):
        return None
    if installed and suitable:
        return "flash_attention_2"
    return _for_documents(config, ds_config, suitable) if packs and _passes_documents(model_class) else None


def _passes_documents(model_class: Any) -> bool:
    """Return whether a model passes on what `attend` needs: the documents and the sliding window.

    Models do that which support flash attention and any attention function.
    """
    needed = ("_supports_flash_attn", "_supports_sdpa", "_supports_attention_backend")
    return all(getattr(model_class, name, False) for name in needed)


def _for_parts(settings: ModelSettings, config: Any, ds_config: DsConfig, parts: int) -> str:
    """Choose the kernel for rows that `parts` ranks share; raises `UserError` if there is none."""
    if settings.attn_implementation != "auto":
        raise UserError(
            f"--attn_implementation {settings.attn_implementation}: is not available with --sequence_parallel_size "
            f"{parts}; use auto"
        )
    if not _passes_documents(transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)):
        raise UserError(
            f"--sequence_parallel_size {parts}: {config.model_type} does not attend document by document; use 1"
        )
    sequence_parallel.check_config(config, parts)
    return _for_documents(config, ds_config, _on_cuda_in_half(ds_config))


def _for_documents(config: Any, ds_config: DsConfig, suitable: bool) -> str:
    """Choose torch's kernel if it is suitable and gives the numbers of sdpa, else sdpa."""
    problem = _problem_of_varlen(config, ds_config) if suitable else None
    if problem:
        logger.info("Packs are attended to one document at a time: %s", problem)
    return TORCH_VARLEN if suitable and not problem else SDPA_VARLEN


def _on_cuda_in_half(ds_config: DsConfig) -> bool:
    """Return whether flash kernels for CUDA suit the device and the weights' dtype."""
    return get_accelerator().device_name() == "cuda" and dtype_name(ds_config) != "float32"


def _problem_of_varlen(config: Any, ds_config: DsConfig) -> str | None:
    """Return why torch's kernel cannot be used for a model, None if it can."""
    text = config.get_text_config()
    size = flops.setting(text, "head_dim") or text.hidden_size // text.num_attention_heads
    return problem_of_varlen(size, getattr(torch, dtype_name(ds_config)))


def problem_of_varlen(size: int, dtype: torch.dtype) -> str | None:
    """Try torch's kernel on two small packs, forward and backward; return why it cannot be used, None if it can.

    `size` is that of a head.
    """
    if varlen_attn is None or not PARAMETERS <= _parameters(varlen_attn):
        return f"torch {torch.__version__} has no varlen_attn with {', '.join(sorted(PARAMETERS))}"
    if _refuses_heads(size):
        return f"torch's varlen_attn does not take heads of {size}"
    try:
        distance = max(distance_from_sdpa(size, dtype, window) for window in (None, TRIAL_WINDOW))
    except (RuntimeError, ValueError, TypeError) as error:
        return f"torch's varlen_attn failed: {first_line(error)}"
    if not distance <= TRIAL_TOLERANCE:
        return f"torch's varlen_attn differs from sdpa by {distance:.1%}"
    return None


@functools.cache
def _parameters(kernel: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kernel).parameters)


def distance_from_sdpa(size: int, dtype: torch.dtype, window: int | None) -> float:
    """Return the largest difference between the two kernels' outputs and gradients, relative to the largest element."""
    device = get_accelerator().current_device_name()
    generator = torch.Generator().manual_seed(0)  # its own, so that the run's random numbers stay the same
    shapes = [(1, heads, sum(TRIAL_LENGTHS), size) for heads in (4, 2, 2)]
    values = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    bounds = torch.tensor([0, *TRIAL_LENGTHS], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    options = {"document_lengths": TRIAL_LENGTHS, "cu_seq_lens_q": bounds, "max_length_q": max(TRIAL_LENGTHS)}
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found = []
    for kernel in (attend_at_once, attend):
        states = [value.clone().requires_grad_() for value in values]
        output, _ = kernel(module, *states, None, sliding_window=window, **options)
        (output * values[0].transpose(1, 2)).sum().backward()  # type: ignore[no-untyped-call]
        found.append([output.detach(), *(state.grad for state in states)])
    pairs = [(first.float(), second.float()) for first, second in zip(*found, strict=True)]
    return max(float((first - second).abs().max() / second.abs().max()) for first, second in pairs)


def takes_documents(attention: str | None) -> bool:
    """Return whether an attention implementation receives the documents of a pack, so that it needs no mask."""
    return attention in (SDPA_VARLEN, TORCH_VARLEN) or (attention or "").startswith("flash_attention")


def attend_at_once(module: torch.nn.Module, *states: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Attend within each document of a pack by one call of torch's `varlen_attn`.

    Takes and returns what `attend` does; `options` must also hold `cu_seq_lens_q` (int32 `[documents + 1]`) and
    `max_length_q`. Falls back to `attend` for what the kernel cannot express, such as dropout or soft-capping.
    """
    problem = _problem_of_call(module, states, options)
    if problem:
        _say(type(module).__name__, problem)
        return attend(module, *states, **options)
    query, key, value = (state[0].transpose(0, 1) for state in states[:3])
    bounds, longest = options["cu_seq_lens_q"], options["max_length_q"]
    window = options.get("sliding_window")
    # Versions without the parameter take fewer heads of key and value as they are.
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _parameters(varlen_attn) else {}
    output = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(window - 1 if window else -1, 0),
        **grouped,
    )
    return output[None], None


def _problem_of_call(module: torch.nn.Module, states: Any, options: dict[str, Any]) -> str | None:
    """Return what the kernel cannot express of a call, None if it can; reads no values of tensors."""
    unusual = _unusual(module, options)
    if unusual:
        return unusual
    query, key, value = states[:3]
    size = query.shape[-1]
    checks = (
        (query.dtype not in (torch.bfloat16, torch.float16), f"{query.dtype}"),
        (not query.dtype == key.dtype == value.dtype, "several dtypes"),
        (size != value.shape[-1], f"heads of {size} and {value.shape[-1]}"),
        (_refuses_heads(size), f"heads of {size}"),
    )
    return next((what for holds, what in checks if holds), None)


def _unusual(module: torch.nn.Module, options: dict[str, Any]) -> str | None:
    """Return what a call asks for beyond causal attention within a window, None if nothing."""
    causal = options.get("is_causal")
    checks = (
        (bool(options.get("dropout")), "dropout"),
        *((options.get(name) is not None, name) for name in SDPA_ONLY),
        (not (getattr(module, "is_causal", True) if causal is None else causal), "attention that is not causal"),
    )
    return next((what for holds, what in checks if holds), None)


def _refuses_heads(size: int) -> bool:
    return size > LARGEST_HEAD or size % HEAD_MULTIPLE != 0


@functools.cache
def _say(module: str, problem: str) -> None:
    """Log once why a module does not use the kernel that was chosen."""
    logger.info("%s attends to packs one document at a time: torch's varlen_attn does not take %s", module, problem)


def attend(module: torch.nn.Module, *states: Any, **options: Any) -> tuple[torch.Tensor, None]:
    """Attend within each document of a pack, one document at a time, without a mask over the pack.

    `states` are query, key and value, `[1, heads, positions, width]`, and a mask, which is None. `options` must hold
    `document_lengths`, ints whose sum is the number of positions, and may hold `sliding_window` (positions). Returns
    `[1, positions, heads, width]`, as transformers requires. Uses transformers' sdpa, or on the CPU the kernel that
    sdpa would use there, with faster gradients.
    """
    lengths = [length for length in options.pop("document_lengths") if length]  # the kernels take no empty document
    sliding_window = options.pop("sliding_window", None)
    if flash_cpu.suits(*states[:3]) and _unusual(module, options) is None:
        return flash_cpu.attend(states[:3], lengths, sliding_window, options.get("scaling")), None
    # Split, not sliced: the gradient of each slice would be as large as the whole pack.
    documents = zip(*(torch.split(state, lengths, dim=2) for state in states[:3]), strict=True)
    attended = [
        sdpa_attention_forward(
            module,
            *document,
            flash_cpu.visible_pairs(document[0].shape[2], sliding_window, document[0].device),
            **options,
        )[0]
        for document in documents
    ]
    return torch.cat(attended, dim=1), None


@contextmanager
def without_packs(model: Model) -> Iterator[None]:
    """Use transformers' own sdpa instead of the kernels for packs within the block: generation uses no packs."""
    before = model.config._attn_implementation
    packed = before in (SDPA_VARLEN, TORCH_VARLEN)
    if packed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(before)


# Registered without a mask function, so that transformers builds no mask.
transformers.AttentionInterface.register(SDPA_VARLEN, sequence_parallel.exchanging(attend))
transformers.AttentionInterface.register(TORCH_VARLEN, sequence_parallel.exchanging(attend_at_once))
