"""Compare a model's own norms, SwiGLU and rotary embedding with Liger's and compiled ones, on a CUDA device.

    python tests/benchmarks/kernel_speed.py

Runs some layers of a Llama with random weights forward and backward on packs, once with each kind of kernels, in turn.
Compares the losses and the gradients, and writes times and peak memory to kernel_speed.json. --rehearse runs a small
model on the CPU, with plain functions in place of Liger's kernels; --device cpu measures compiled kernels there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from superoffload import distributed
from superoffload.model import attention, kernels

KINDS = ("none", "liger", "compiled")
DOCUMENT = 170  # tokens
# Bf16 rounds at other places: of the largest element of a gradient, and of the loss.
TOLERANCE, LOSS_TOLERANCE = 5e-2, 2e-3


def make_model(options: argparse.Namespace, kind: str, device: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=7 * options.hidden // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // options.head,
        num_key_value_heads=options.hidden // options.head // 4 or 1,
        vocab_size=4096,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation=attention.SDPA_VARLEN
    ).to(device)
    kernels.use(kind, model)
    return model


def once(model: Any, ids: torch.Tensor, wait: Callable[[], Any]) -> tuple[float, float]:
    """Run forward and backward; return the time and the loss."""
    lengths = [DOCUMENT] * (ids.shape[1] // DOCUMENT)
    lengths.append(ids.shape[1] - sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(ids.device)
    model.zero_grad()
    wait()
    started = time.perf_counter()
    logits = model(input_ids=ids, position_ids=positions, document_lengths=tuple(lengths)).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    wait()
    return time.perf_counter() - started, float(loss.detach())


def measure(options: argparse.Namespace, kinds: tuple[str, ...], device: str) -> dict[str, Any]:
    """Run the kinds in turn; return times, peak memory, and the largest differences from the model's own kernels."""
    wait = torch.cuda.synchronize if device == "cuda" else bool
    generator = torch.Generator().manual_seed(1)
    packs = [torch.randint(4096, (1, options.length - 8 * n), generator=generator).to(device) for n in range(3)]
    models = {kind: make_model(options, kind, device) for kind in kinds}
    first_s, losses, gradients, times_s, peaks = {}, {}, {}, {kind: [] for kind in kinds}, {}  # type: ignore[var-annotated]
    for kind, model in models.items():
        first_s[kind], losses[kind] = once(model, packs[0], wait)
        gradients[kind] = [parameter.grad.float() for parameter in model.parameters()]
        once(model, packs[1], wait)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(model, packs[0], wait)
            peaks[kind] = torch.cuda.max_memory_allocated() - before
    for number in range(options.rounds):
        for kind, model in models.items():
            times_s[kind].append(once(model, packs[number % 3], wait)[0])
    own = gradients["none"]
    distances = {
        kind: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients[kind], own, strict=True))
        for kind in kinds
    }
    return {
        "first_s": first_s,
        "losses": losses,
        "gradient_distances": distances,
        "times_s": {kind: statistics.median(values) for kind, values in times_s.items()},
        "ratios": {
            kind: statistics.median(ours / base for ours, base in zip(values, times_s["none"], strict=True))
            for kind, values in times_s.items()
        },
        "peak_bytes": peaks,
    }


def main() -> None:
    """Compare, measure and write the results; exit with status 1 if the kernels differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--head", type=int, default=128, help="width of a head")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=8192, help="tokens of a pack")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--rehearse", action="store_true", help="run without a device")
    options = parser.parse_args()
    kinds: tuple[str, ...] = KINDS
    device = "cpu" if options.rehearse else options.device
    if options.rehearse:
        plain = kernels.Kernels(kernels.rms_norm, kernels.swiglu, kernels.rotate)
        kernels.liger = lambda: plain
        kernels._liger_is_missing = lambda: None
    elif device == "cpu":
        kinds = ("none", "compiled")
    elif not torch.cuda.is_available():
        sys.exit("kernel_speed.py needs a CUDA device")
    distributed.init()
    found = measure(options, kinds, device)
    distributed.close()
    found |= {"tolerance": TOLERANCE, "hidden": options.hidden, "layers": options.layers, "length": options.length}
    found["torch"] = torch.__version__
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    (options.results / "kernel_speed.json").write_text(text + "\n", encoding="utf-8")
    print(text)
    own = found["losses"]["none"]
    losses_differ = any(not abs(loss - own) <= LOSS_TOLERANCE * own for loss in found["losses"].values())
    if losses_differ or not max(found["gradient_distances"].values()) <= TOLERANCE:
        sys.exit("the kernels differ from the model's own")


if __name__ == "__main__":
    main()
