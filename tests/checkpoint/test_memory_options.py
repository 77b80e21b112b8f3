"""Runs with bf16 optimizer state or the weights on the host: equal in both modes, resumed, converted, exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from superoffload.checkpoint.convert import convert
from superoffload.checkpoint.rank_files import gather, read
from superoffload.checkpoint.save import BYTES_PER_PARAMETER
from tests.helpers.forked import launch
from tests.helpers.ranks import REPOSITORY
from tests.helpers.runs import flags, logged

BF16 = ("--optimizer_state", "bf16")
OFFLOADED = ("--offload_params",)
STEPS = ("--max_steps", "8", "--save_checkpoint")


def train(mode: str, ranks: int, model: Path, rows: Path, out: Path, *more: str) -> str:
    """Run to the end and return the log."""
    config = str(REPOSITORY / f"configs/{mode}.json")
    done = launch(ranks, *flags(model, rows, out, *STEPS, "--deepspeed_config", config, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = "SuperOffload, with its state" if mode == "superoffload" else "ZeRO-Offload"
    assert f"Optimizer: {expected}" in done.stderr
    return done.stderr


def states(out: Path) -> dict[str, Any]:
    """Load what the last checkpoint holds of each rank's optimizer: masters and moments by kind and sub-group."""
    found: dict[str, Any] = {}
    for path in sorted((out / (out / "latest").read_text()).glob("*_optim_states.pt")):
        saved = torch.load(path, weights_only=False)["optimizer_state_dict"]
        for number, flat in enumerate(saved["fp32_flat_groups"]):
            found[f"{path.name} {number} fp32"] = flat
        for number, entry in saved["optimizer_state_dict"]["state"].items():
            found |= {f"{path.name} {number} {key}": entry[key] for key in ("exp_avg", "exp_avg_sq")}
    assert len(found) >= 3
    return found


def assert_equal(left: Path, right: Path, dtype: torch.dtype) -> None:
    """Compare the metrics and the last checkpoints of two runs."""
    assert logged(left) == logged(right)
    expected, found = states(left), states(right)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype == dtype, name
        assert torch.equal(tensor, found[name]), name


@pytest.fixture(scope="module")
def whole(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two ranks in superoffload mode with both options, and export."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train("superoffload", 2, model_folder, rows_file, out, *BF16, *OFFLOADED, "--export", "--save_steps", "5")
    return out


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("zerooffload", *BF16), ("superoffload", *BF16, *OFFLOADED)),
        pytest.param(("superoffload", *BF16), ("superoffload", *BF16), marks=pytest.mark.slow),
        pytest.param(("zerooffload", *BF16, *OFFLOADED), ("zerooffload", *BF16), marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_in_either_mode(
    first: tuple[str, ...], second: tuple[str, ...], whole: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    """Where the weights are changes nothing either, so each part has another place for them than the whole run."""
    train(first[0], 2, model_folder, rows_file, tmp_path, *first[1:], "--save_steps", "5", "--bench_steps", "7")
    (tmp_path / "latest").write_text("global_step5")
    log = train(second[0], 2, model_folder, rows_file, tmp_path, *second[1:])
    assert f"Resuming from {tmp_path / 'global_step5'}: step 5" in log
    assert_equal(whole, tmp_path, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
def test_weights_on_the_host_change_no_bit(mode: str, model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    train(mode, 1, model_folder, rows_file, tmp_path / "device")
    train(mode, 1, model_folder, rows_file, tmp_path / "host", *OFFLOADED)
    assert_equal(tmp_path / "device", tmp_path / "host", torch.float32)


@pytest.mark.slow
def test_the_export_holds_the_master_weights(whole: Path) -> None:
    exported = load_file(whole / "model_step8" / "model.safetensors")
    checkpoint = read(whole)
    assert exported
    for name, tensor in exported.items():
        assert torch.equal(tensor, gather(checkpoint.tensors[name], torch.bfloat16)), name
    saved = sum(tensor.nbytes for tensor in states(whole).values())
    masters = torch.cat([t.flatten() for name, t in sorted(states(whole).items()) if name.endswith("fp32")])
    assert saved == BYTES_PER_PARAMETER["bf16"] * masters.numel()
    # Every exported value is one of the masters, to the last bit: nothing was rounded twice.
    assert torch.isin(torch.cat([t.flatten() for t in exported.values()]).float(), masters.float()).all()


@pytest.mark.slow
def test_a_converted_checkpoint_resumes_on_another_number_of_ranks(
    whole: Path, model_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    convert(whole / "global_step5", tmp_path / "universal", workers=1)
    alone = ["--gradient_accumulation_steps", "4"]  # as many rows per step on one rank as on two
    resumed = [*alone, *BF16, "--resume", str(tmp_path / "universal")]
    train("superoffload", 1, model_folder, rows_file, tmp_path / "out", *resumed)
    expected = {line["step"]: line["loss"] for line in logged(whole) if "lr" in line}
    found = {line["step"]: line["loss"] for line in logged(tmp_path / "out") if "lr" in line}
    assert list(found) == [6, 7, 8]
    assert found == pytest.approx({step: expected[step] for step in found}, rel=2e-3)
    before, after = read(whole), read(tmp_path / "out")
    for name, tensor in before.tensors.items():
        left, right = gather(tensor, torch.float32), gather(after.tensors[name], torch.float32)
        torch.testing.assert_close(left, right, rtol=0.05, atol=0.02, msg=name)
    assert {tensor.dtype for tensor in states(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
def test_another_state_is_refused_or_converted(mode: str, model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    train(mode, 1, model_folder, rows_file, tmp_path, "--bench_steps", "4")
    config = ["--deepspeed_config", str(REPOSITORY / f"configs/{mode}.json")]
    refused = launch(1, *flags(model_folder, rows_file, tmp_path, *STEPS, *config, *BF16))
    assert refused.returncode == 2
    assert "--optimizer_state: checkpoint has fp32, this run has bf16" in refused.stderr
    train(mode, 1, model_folder, rows_file, tmp_path, *BF16, "--resume_anyway")
    assert [line["step"] for line in logged(tmp_path) if "lr" in line] == list(range(1, 9))
    assert {tensor.dtype for tensor in states(tmp_path).values()} == {torch.bfloat16}
