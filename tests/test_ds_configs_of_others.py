"""DeepSpeed JSONs that people bring from other programs: each trains, or is refused with what to change.

The settings are those of the files that LLaMA-Factory, axolotl, ms-swift, Transformers' documentation and upstream's
scripts have for ZeRO-3 with offload.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from superoffload import config
from superoffload.ds_config import DsConfig, read_ds_config
from superoffload.errors import UserError
from tests.helpers.ranks import run_ranks

ON_HOST = {"device": "cpu", "pin_memory": True}
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1}  # fmt: skip
BATCH = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
ZERO = {"stage": 3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST, "contiguous_gradients": True,
        "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_gather_16bit_weights_on_model_save": True}  # fmt: skip
BILLION = {"sub_group_size": 1e9, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9}
AUTO_ADAM = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
AUTO_WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}

FILES: dict[str, DsConfig] = {
    "llama-factory": {
        **BATCH, "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "fp16": FP16,
        "bf16": {"enabled": "auto"}, "zero_optimization": {**ZERO, **BILLION, "overlap_comm": False},
    },
    "axolotl": {
        **BATCH, "gradient_clipping": "auto", "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True, "bf16": {"enabled": True}, "wall_clock_breakdown": False,
        "zero_optimization": {**ZERO, "overlap_comm": True, "sub_group_size": 0, "stage3_max_live_parameters": 0,
                              "stage3_max_reuse_distance": 0},
    },
    "transformers": {
        **BATCH, "gradient_clipping": "auto", "fp16": FP16, "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": AUTO_ADAM}, "scheduler": {"type": "WarmupLR", "params": AUTO_WARMUP},
        "zero_optimization": {**ZERO, **BILLION, "overlap_comm": True}, "steps_per_print": 2000,
        "wall_clock_breakdown": False,
    },
    "ms-swift": {
        **BATCH, "gradient_clipping": "auto", "fp16": FP16, "bf16": {"enabled": "auto"}, "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "zero_optimization": {**ZERO, **BILLION, "overlap_comm": False, "zero_quantized_weights": False,
                              "zero_quantized_gradients": False},
    },
    "upstream": {
        "train_batch_size": 1, "gradient_accumulation_steps": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_bucket_size": 4e8, "sub_group_size": 4e8,
                              "offload_optimizer": {**ON_HOST, "ratio": 0.9, "super_offload": True,
                                                    "cpuadam_cores_perc": 0.9}},
        "wall_clock_breakdown": True,
    },
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fp16 beside bf16": ({"fp16": {"enabled": True}}, "bf16 and fp16 are both enabled; enable only one"),
    "a schedule of its own": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {**AUTO_WARMUP, "total_num_steps": 1000}}},
        "use --warmup, a fraction of the steps, and --max_steps",
    ),
    "another optimizer": ({"optimizer": {"type": "Muon", "params": {}}}, "optimizer.type is \"Muon\", must be 'AdamW'"),
    "no offload": ({"zero_optimization": {"stage": 3}}, "offload_optimizer is missing"),
}


def on_host(ds_config: DsConfig, super_offload: bool) -> DsConfig:
    zero = ds_config["zero_optimization"]
    offload = {**zero["offload_optimizer"], "pin_memory": False, "super_offload": super_offload}
    return {**ds_config, "zero_optimization": {**zero, "offload_optimizer": offload}}


def train(model: str, folder: str) -> dict[str, list[float]]:
    """Train two steps with each file in each mode; runs on a rank."""
    from tests.helpers.runs import make_engine, random_steps

    losses = {}
    for name, ds_config in FILES.items():
        for super_offload in (False, True):
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps(on_host(ds_config, super_offload)))
            engine, _, _ = make_engine(model, folder, deepspeed_config=str(path))
            losses[f"{name} {super_offload}"] = random_steps(engine, 2)
            engine.destroy()  # type: ignore[attr-defined]
    return losses


def test_each_trains_in_both_modes_alike(model_folder: Path, tmp_path: Path) -> None:
    (losses,) = run_ranks(1, train, str(model_folder), str(tmp_path))
    assert len(losses) == 2 * len(FILES)
    for name in FILES:
        assert losses[f"{name} True"] == losses[f"{name} False"]
        assert all(map(math.isfinite, losses[f"{name} True"]))


@pytest.mark.unit
@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_train_is_refused_with_what_to_change(what: str, tmp_path: Path) -> None:
    change, words = REFUSED[what]
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**FILES["axolotl"], **change}))
    with pytest.raises(UserError) as raised:
        read_ds_config(config.build({"model_name": "m", "output_dir": "o", "deepspeed_config": str(path)}))
    assert words in str(raised.value) and str(path) in str(raised.value)
