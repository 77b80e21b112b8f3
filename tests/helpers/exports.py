"""Train small models, save them, and load what was exported from their checkpoints."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.helpers.runs import make_engine

STEPS = 3
PROMPT = [5, 77, 120, 33, 9, 201]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"kind": "llama", "tie_word_embeddings": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                 "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
}  # fmt: skip
RANKS = {"tied": 1, "glm4_moe": 1, "mixtral": 1, "llama": 2, "qwen3_moe": 2}

Answers = tuple[torch.Tensor, list[int]]
"""Logits `[length, vocabulary]` of the prompt, and the tokens of the greedy answer with the prompt."""


@dataclass
class Trained:
    """A finished run: its output folder, the model it started from, and the answers of its engine."""

    output_dir: Path
    original: Path
    logits: torch.Tensor
    text: list[int]


def next_logits(forward: Callable[..., Any], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = forward(input_ids=torch.tensor([tokens])).logits[0].detach().clone()
    return logits


def greedy(forward: Callable[..., Any]) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(next_logits(forward, tokens)[-1].argmax()))
    return tokens


def train_and_save(folder: str, output_dir: str, exports: bool) -> Answers:
    """Train a few steps, save, and return the engine's answers; with `exports`, rank 0 also exports (collective)."""
    from superoffload import distributed
    from superoffload.checkpoint import save
    from superoffload.export import weights
    from superoffload.training.progress import Progress

    mode = "superoffload" if "moe" in Path(folder).parent.name else "zerooffload"
    values = {"deepspeed_config": f"configs/{mode}.json", "lr": 5e-3, "sub_group_size": 5000, "warmup": 0.0,
              "lr_scheduler": "constant"}  # fmt: skip
    engine, tokenizer, config = make_engine(folder, output_dir, **values)
    torch.manual_seed(distributed.rank())
    for _ in range(STEPS):
        rows = torch.randint(1, 264, (1, 24))
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()
    assert save.save(engine, tokenizer, config, asdict(Progress(step=STEPS, tokens=72)), {}) is not None
    engine.eval()
    answers = next_logits(engine, PROMPT), greedy(engine)
    if exports and distributed.is_rank_0():
        weights.export(Path(output_dir), Path(output_dir) / "export")
    return answers


def train_several(jobs: list[tuple[str, str, bool]]) -> list[Answers]:
    """Train several models, one after the other (collective)."""
    return [train_and_save(*job) for job in jobs]


def load(folder: Path) -> Any:
    """Load an exported model as bfloat16; every tensor must be there, and none may be unknown."""
    import transformers

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    return loaded.eval()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of the weight files in a folder."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_answers(loaded: Any, run: Trained) -> bool:
    """Compare the answers of a loaded model to those of the engine that trained it, bit for bit."""
    return torch.equal(next_logits(loaded, PROMPT), run.logits) and greedy(loaded) == run.text


def rank_1(folder: Path, kind: str) -> Path:
    """Find the file of rank 1: `kind` is `model` or `optim`."""
    (path,) = folder.glob(f"global_step*/*rank_1_*_{kind}_states.pt")
    return path


def set_weight(folder: Path, value: float) -> None:
    """Set one weight of a checkpoint to a value, as if training had."""
    from superoffload.checkpoint import manifest

    path = rank_1(folder, "optim")
    state = torch.load(path, weights_only=False)
    state["optimizer_state_dict"]["fp32_flat_groups"][0].data[7] = value
    torch.save(state, path)
    described = json.loads((path.parent / "manifest.json").read_text())
    described["files"][path.name] = manifest.describe(path)
    (path.parent / "manifest.json").write_text(json.dumps(described))
