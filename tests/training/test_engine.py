"""The optimizer and its schedule, and the training loop around the engine."""

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

import finetune_zero3
from superoffload import config, distributed
from superoffload.data import collate, loader
from superoffload.ds_config import DsConfig, merge_flags
from superoffload.errors import UserError
from superoffload.model import isolation, load, loss_kernel
from superoffload.model.flops import shape_of
from superoffload.model.parameter_groups import parameter_groups
from superoffload.model.tokenizer import load_tokenizer
from superoffload.training import engine, metrics, schedule, tracking
from superoffload.training.evaluation import Evaluation
from superoffload.training.progress import Progress
from superoffload.training.run import Run
from superoffload.training.run_control import RunControl
from tests.helpers.families import FAMILIES
from tests.helpers.models import make_model, write_model, write_rows
from tests.helpers.ranks import run_ranks
from tests.helpers.training import FP32


class Recorder:
    """A tracker that keeps what it receives."""

    run_id = None

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, step: int, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def attach(self, path: Path) -> None:
        pass

    def finish(self) -> None:
        pass


def train(values: dict[str, Any], ds_config: DsConfig = FP32) -> tuple[Any, list[dict[str, Any]]]:
    """Run `finetune_zero3.train` on a small model, and return the engine and what was logged."""
    values = {"output_dir": "unused", "max_length": 128, "lr": 1e-3, **values}
    merged = merge_flags(ds_config, config.build(values), distributed.world_size())
    chosen = merged.config
    distributed.seed_everything(chosen.training.seed, deterministic=False)
    tokenizer = load_tokenizer(chosen.model.model_name)
    rows, _ = loader.load(tokenizer, chosen.data, chosen.training.seed)
    layout = collate.choose_layout(chosen.data, tokenizer.pad_token_id, False)
    ranks = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batches = loader.Batches(rows, layout, chosen.training, **ranks)
    model = load.load_model(chosen.model, load.load_architecture(chosen.model), merged.ds_config, None)
    shape = shape_of(model)
    model_engine = engine.create(model, merged.ds_config, chosen, batches.total_steps)
    isolation.check(model_engine, layout)
    recorder = Recorder()
    finetune_zero3.train(
        Run(
            config=chosen,
            engine=model_engine,
            loss=loss_kernel.choose(chosen.model.loss_kernel, model_engine, layout),
            tokenizer=tokenizer,
            batches=batches,
            progress=Progress(),
            meter=metrics.Meter(chosen, shape),
            trackers=tracking.Trackers({"recorder": recorder}),
            evaluation=Evaluation(None, loader.Prompts(), 0),
            control=RunControl(chosen, is_rank_0=True),
        )
    )
    return model_engine, recorder.logged


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimization": {"stage3_prefetch_bucket_size": "abc"}}, "stage3_prefetch_bucket_size is 'abc': Input"),
        ({"zero_optimization": {"prefetch": 5}}, "prefetch is 5: Extra inputs are not permitted .DeepSpeedZeroConfig."),
        ({"zero_optimization": {"reduce_bucket_size": -5}}, "reduce_bucket_size is -5: Input should be greater than"),
        ({"fp16": {"enabled": True, "loss_scale": "x"}, "bf16": {"enabled": False}}, "loss_scale is 'x': Value error"),
        ({"communication_data_type": "x"}, "DeepSpeed does not accept it: .*x"),
    ],
)
def test_what_deepspeed_does_not_accept_is_named_before_the_model_is_loaded(
    change: dict[str, Any], words: str, one_rank: None
) -> None:
    chosen = config.build({"model_name": "m", "output_dir": "unused"})
    merged = merge_flags(FP32, chosen, 1).ds_config
    engine.check(merged, "file.json")
    for section, values in change.items():
        merged[section] = {**merged.get(section, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(UserError, match=f"--deepspeed_config file.json: {words}") as caught:
        engine.check(merged, "file.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_device_lacks_is_named_before_the_model_is_loaded(
    precision: str, monkeypatch: pytest.MonkeyPatch, one_rank: None
) -> None:
    merged = merge_flags(FP32, config.build({"model_name": "m", "output_dir": "unused"}), 1).ds_config
    merged = {**merged, "bf16": {"enabled": False}, precision: {"enabled": True}}
    for supported in (True, False):
        monkeypatch.setattr(get_accelerator(), f"is_{precision}_supported", lambda found=supported: found)
        with nullcontext() if supported else pytest.raises(UserError, match=f"enables {precision}, which this device"):
            engine.check(merged, "file.json")


@pytest.mark.unit
def test_norms_and_biases_take_no_decay() -> None:
    qwen = make_model("qwen2", "float32")  # has biases
    decayed, plain = parameter_groups(qwen, 0.1)
    names = {id(parameter): name for name, parameter in qwen.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() == 2 for p in decayed["params"])
    assert {names[id(p)].rsplit(".", 1)[-1] for p in plain["params"]} == {"weight", "bias"}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@pytest.mark.unit
def test_biases_of_experts_take_no_decay() -> None:
    experts = make_model("gpt_oss", "float32", num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    _, plain = parameter_groups(experts, 0.1)
    names = {id(parameter): name for name, parameter in experts.named_parameters()}
    assert any(names[id(p)].endswith("gate_up_proj_bias") for p in plain["params"])


def gradients(values: dict[str, Any], ds_config: DsConfig = FP32) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the gradient of one step, which is ten times Adam's first moment after that step, and the log."""
    from deepspeed.utils import safe_get_full_optimizer_state

    model_engine, logged = train({**values, "max_steps": 1, "max_grad_norm": 0}, ds_config)
    moments = {
        name: safe_get_full_optimizer_state(parameter, "exp_avg").clone() * 10
        for name, parameter in model_engine.module.named_parameters()
        if parameter.requires_grad
    }
    return moments, logged[0]


def test_accumulation_and_ranks_do_not_change_the_gradient(model_folder: Path, rows_file: Path) -> None:
    data = {"model_name": str(model_folder), "dataset_name": str(rows_file)}
    whole, logged = run_ranks(1, gradients, {**data, "batch_size": 8})[0]
    split, logged_split = run_ranks(1, gradients, {**data, "batch_size": 2, "gradient_accumulation_steps": 4})[0]
    shared = run_ranks(2, gradients, {**data, "batch_size": 2, "gradient_accumulation_steps": 2})
    assert sum(float(gradient.abs().sum()) for gradient in whole.values()) > 1
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6)
        for moments, _ in shared:
            torch.testing.assert_close(moments[name], gradient, rtol=1e-4, atol=1e-6)
    for other in (logged_split, shared[0][1], shared[1][1]):
        assert other["loss"] == pytest.approx(logged["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)


MLPS_ALONE = ("embed_tokens", "self_attn", "norm", "lm_head")
TILED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, recomputed": {"activation_checkpointing": True},
    "llama, MLPs alone": {"freeze": MLPS_ALONE},  # the input of the first MLP needs no gradient
    "qwen3_moe": {},
    "qwen3_moe, blocks alone": {"freeze": MLPS_ALONE},
    "gemma3_text, recomputed": {"activation_checkpointing": True},
}
"""The kinds of models to train with the MLP in tiles, and what else is set."""


def tiled_gradients(folder: str, names: Sequence[str], values: dict[str, Any]) -> dict[str, Any]:
    """Return the gradients of each case: MLPs untiled, tiled, tiled in the mode superoffload; and what was gathered.

    The latter is how often ZeRO-3 fetched the parameters of a module in the last of them, by its class and direction.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    fetched: Counter[str] = Counter()
    before = PartitionedParameterCoordinator.fetch_sub_module

    def fetch(self: Any, module: Any, forward: bool) -> Any:
        fetched[f"{type(module).__name__} {'forward' if forward else 'backward'}"] += 1
        return before(self, module, forward)

    PartitionedParameterCoordinator.fetch_sub_module = fetch
    zero = copy.deepcopy(FP32)
    zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    ours = copy.deepcopy(zero)
    ours["zero_optimization"]["offload_optimizer"]["super_offload"] = True
    found: dict[str, Any] = {}
    for name in names:
        changes = {**values, **TILED[name], "model_name": f"{folder}/{name.split(',')[0]}"}
        runs = []
        for tiles, ds_config in ((0, zero), (5, zero), (5, ours)):
            fetched.clear()
            runs.append(gradients({**changes, "tiled_mlp": tiles}, ds_config))
        found[name] = (runs, dict(fetched))
    return found


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, ["llama, recomputed", "qwen3_moe, blocks alone"]),
        pytest.param(1, list(TILED), marks=pytest.mark.slow),
        pytest.param(2, list(TILED), marks=pytest.mark.slow),
    ],
    ids=["2 ranks", "1 rank, all", "2 ranks, all"],
)
def test_tiled_mlps_have_the_gradients_of_untiled_ones(
    ranks: int, names: list[str], tmp_path: Path, rows_file: Path
) -> None:
    for kind in {name.split(",")[0] for name in names}:
        write_model(tmp_path / kind, kind, "float32", **FAMILIES[kind])
    values = {"dataset_name": str(rows_file), "batch_size": 2, "gradient_accumulation_steps": 2, "loss_kernel": "plain"}
    for found in run_ranks(ranks, tiled_gradients, str(tmp_path), names, values, timeout_s=230):
        for name in names:
            ((expected, logged), *tiled), fetched = found[name]
            assert sum(float(gradient.abs().sum()) for gradient in expected.values()) > 0.1
            for moments, log in tiled:
                torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-6)
                assert log["loss"] == pytest.approx(logged["loss"], rel=1e-5)
                assert log["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)
            # Two layers, two micro-batches, each layer once; none of the products in an MLP has parameters of its own.
            (mlp,) = (key for key in fetched if key.endswith(("MLP backward", "SparseMoeBlock backward")))
            assert fetched[mlp] == 4
            assert fetched["Linear backward"] <= 2 * (2 * 4 + 1)


def learning_rates(values: dict[str, Any], ds_config: DsConfig) -> tuple[list[float], list[list[float]]]:
    """Train, and return the logged learning rates, one per step, and those of every call of an optimizer's step."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    used: list[list[float]] = []
    step = DeepSpeedCPUAdam.step

    def watched(self: Any, closure: Any = None) -> Any:
        used.append([float(group["lr"]) for group in self.param_groups])
        return step(self, closure)

    on_device: list[list[float]] = []
    device_step = torch.optim.AdamW.step

    def watched_on_device(self: Any, closure: Any = None) -> Any:
        result = device_step(self, closure)
        on_device.append([float(group["lr"]) for group in self.param_groups])
        return result

    DeepSpeedCPUAdam.step = watched
    torch.optim.AdamW.step = watched_on_device  # type: ignore[method-assign]
    _, logged = train(values, ds_config)
    return [line["lr"] for line in logged], used + on_device


SLOW_KINDS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("linear", "constant")]


@pytest.mark.parametrize("kind", ["cosine", *SLOW_KINDS])
def test_the_optimizer_steps_with_the_schedule(kind: str, model_folder: Path, rows_file: Path) -> None:
    values = {"model_name": str(model_folder), "dataset_name": str(rows_file), "batch_size": 4, "lr_scheduler": kind,
              "warmup": 0.3, "lr": 2e-3}  # fmt: skip
    ((logged, used),) = run_ranks(1, learning_rates, values, FP32)
    expected = [2e-3 * schedule.Schedule(kind=kind, warmup=3, total=10).factor(step) for step in range(10)]
    assert logged == pytest.approx(expected)
    per_step = len(used) // 10
    assert per_step >= 2  # one call per sub-group: decayed and not
    for step, lr in enumerate(expected):
        for groups in used[step * per_step : (step + 1) * per_step]:
            assert groups == pytest.approx([lr, lr])


def test_the_device_share_follows_the_schedule(model_folder: Path, rows_file: Path) -> None:
    ds_config = copy.deepcopy(FP32)
    ds_config["zero_optimization"]["offload_optimizer"]["ratio"] = 0.0
    values = {"model_name": str(model_folder), "dataset_name": str(rows_file), "batch_size": 4, "warmup": 0.3}
    ((logged, used),) = run_ranks(1, learning_rates, values, ds_config)
    assert len(set(logged)) > 5
    per_step = len(used) // len(logged)
    for step, lr in enumerate(logged):
        for groups in used[step * per_step : (step + 1) * per_step]:
            assert groups == pytest.approx([lr, lr])


def optimizer_in_use(folder: str, rows: str, ds_config: DsConfig) -> tuple[str, bool]:
    """Train, and return the name of the optimizer's class and whether the optimizer process has stepped."""
    model_engine, _ = train({"model_name": folder, "dataset_name": rows, "max_steps": 2}, ds_config)
    return type(model_engine.optimizer).__name__, bool(model_engine.optimizer.statistics.steps)


def test_super_offload_is_this_projects_own_on_the_cpu_too(model_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    ds_config = copy.deepcopy(FP32)
    ds_config["zero_optimization"]["offload_optimizer"]["super_offload"] = True
    found = run_ranks(1, optimizer_in_use, str(model_folder), str(rows), ds_config)
    assert found == [("SharedMemorySuperOffload", True)]


@pytest.mark.unit
@pytest.mark.parametrize(("flag", "steps"), [(-1, None), (0, 0), (5, 5)])
def test_the_check_of_the_first_steps_reports_to_the_output_folder(flag: int, steps: int | None) -> None:
    chosen = config.build({"model_name": "m", "output_dir": "out", "verify_steps": flag})
    settings = engine.offload_settings(chosen)
    assert (settings.verify_steps, settings.report_folder, settings.verify_error) == (steps, "out", UserError)
