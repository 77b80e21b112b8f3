"""Export ZeRO-3 checkpoints of one rank and two, and load what was exported."""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from superoffload import (
    checkpoint,
    commands,
    config,
    distributed,
    ds_config,
    engine,
    export,
    export_files,
    model,
    rank_files,
)
from superoffload.errors import UserError
from superoffload.metrics import Progress
from superoffload.tokenizer import load_tokenizer
from tests import models
from tests.ranks import run_ranks

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


@dataclass
class Trained:
    """What a run left: its output folder, and the logits and the greedy text of its engine."""

    output_dir: Path
    original: Path
    logits: Any
    text: list[int]


def next_logits(forward: Callable[[Any], Any], tokens: list[int]) -> Any:
    with torch.no_grad():
        return forward(torch.tensor([tokens])).logits[0].detach().clone()


def greedy(forward: Callable[[Any], Any]) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(int(next_logits(forward, tokens)[-1].argmax()))
    return tokens


def train_and_save(folder: str, output_dir: str, exported_by_the_run: bool) -> tuple[Any, list[int]]:
    """Train a few steps, save, and answer with what the engine says; the first rank may export meanwhile."""
    mode = "superoffload" if "moe" in Path(folder).parent.name else "zerooffload"
    values = {"model_name": folder, "output_dir": output_dir, "deepspeed_config": f"configs/{mode}.json", "lr": 5e-3,
              "sub_group_size": 5000, "warmup": 0.0, "lr_scheduler": "constant"}  # fmt: skip
    merged = ds_config.merge(ds_config.read(config.build(values)), config.build(values), distributed.world_size())
    sharded = model.load_model(merged.config.model, model.load_config(folder), merged.document, None)
    wrapped = engine.create(sharded, merged.document, merged.config.training, 10)
    torch.manual_seed(distributed.rank())
    for _ in range(STEPS):
        rows = torch.randint(1, 264, (1, 24))
        wrapped.backward(wrapped(input_ids=rows, labels=rows).loss)
        wrapped.step()
    saved = checkpoint.save(wrapped, load_tokenizer(folder), merged.config, Progress(step=STEPS, tokens=72), {})
    assert not saved.failed, saved.sentence
    wrapped.eval()
    answers = next_logits(wrapped, PROMPT), greedy(wrapped)
    if exported_by_the_run and distributed.speaks():
        export.export(Path(output_dir), Path(output_dir) / "export")
    return answers


def train_several(jobs: list[tuple[str, str, bool]]) -> list[tuple[Any, list[int]]]:
    return [train_and_save(*job) for job in jobs]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Train each kind of model, those of the same number of ranks in one go."""
    root = tmp_path_factory.mktemp("trained")
    runs: dict[str, Trained] = {}
    for ranks in (1, 2):
        names = [name for name, number in RANKS.items() if number == ranks]
        for name in names:
            models.write_model(root / name / "model", **{"kind": name, **KINDS[name]})
        jobs = [(str(root / name / "model"), str(root / name / "out"), name == "llama") for name in names]
        first = run_ranks(ranks, train_several, jobs)[0]
        for name, (logits, text) in zip(names, first, strict=True):
            runs[name] = Trained(root / name / "out", root / name / "model", logits, text)
    return runs


@pytest.fixture
def damaged(trained: dict[str, Trained], tmp_path: Path) -> Iterator[Path]:
    """A copy of the llama's output folder, to be damaged."""
    copy = tmp_path / "out"
    shutil.copytree(trained["llama"].output_dir, copy, ignore=shutil.ignore_patterns("export"))
    yield copy
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "target"}, "something was left behind"


def command(*arguments: str) -> tuple[Any, str]:
    """Run `superoffload` in this process and return its status and what it wrote to stderr."""
    words, before = io.StringIO(), sys.argv
    sys.argv = ["superoffload", *arguments]
    try:
        with contextlib.redirect_stderr(words), pytest.raises(SystemExit) as ended:
            commands.main()
    finally:
        sys.argv = before
    return ended.value.code, words.getvalue()


def load(folder: Path) -> Any:
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report.values()), report
    return loaded.eval()


def weights(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_answers(loaded: Any, run: Trained) -> bool:
    return torch.equal(next_logits(loaded, PROMPT), run.logits) and greedy(loaded) == run.text


@pytest.mark.parametrize("name", KINDS)
def test_what_is_exported_answers_like_the_trained_engine(
    name: str, trained: dict[str, Trained], tmp_path: Path
) -> None:
    run = trained[name]
    export.export(run.output_dir, tmp_path / "target")
    assert same_answers(load(tmp_path / "target"), run)
    original = weights(run.original)
    exported = weights(tmp_path / "target")
    assert {key: value.shape for key, value in exported.items()} == {k: v.shape for k, v in original.items()}
    assert not all(torch.equal(exported[key], original[key].to(exported[key].dtype)) for key in original)  # it learned


def test_the_files_of_an_export(trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained["llama"]
    target = tmp_path / "new" / "target"
    export.export(run.output_dir / f"global_step{STEPS}", target)
    assert set(os.listdir(target)) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert os.listdir(tmp_path / "new") == ["target"]
    described = json.loads((target / "config.json").read_text())
    assert (described["dtype"], described["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert described["use_cache"] is True
    assert transformers.AutoTokenizer.from_pretrained(target).eos_token == "<eos>"
    assert transformers.GenerationConfig.from_pretrained(target).eos_token_id == 0


def test_the_run_itself_exports(trained: dict[str, Trained]) -> None:
    """In the process of the run, where transformers knows of ZeRO-3 and would shard what it builds."""
    run = trained["llama"]
    assert same_answers(load(run.output_dir / "export"), run)


def test_tied_weights_are_there_once(trained: dict[str, Trained], tmp_path: Path) -> None:
    export.export(trained["tied"].output_dir, tmp_path / "target")
    assert "lm_head.weight" not in weights(tmp_path / "target")
    loaded = load(tmp_path / "target")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_experts_are_single_as_on_the_hub_and_buffers_keep_their_values(
    trained: dict[str, Trained], tmp_path: Path
) -> None:
    run = trained["glm4_moe"]
    export.export(run.output_dir, tmp_path / "target")
    exported = weights(tmp_path / "target")
    assert exported["model.layers.1.mlp.experts.3.gate_proj.weight"].shape == (16, 32)
    (state,) = run.output_dir.glob("global_step*/*_model_states.pt")
    buffer = "model.layers.1.mlp.gate.e_score_correction_bias"
    saved = torch.load(state, weights_only=False)["module"][buffer]
    assert exported[buffer].dtype == saved.dtype
    assert torch.equal(exported[buffer], saved)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_shards_with_an_index(name: str, trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained[name]
    export.export(run.output_dir, tmp_path / "one")
    export.export(run.output_dir, tmp_path / "many", max_shard_size="20KB")
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    whole, parts = weights(tmp_path / "one"), weights(tmp_path / "many")
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert same_answers(load(tmp_path / "many"), run)
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert all(size <= 20_000 or len(load_file(file)) == 1 for size, file in zip(sizes, files, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(dtype: str, trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained["llama"]
    status, words = command(
        "export", str(run.output_dir), str(tmp_path / "target"), "--dtype", dtype, "--max_shard_size", "1MB"
    )
    assert status == 0, words
    exported = weights(tmp_path / "target")
    assert {tensor.dtype for tensor in exported.values()} == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "target" / "config.json").read_text())["dtype"] == dtype
    if dtype == "float32":
        masters = torch.load(
            run.output_dir / f"global_step{STEPS}/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False
        )["optimizer_state_dict"]["fp32_flat_groups"]
        first = exported["model.embed_tokens.weight"].flatten()
        assert any(torch.equal(group[:100], first[:100]) for group in masters)
        assert same_answers(load(tmp_path / "target"), run)


def test_the_original_is_not_needed(trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained["qwen3_moe"]
    away = run.original.rename(tmp_path / "away")
    try:
        export.export(run.output_dir, tmp_path / "target")
    finally:
        away.rename(run.original)
    assert same_answers(load(tmp_path / "target"), run)


def test_an_older_checkpoint_takes_what_it_lacks_from_the_original(damaged: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (damaged / name).unlink()
    export.export(damaged, tmp_path / "target")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "target")) == 257
    assert load(tmp_path / "target").config.num_hidden_layers == 2


def test_the_model_card_says_data_settings_and_loss(damaged: Path, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 5.0 - step} for step in range(1, STEPS + 3)]
    (damaged / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"cut sho')
    export.export(damaged, tmp_path / "target")
    card = (tmp_path / "target" / "README.md").read_text()
    assert "datasets:\n- tatsu-lab/alpaca\n" in card
    assert "| lr | 0.005 |" in card
    assert f"| steps | {STEPS} |" in card
    (damaged / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert export_files.reached_loss(damaged, STEPS) == 5.0 - STEPS  # of the checkpoint, not of the run's end
    (damaged / "metrics.jsonl").unlink()
    assert export_files.reached_loss(damaged, STEPS) is None
    (damaged / "summary.json").write_text(json.dumps({"steps": STEPS, "final_loss": 1.25}))
    assert export_files.reached_loss(damaged, STEPS) == 1.25
    assert export_files.reached_loss(damaged, STEPS - 1) is None


def rank_1(folder: Path, kind: str) -> Path:
    (path,) = folder.glob(f"global_step*/*rank_1_*_{kind}_states.pt")
    return path


def cut_short(folder: Path) -> str:
    os.truncate(rank_1(folder, "optim"), rank_1(folder, "optim").stat().st_size // 2)
    return "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt: damaged or cut short"


def description_flipped(folder: Path) -> str:
    path = rank_1(folder, "model")
    content = bytearray(path.read_bytes())
    content[content.index(b"param_shapes")] ^= 1
    path.write_bytes(content)
    return "zero_pp_rank_1_mp_rank_00_model_states.pt: damaged or cut short"


def optimizer_file_missing(folder: Path) -> str:
    rank_1(folder, "optim").unlink()
    return "zero_pp_rank_1_mp_rank_*_optim_states.pt: is missing (the checkpoint is of 2 ranks)"


def model_file_missing(folder: Path) -> str:
    rank_1(folder, "model").unlink()
    return "zero_pp_rank_1_mp_rank_*_model_states.pt: is missing (the checkpoint is of 2 ranks)"


def latest_points_nowhere(folder: Path) -> str:
    (folder / "latest").write_text("global_step99")
    return "latest: names 'global_step99', which is not there"


def latest_is_empty(folder: Path) -> str:
    (folder / "latest").write_text("")
    return "latest: names '', which is not there"


def no_checkpoint(folder: Path) -> str:
    shutil.rmtree(folder / f"global_step{STEPS}")
    (folder / "latest").unlink()
    return "holds no checkpoint; give a run's output folder, or global_stepN in it"


def empty_checkpoint(folder: Path) -> str:
    shutil.rmtree(folder / f"global_step{STEPS}")
    (folder / f"global_step{STEPS}").mkdir()
    return "holds no checkpoint (no file *_model_states.pt)"


def saving_was_cut_off(folder: Path) -> str:
    (folder / f"global_step{STEPS}" / "incomplete").touch()
    return "saving it was cut off; use another checkpoint"


def weight_flipped(folder: Path) -> str:
    path = rank_1(folder, "optim")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "optim_states.pt has another checksum than when it was written; use another checkpoint"


def train_to(folder: Path, value: float) -> None:
    """Make a weight this large, as if training had."""
    path = rank_1(folder, "optim")
    state = torch.load(path, weights_only=False)
    state["optimizer_state_dict"]["fp32_flat_groups"][0].data[7] = value
    torch.save(state, path)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"][path.name] = checkpoint.describe(path)
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def not_a_number(folder: Path) -> str:
    train_to(folder, math.nan)
    return "holds NaN or Inf; the training diverged: export an older checkpoint"


def another_shape(folder: Path) -> str:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "vocab_size": 300}))
    return "has the shape (264, 32), not (300, 32)"


def more_layers(folder: Path) -> str:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 3}))
    return "is of another model than LlamaForCausalLM: it lacks model.layers.2."


def fewer_layers(folder: Path) -> str:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "num_hidden_layers": 1}))
    return "is of another model than LlamaForCausalLM: it has an unknown model.layers.1."


DAMAGES = [
    cut_short, description_flipped, weight_flipped, optimizer_file_missing, model_file_missing, latest_points_nowhere,
    latest_is_empty, no_checkpoint, saving_was_cut_off, empty_checkpoint, not_a_number, another_shape,
    more_layers, fewer_layers,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(
    damage: Callable[[Path], str], damaged: Path, tmp_path: Path
) -> None:
    words = damage(damaged)
    status, err = command("export", str(damaged), str(tmp_path / "target"))
    assert status == 2
    line = err.splitlines()[-1]
    assert line.startswith("Error: ")
    assert words in line
    assert "Traceback" not in err
    assert not (tmp_path / "target").exists()


def test_numbers_too_large_for_float16(damaged: Path, tmp_path: Path) -> None:
    train_to(damaged, 1e6)
    with pytest.raises(UserError, match="too large for float16: use bfloat16"):
        export.export(damaged, tmp_path / "target", "float16")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "int8"}, "--dtype int8: allowed is one of bfloat16, float32, float16"),
        ({"max_shard_size": "much"}, "--max_shard_size much: not a size such as 5GB or 500MB"),
        ({"max_shard_size": "0"}, "--max_shard_size 0: not a size such as 5GB or 500MB"),
    ],
)
def test_options_that_mean_nothing(
    options: dict[str, str], words: str, trained: dict[str, Trained], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        export.export(trained["llama"].output_dir, tmp_path / "target", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_target_in_use_is_left_alone(trained: dict[str, Trained], tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        export.export(trained["llama"].output_dir, tmp_path / "target")
    with pytest.raises(UserError, match=r"thesis\.tex: is a file"):
        export.export(trained["llama"].output_dir, tmp_path / "target" / "thesis.tex")
    assert (tmp_path / "target" / "thesis.tex").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export.export(trained["llama"].output_dir, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_disk_too_small_is_said_before_anything_is_written(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 0\.1 GB and the disk has 0\.0 GB free"):
        export.export(trained["llama"].output_dir, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(
    error: BaseException, trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = export.save_file

    def save_file(*arguments: Any, **more: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        real(*arguments, **more)

    monkeypatch.setattr(export, "save_file", save_file)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        export.export(trained["llama"].output_dir, tmp_path / "target", max_shard_size="20KB")
    assert list(tmp_path.iterdir()) == []


def test_what_reaches_the_disk_is_read_again(
    trained: dict[str, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.save_file

    def lose_one(tensors: dict[str, Any], *arguments: Any, **more: Any) -> None:
        real({name: tensors[name] for name in list(tensors)[1:]}, *arguments, **more)

    monkeypatch.setattr(export, "save_file", lose_one)
    with pytest.raises(UserError, match=r"model\.safetensors: does not hold the tensors that were written"):
        export.export(trained["llama"].output_dir, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_cleared(trained: dict[str, Trained], tmp_path: Path) -> None:
    (tmp_path / ".target.partial").mkdir()
    (tmp_path / ".target.partial" / "model-00001-of-00009.safetensors").write_bytes(b"half")
    export.export(trained["llama"].output_dir, tmp_path / "target")
    assert os.listdir(tmp_path) == ["target"]
    assert not list((tmp_path / "target").glob("model-*"))


def test_each_tensor_can_be_exported_on_its_own(trained: dict[str, Trained]) -> None:
    """What the limit on memory rests on: no group but single tensors, also for fused experts."""
    for run in trained.values():
        held = rank_files.read(run.output_dir)
        empty = export_files.empty_model(held)
        groups = export.plan(empty, export._wanted(empty, held, torch.bfloat16))
        assert all(len(group.sources) == 1 for group in groups)


def test_weights_that_belong_together_are_treated_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose saved form joins two tensors of each layer."""

    def join(model: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        joined = {name: tensor for name, tensor in tensors.items() if ".q" not in name and ".k" not in name}
        for name in [name for name in tensors if name.endswith(".q")]:
            joined[f"{name[:-1]}qk"] = torch.cat([tensors[name], tensors[f"{name[:-1]}k"]])
        return joined

    monkeypatch.setattr(export, "revert_weight_conversion", join)
    names = ["embed.weight", "model.layers.0.q", "model.layers.0.k", "model.layers.10.q", "model.layers.10.k"]
    groups = export.plan(None, {name: torch.empty(2, 3, device="meta") for name in names})
    assert [list(group.sources) for group in groups] == [names[:1], names[1:3], names[3:]]
    assert [list(group.targets) for group in groups] == [
        ["embed.weight"], ["model.layers.0.qk"], ["model.layers.10.qk"],
    ]  # fmt: skip
