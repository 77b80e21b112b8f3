"""Compiled kernels, also in whole runs under ZeRO-3, and Liger's own kernels in Triton's interpreter."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from superoffload import distributed
from superoffload.model import kernels
from tests.helpers.forked import launch
from tests.helpers.packs import tiny
from tests.helpers.ranks import REPOSITORY, run
from tests.helpers.runs import logged
from tests.model.test_kernels import gradients, said

LOSS_NOISE = 5e-3  # of bf16, relative


def train(model: Path, rows: Path, out: Path, *flags: str, ranks: int = 1) -> tuple[list[dict[str, Any]], str]:
    """Take four steps on packs, with held-out loss, a sample and a checkpoint; return what was logged."""
    prompts = out.parent / "prompts.txt"
    prompts.write_text("Count on: 7\n", encoding="utf-8")
    done = launch(
        ranks, "--model_name", str(model), "--dataset_name", str(rows), "--output_dir", str(out), "--max_length", "64",
        "--max_steps", "4", "--lr", "1e-3", "--save_steps", "2", "--log_interval", "1", "--eval_percentage", "10",
        "--sample_prompts", str(prompts), "--activation_checkpointing", "--save_checkpoint", "--export", *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return logged(out), done.stderr


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def test_compiled_functions(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """They take rows of any length in one graph each. A backend without a compiler takes the place of the real one."""
    monkeypatch.setattr(distributed, "all_ranks_ok", lambda ok: ok)
    graphs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: compile_with(function, backend=backend, **options)
    )
    torch._dynamo.reset()
    plain, model = tiny("llama", "eager"), tiny("llama", "eager")
    with caplog.at_level("INFO", "superoffload"):
        kernels.use("compiled", model)
    assert said(caplog) == ["Kernels: compiled, in 2 LlamaAttention, 2 LlamaMLP, 5 LlamaRMSNorm"]
    torch.testing.assert_close(gradients(model, recompute=True), gradients(plain), atol=1e-5, rtol=1e-4)
    counts = []
    for length in (5, 9, 14):  # the first without positions: cosines of one row for all rows
        model(input_ids=torch.zeros(2, length, dtype=torch.int64))
        counts.append(len(graphs))
    assert counts[0] == counts[1] == counts[2] >= 3


@pytest.mark.slow  # each rank compiles
def test_compiled_kernels_on_two_ranks(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    """They give the losses of the model's own; a resumed run equals the whole one, and the export has its names."""
    from safetensors import safe_open

    names = {}
    found = {}
    for kind in ("none", "compiled"):
        found[kind], text = train(model_folder, rows_file, tmp_path / kind, "--kernels", kind, ranks=2)
        assert ("Kernels: compiled, in 2 LlamaAttention, 2 LlamaMLP, 5 LlamaRMSNorm" in text) == (kind == "compiled")
        assert "Sample | " in text
        with safe_open(tmp_path / kind / "model_step4" / "model.safetensors", "pt") as file:
            names[kind] = {name: file.get_slice(name).get_shape() for name in file.keys()}
    assert names["none"] == names["compiled"]
    assert losses(found["compiled"]) == pytest.approx(losses(found["none"]), rel=LOSS_NOISE)
    assert losses(found["compiled"]) != losses(found["none"])  # they round at other places
    middle = ("--kernels", "compiled", "--resume", str(tmp_path / "compiled" / "global_step2"))
    resumed, _ = train(model_folder, rows_file, tmp_path / "resumed", *middle, ranks=2)
    assert losses(resumed) == losses(found["compiled"])[2:]


@pytest.mark.slow
def test_compiled_kernels_in_the_other_mode(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    flags = ("--deepspeed_config", str(REPOSITORY / "configs" / "zerooffload.json"), "--offload_params")
    found = [
        losses(train(model_folder, rows_file, tmp_path / kind, "--kernels", kind, *flags)[0])
        for kind in ("none", "compiled")
    ]
    assert found[1] == pytest.approx(found[0], rel=LOSS_NOISE) and found[1] != found[0]


@pytest.mark.skipif(not (find_spec("liger_kernel") and find_spec("triton")), reason="liger-kernel is not installed")
def test_the_kernels_of_liger_give_the_numbers_of_transformers() -> None:
    done = run([sys.executable, "-m", "tests.helpers.liger_interpreted", "llama", "qwen3", "gpt_oss"])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for kind, problems in found.items():
        good = {name for name, problem in problems.items() if problem is None}
        served = {"gpt_oss": {"GptOssRMSNorm"}}.get(kind, set(problems))
        assert good == served, found
