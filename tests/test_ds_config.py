"""The DeepSpeed JSON, merged with the flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from superoffload import config
from superoffload.ds_config import REPOSITORY, DsConfig, dtype_name, merge_flags, read_ds_config
from superoffload.errors import UserError

pytestmark = pytest.mark.unit

SHIPPED = sorted((REPOSITORY / "configs").glob("*.json"))


def make_config(explicit: dict[str, Any] | None = None, **values: Any) -> config.Config:
    explicit = explicit or {}
    return config.build({"model_name": "m", "output_dir": "o", **values, **explicit}, frozenset(explicit))


def zero3(offload: dict[str, Any] | None = None, **top: Any) -> DsConfig:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu", **(offload or {})}}
    return {"bf16": {"enabled": True}, "zero_optimization": zero, **top}


def upstream(batch_size: int) -> DsConfig:
    """What an upstream launch script writes in superoffload mode."""
    made = zero3({"pin_memory": True, "ratio": 0.8, "super_offload": True, "cpuadam_cores_perc": 0.9})
    made["zero_optimization"].update(overlap_comm=False, reduce_bucket_size=4e8, sub_group_size=4e8)
    return {**made, "train_batch_size": batch_size, "gradient_accumulation_steps": 1, "wall_clock_breakdown": True}


def read(tmp_path: Path, text: str) -> DsConfig:
    path = tmp_path / "ds.json"
    path.write_text(text)
    return read_ds_config(make_config({"deepspeed_config": str(path)}))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_leave_what_is_trained_to_the_flags(path: Path) -> None:
    chosen = make_config(
        batch_size=3, gradient_accumulation_steps=2, max_grad_norm=0.5, sub_group_size=1000, offload_ratio=0.7
    )
    merged = merge_flags(json.loads(path.read_text()), chosen, 2).ds_config
    assert merged["train_batch_size"] == 12
    assert merged["train_micro_batch_size_per_gpu"] == 3
    assert merged["gradient_accumulation_steps"] == 2
    assert merged["gradient_clipping"] == 0.5
    zero = merged["zero_optimization"]
    assert zero["sub_group_size"] == zero["reduce_bucket_size"] == 1000
    assert zero["offload_optimizer"]["ratio"] == 0.7
    assert zero["offload_optimizer"].get("super_offload", False) is (path.stem == "superoffload")
    assert "auto" not in json.dumps(merged)


def test_the_default_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_ds_config(make_config())["zero_optimization"]["offload_optimizer"]["super_offload"] is True


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_files_of_upstream_decide(ranks: int) -> None:
    merged = merge_flags(upstream(4), make_config({"batch_size": 4, "lr": 1e-5}), ranks)
    assert merged.ds_config["train_micro_batch_size_per_gpu"] == 4 // ranks
    assert merged.ds_config["train_batch_size"] == 4
    assert merged.config.training.batch_size == 4 // ranks
    assert merged.config.offload.offload_ratio == 0.8
    assert (ranks > 1) == any("batch of the whole job" in note for note in merged.notes)


def test_the_file_overrides_a_default() -> None:
    made = zero3(gradient_clipping=0.3, train_micro_batch_size_per_gpu=5, gradient_accumulation_steps=7)
    made["optimizer"] = {"type": "AdamW", "params": {"lr": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.999]}}
    made["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}}
    merged = merge_flags(made, make_config(), 1)
    training = merged.config.training
    assert (training.max_grad_norm, training.batch_size, training.gradient_accumulation_steps) == (0.3, 5, 7)
    assert (training.lr, training.weight_decay, training.lr_scheduler) == (3e-4, 0.1, "linear")
    assert "optimizer" not in merged.ds_config
    assert "scheduler" not in merged.ds_config


def test_equal_values_are_accepted_and_the_input_is_unchanged() -> None:
    made = zero3(gradient_clipping=1.0)
    before = json.dumps(made)
    merge_flags(made, make_config({"max_grad_norm": 1.0}), 1)
    assert json.dumps(made) == before


@pytest.mark.parametrize(
    ("top", "flags", "words"),
    [
        ({"gradient_clipping": 0.5}, {"max_grad_norm": 1.0}, "--max_grad_norm 1.0 contradicts gradient_clipping 0.5"),
        ({"train_micro_batch_size_per_gpu": 2}, {"batch_size": 4}, "--batch_size 4 contradicts"),
        ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps": 3}, "--gradient_accumulation_steps 3"),
        ({"train_batch_size": 9}, {"batch_size": 2}, "--batch_size 2 contradicts train_batch_size 9"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, {"lr": 1e-5}, "--lr 1e-05 contradicts optimizer.params.lr 0.001"),
        ({"scheduler": {"type": "WarmupLR"}}, {"lr_scheduler": "cosine"}, "--lr_scheduler cosine contradicts"),
        ({"gradient_clipping": "big"}, {}, "gradient_clipping is 'big', not a number"),
    ],
)
def test_a_contradiction_names_both(top: dict[str, Any], flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        merge_flags(zero3(**top), make_config(flags), 1)
    assert words in str(raised.value)


def test_a_batch_that_cannot_be_divided_among_the_ranks() -> None:
    with pytest.raises(UserError, match="train_batch_size 4 .* cannot be divided among 3 ranks"):
        merge_flags(zero3(train_batch_size=4), make_config(), 3)
    with pytest.raises(UserError, match="do not match 2 ranks"):
        merge_flags(zero3(train_batch_size=8, train_micro_batch_size_per_gpu=2), make_config(), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "stage is None, must be 3"),
        (json.dumps({"zero_optimization": {"stage": 2}}), "stage is 2, must be 3"),
        (json.dumps({"zero_optimization": {"stage": 3}}), "offload_optimizer.device is None"),
        (json.dumps(zero3(fp16={"enabled": True})), "bf16 and fp16 are both enabled"),
        (json.dumps(zero3(optimizer={"type": "Lion"})), "Lion"),
        (json.dumps(zero3(scheduler={"type": "OneCycle"})), "OneCycle"),
        (json.dumps(zero3(scheduler={"params": {"warmup_num_steps": 5}})), "use --warmup"),
    ],
)
def test_the_error_says_why_a_file_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, text)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_ds_config(make_config({"deepspeed_config": str(tmp_path / "none.json")}))


def test_dtype_follows_the_file() -> None:
    assert dtype_name(zero3()) == "bfloat16"
    assert dtype_name({**zero3(), "bf16": {"enabled": False}, "fp16": {"enabled": True}}) == "float16"
    assert dtype_name({**zero3(), "bf16": {"enabled": False}}) == "float32"
    merged = merge_flags(zero3(bf16={"enabled": "auto"}), make_config(), 1)
    assert merged.ds_config["bf16"]["enabled"] is True


def test_deepspeed_does_not_measure_throughput_unless_asked_to() -> None:
    """Its timer waits for the whole device twice in every step, which ends the overlap of copies."""
    off, on = {"throughput": {"enabled": False}}, {"throughput": {"enabled": True}}
    assert merge_flags(zero3(), make_config(), 1).ds_config["timers"] == off
    assert merge_flags(zero3(timers=on), make_config(), 1).ds_config["timers"] == on
