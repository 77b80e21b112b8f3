"""The DeepSpeed JSON, merged with the flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from superoffload import config
from superoffload.ds_config import (
    BF16_STATE_KEYS,
    REPOSITORY,
    DsConfig,
    dtype_name,
    has_bf16_state,
    merge_flags,
    read_ds_config,
    with_offload_ratio,
)
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


def test_ranks_that_share_rows_count_as_one() -> None:
    merged = merge_flags(upstream(8), make_config({"sequence_parallel_size": 2}), 4)
    assert merged.config.training.batch_size == 4
    # DeepSpeed counts ranks, and knows of no other.
    assert merged.ds_config["train_micro_batch_size_per_gpu"] == 4
    assert merged.ds_config["train_batch_size"] == 16
    with pytest.raises(UserError, match="^--sequence_parallel_size 4: 6 ranks cannot be divided into groups of 4$"):
        merge_flags(zero3(), make_config({"sequence_parallel_size": 4}), 6)


def test_a_ratio_of_auto_is_open_until_it_is_known() -> None:
    merged = merge_flags(zero3(), make_config({"offload_ratio": "auto"}), 1)
    assert merged.config.offload.offload_ratio == "auto"
    assert merged.ds_config["zero_optimization"]["offload_optimizer"]["ratio"] == 1.0
    known = with_offload_ratio(merged, 0.75)
    assert known.config.offload.offload_ratio == 0.75
    assert known.ds_config["zero_optimization"]["offload_optimizer"]["ratio"] == 0.75
    assert merged.ds_config["zero_optimization"]["offload_optimizer"]["ratio"] == 1.0
    with pytest.raises(UserError, match="--offload_ratio auto contradicts offload_optimizer.ratio 0.8"):
        merge_flags(upstream(4), make_config({"offload_ratio": "auto"}), 1)


def test_the_file_overrides_a_default() -> None:
    made = zero3(gradient_clipping=0.3, train_micro_batch_size_per_gpu=5, gradient_accumulation_steps=7)
    adam = {"lr": 3e-4, "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6}
    made["optimizer"] = {"type": "AdamW", "params": adam}
    made["scheduler"] = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto"}}
    merged = merge_flags(made, make_config(), 1)
    training = merged.config.training
    assert (training.max_grad_norm, training.batch_size, training.gradient_accumulation_steps) == (0.3, 5, 7)
    assert (training.lr, training.weight_decay, training.lr_scheduler) == (3e-4, 0.1, "linear")
    assert (training.adam_beta1, training.adam_beta2, training.adam_epsilon) == (0.8, 0.95, 1e-6)
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
        ({"gradient_clipping": -1}, {}, "gradient_clipping is -1, must be 0 <= value"),
        (
            {"optimizer": {"params": {"betas": [0.9, 1]}}},
            {},
            "optimizer.params.betas[1] is 1, must be 0 <= value < 1",
        ),
        (
            {"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"params": {"warmup_max_lr": 1e-4}}},
            {},
            "optimizer.params.lr is 0.001, but scheduler.params.warmup_max_lr 0.0001; remove one",
        ),
    ],
)
def test_a_contradiction_names_both(top: dict[str, Any], flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        merge_flags(zero3(**top), make_config(flags), 1)
    assert words in str(raised.value)


MASTERS, STATES = BF16_STATE_KEYS


@pytest.mark.parametrize(("state", "low"), [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("given", [{}, {MASTERS: "auto", STATES: "auto"}])
def test_the_flag_sets_the_precision_of_the_optimizer(state: str, low: bool, given: dict[str, Any]) -> None:
    merged = merge_flags(zero3(bf16={"enabled": True, **given}), make_config({"optimizer_state": state}), 1)
    assert merged.ds_config["bf16"] == {"enabled": True, **({MASTERS: True, STATES: True} if low else {})}
    assert has_bf16_state(merged.ds_config) is low
    assert merged.config.offload.optimizer_state == state
    assert any("at --lr 1e-05 perhaps most of them" in note for note in merged.notes) is low


def test_the_file_sets_the_precision_of_the_optimizer() -> None:
    both = zero3(bf16={"enabled": True, MASTERS: True, STATES: True})
    assert merge_flags(both, make_config(), 1).config.offload.optimizer_state == "bf16"
    neither = zero3(bf16={"enabled": True, STATES: False})
    for file, flag in ((both, "fp32"), (neither, "bf16")):
        with pytest.raises(UserError, match=f"--optimizer_state {flag} contradicts bf16"):
            merge_flags(file, make_config({"optimizer_state": flag}), 1)


@pytest.mark.parametrize("half", [{MASTERS: True}, {STATES: True}, {MASTERS: True, STATES: False}])
def test_half_of_the_state_in_bf16_is_refused(half: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"must be equal; remove both and use --optimizer_state"):
        merge_flags(zero3(bf16={"enabled": True, **half}), make_config(), 1)


@pytest.mark.parametrize("kinds", [{"bf16": {"enabled": False}}, {"bf16": {}, "fp16": {"enabled": True}}])
def test_bf16_state_needs_bf16_weights(kinds: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--optimizer_state bf16: needs weights in bf16; enable bf16 in"):
        merge_flags(zero3(**kinds), make_config({"optimizer_state": "bf16"}), 1)
    merged = merge_flags(zero3(**kinds), make_config(), 1)
    assert not has_bf16_state(merged.ds_config)


def test_weights_on_the_host() -> None:
    made = zero3({"pin_memory": True})
    assert "offload_param" not in merge_flags(made, make_config(), 1).ds_config["zero_optimization"]
    for section in (None, {"device": "auto"}):
        made["zero_optimization"]["offload_param"] = section
        merged = merge_flags(made, make_config({"offload_params": True}), 1)
        assert merged.ds_config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    for device in ("cpu", "nvme"):
        offloaded = {"device": device, "pin_memory": False}
        made["zero_optimization"]["offload_param"] = offloaded
        merged = merge_flags(made, make_config(), 1)
        assert merged.ds_config["zero_optimization"]["offload_param"] == offloaded
        assert merged.config.offload.offload_params is True
    made["zero_optimization"]["offload_param"] = {"device": "none"}
    with pytest.raises(UserError, match="--offload_params True contradicts offload_param.device none"):
        merge_flags(made, make_config({"offload_params": True}), 1)


def test_a_batch_that_cannot_be_divided_among_the_ranks() -> None:
    with pytest.raises(UserError, match="train_batch_size 4 .* cannot be divided among 3 ranks"):
        merge_flags(zero3(train_batch_size=4), make_config(), 3)
    with pytest.raises(UserError, match="do not match 2 ranks"):
        merge_flags(zero3(train_batch_size=8, train_micro_batch_size_per_gpu=2), make_config(), 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "the file is [], must be an object in braces"),
        ("{}", "zero_optimization is missing"),
        (json.dumps({"zero_optimization": {"stage": 2}}), "zero_optimization.stage is 2, must be 3"),
        (json.dumps({"zero_optimization": {"stage": 3}}), "zero_optimization.offload_optimizer is missing"),
        (json.dumps(zero3({"device": "none"})), "offload_optimizer.device is \"none\", must be 'cpu' or 'nvme'"),
        (json.dumps(zero3(bf16=True)), "bf16 is true, must be an object in braces"),
        (json.dumps(zero3(optimizer=None)), "optimizer is null, must be an object in braces"),
        (json.dumps(zero3(scheduler=[1])), "scheduler is [1], must be an object in braces"),
        (json.dumps(zero3(bf16={"enabled": 1})), 'bf16.enabled is 1, must be true, false or "auto"'),
        (json.dumps(zero3(train_batch_size="8")), 'train_batch_size is "8", must be a whole number or "auto"'),
        (json.dumps(zero3(gradient_accumulation_steps=2.5)), "gradient_accumulation_steps is 2.5, must be a whole"),
        (json.dumps(zero3(gradient_clipping="big")), 'gradient_clipping is "big", must be a number or "auto"'),
        (json.dumps(zero3(optimizer={"params": {"adam_w_mode": False}})), "adam_w_mode is false, must be True or"),
        (json.dumps(zero3(optimizer={"params": {"bias_correction": False}})), "bias_correction is false, must be True"),
        (json.dumps(zero3(optimizer={"params": {"momentum": 0.9}})), "params.momentum is not followed by this program"),
        (json.dumps(zero3(optimizer={"params": {"betas": 0.9}})), "betas is 0.9, must be two numbers in brackets"),
        (json.dumps(zero3(scheduler={"params": {"warmup_min_lr": 1e-6}})), "warmup_min_lr is 1e-06, must be 0 or"),
        (json.dumps(zero3(scheduler={"params": {"total_num_steps": 9}})), 'total_num_steps is 9, must be "auto"'),
        (json.dumps(zero3(aio=[])), "aio is [], must be an object in braces"),
        (json.dumps(zero3(timers=None)), "timers is null, must be an object in braces"),
        (json.dumps(zero3(wall_clock_breakdown="yes")), 'wall_clock_breakdown is "yes", must be true, false or "auto"'),
        (json.dumps(zero3(train_batch_size=float("inf"))), "train_batch_size is Infinity, must be a whole number"),
        (json.dumps(zero3(train_batch_size=float("nan"))), "train_batch_size is NaN, must be a whole number"),
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


def test_a_sub_group_size_of_0_is_deepspeeds_default() -> None:
    made = zero3()
    made["zero_optimization"]["sub_group_size"] = 0
    merged = merge_flags(made, make_config(), 1)
    assert merged.ds_config["zero_optimization"]["sub_group_size"] == 1_000_000_000
    (note,) = merged.notes
    assert note.startswith("zero_optimization.sub_group_size is 0 in configs/superoffload.json: DeepSpeed's default of")
    flag = merge_flags(made, make_config({"sub_group_size": 5000}), 1)
    assert flag.ds_config["zero_optimization"]["sub_group_size"] == 5000


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
