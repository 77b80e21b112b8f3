"""`superoffload plan`: its flags, its words, its JSON and its exit status."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import pytest

from superoffload import cli, ds_config
from superoffload.commands import group
from superoffload.commands import plan as plan_command
from superoffload.errors import UserError
from superoffload.planning import machine, recipes, speed, words
from superoffload.planning.budget import job
from superoffload.planning.machine import Device, Machine, Rates
from tests.helpers.ranks import REPOSITORY
from tests.helpers.recipes import call, changed, script_of
from tests.helpers.recipes import stand_in as stand_in

Capture = pytest.CaptureFixture[str]
GIB = 2**30
BIG = ("--gpu_memory", "80GB", "--host_memory", "2TiB", "--link", "pcie5")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Pretend that this machine has no device, 64 GiB of memory and tight limits."""
    return pretend(monkeypatch, ())


def pretend(monkeypatch: pytest.MonkeyPatch, devices: tuple[Device, ...], available: int = 60 * GIB) -> Machine:
    found = Machine(
        devices=devices, host_bytes=64 * GIB, host_available_bytes=available, cores=2, shm_bytes=2**26,
        shm_free_bytes=2**26, memlock_bytes=2**23, numa_nodes=1,
    )  # fmt: skip
    monkeypatch.setattr(machine, "look", lambda *, devices=None: found)
    monkeypatch.setattr(machine, "measured_rates", lambda found=None: None)
    return found


def plan(*arguments: str) -> int:
    status = group.main(["plan", *arguments], standalone_mode=False)
    assert isinstance(status, int)
    return status


def as_json(capsys: Capture, *arguments: str) -> dict[str, Any]:
    status = plan(*arguments, "--json")
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert status == (0 if found["fits"] else 1)
    return found


@pytest.mark.unit
@pytest.mark.parametrize("name", recipes.names())
@pytest.mark.parametrize("memory", ["80GB", "24GB"])
def test_the_page_is_calm(capsys: Capture, name: str, memory: str) -> None:
    status = plan("--recipe", name, "--gpu_memory", memory, "--host_memory", "2TiB", "--tokens", "5e6", "--nodes", "2",
                  "--batch_size", "2")  # fmt: skip
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert ("IT FITS" in out) == (status == 0)
    assert ("IT DOES NOT FIT" in out) == (status == 1)
    for part in (
        "weights", "optimizer", "masters", "moments", "peak", "capacity", "resuming", "Disk", "tokens/s", "Mode: ",
        "DeepSpeed's own estimator says", "for an epoch of 5 million tokens", "Estimated time: ",
    ):  # fmt: skip
        assert part in " ".join(out.split()), part


@pytest.mark.parametrize("mode", ["superoffload", "zerooffload"])
@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_planned_as_its_script_runs_it(capsys: Capture, stand_in: Path, name: str, mode: str) -> None:
    result = call(script_of(name), stand_in, mode, DRY_RUN="1")
    settings = cli.parse(shlex.split(result.stdout.splitlines()[-1].partition("finetune_zero3.py ")[2]))
    ranks = recipes.devices(name)
    merged = ds_config.merge_flags(ds_config.read_ds_config(settings), settings, ranks)
    found = as_json(capsys, "--recipe", name, "--deepspeed_config", f"configs/{mode}.json", *BIG)
    expected = job.of(merged.config, merged.ds_config, ranks, ranks)
    assert found["job"] == asdict(replace(expected, divided=expected.batch * ranks))
    assert found["model"]["name"] == name.removesuffix("_longcontext")


@pytest.mark.parametrize("nodes", [2, 4])
def test_several_machines_divide_the_batch_of_a_recipe_as_its_script_does(
    capsys: Capture, stand_in: Path, nodes: int
) -> None:
    env = {"DRY_RUN": "1", "NUM_NODES": str(nodes), "NODE_RANK": "0", "MASTER_ADDR": "localhost"}
    words_of = shlex.split(call(script_of("llama-8b"), stand_in, "superoffload", **env).stdout.splitlines()[-1])
    batch = int(words_of[words_of.index("--batch_size") + 1])
    assert as_json(capsys, "--recipe", "llama-8b", "--nodes", str(nodes), *BIG)["job"]["batch"] == batch == 4 // nodes
    given = as_json(capsys, "--recipe", "llama-8b", "--nodes", str(nodes), "--batch_size", "4", *BIG)["job"]
    assert (given["batch"], given["divided"]) == (4, 0)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("line", "replacement", "flag", "value"),
    [
        ("SAVE_CHECKPOINT=false", "SAVE_CHECKPOINT=true", "save_checkpoint", True),
        ("EXPORT=false", "EXPORT=true", "export", True),
        ("SAVE_STEPS=0", "SAVE_STEPS=7", "save_steps", 7),
        ("KEEP_CHECKPOINTS=2", "KEEP_CHECKPOINTS=3", "keep_checkpoints", 3),
        ("PACKING=true", "PACKING=false", "packing", False),
        ("ACTIVATION_CHECKPOINTING=true", "ACTIVATION_CHECKPOINTING=false", "activation_checkpointing", "none"),
        ("ACTIVATION_CHECKPOINTING=true", "ACTIVATION_CHECKPOINTING=offload", "activation_checkpointing", "offload"),
        ("TILED_MLP=0", "TILED_MLP=auto", "tiled_mlp", "auto"),
        ("TILED_MLP=0", "", "tiled_mlp", 0),  # a recipe of an earlier version
        ("MAX_LENGTH=4096", "MAX_LENGTH=512", "max_length", 512),
    ],
)
def test_each_value_of_a_recipe_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, replacement: str, flag: str, value: object
) -> None:
    changed("llama-8b", tmp_path, line, replacement).rename(tmp_path / "finetune_llama-8b_1gpu.sh")
    monkeypatch.setattr(recipes, "SCRIPTS", tmp_path)
    assert recipes.settings("llama-8b", superoffload=True)[flag] == value


@pytest.mark.unit
def test_the_mode_is_chosen_by_time(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_json(capsys, "--recipe", "llama-8b", *BIG)["best_mode"] == "superoffload"
    slow = replace(speed.LINKS["pcie5"], host_memory=1e9)
    monkeypatch.setitem(speed.LINKS, "pcie5", slow)
    found = as_json(capsys, "--recipe", "llama-8b", *BIG)
    assert found["best_mode"] == "zerooffload"
    assert found["time"]["superoffload"]["step_s"] > found["time"]["zerooffload"]["step_s"]
    plan("--recipe", "llama-8b", *BIG)
    assert "the host is the slower side" in " ".join(capsys.readouterr().out.split())


@pytest.mark.unit
def test_flags_override_a_recipe(capsys: Capture) -> None:
    found = as_json(capsys, "--recipe", "llama-70b", "--gpus", "8", "--batch_size", "2", "--max_length", "512", *BIG)[
        "job"
    ]
    assert (found["ranks"], found["ranks_per_node"], found["batch"], found["length"]) == (8, 8, 2, 512)
    assert found["ratio"] == 0.92
    zero = as_json(capsys, "--recipe", "llama-70b", "--deepspeed_config", "configs/zerooffload.json", *BIG)["job"]
    assert (zero["mode"], zero["ratio"]) == ("zerooffload", 1.0)


@pytest.mark.unit
def test_the_json_has_these_names(capsys: Capture) -> None:
    found = as_json(capsys, "--recipe", "llama-8b", "--gpu_memory", "40GB", "--host_memory", "2TiB")
    assert list(found) == [
        "fits", "model", "job", "capacity", "missing", "device", "host", "host_peaks", "checkpoint", "disk",
        "device_peak", "host_peak", "deepspeed_estimate", "remedies", "nearest", "largest_batch", "largest_length",
        "longest", "hardware", "time", "best_mode",
    ]  # fmt: skip
    assert found["capacity"] == {"device": 40 * 10**9, "host": 2 * 2**40, "disk": None}
    assert found["device_peak"] == sum(found["device"].values()) > found["capacity"]["device"]
    assert found["missing"] == {"device": found["device_peak"] - found["capacity"]["device"]}
    assert set(found["time"]) == {"superoffload", "zerooffload"}
    assert set(found["remedies"][0]) == {"flags", "missing", "device_peak", "host_peak", "step_s", "tokens_per_s"}
    assert all(remedy["missing"] == {} for remedy in found["remedies"])


@pytest.mark.unit
@pytest.mark.parametrize(
    "arguments",
    [
        ("--recipe", "llama-8b", "--gpu_memory", "40GB", "--host_memory", "480GiB"),
        ("--recipe", "llama-8b", "--gpu_memory", "24GB", "--host_memory", "100GiB"),
        ("--model_name", "qwen3-8b", "--gpu_memory", "24GB", "--host_memory", "480GiB", "--loss_kernel", "plain"),
        ("--recipe", "qwen3-30b-a3b", "--gpu_memory", "40GB", "--host_memory", "480GiB", "--save_checkpoint"),
        ("--recipe", "llama-70b", "--gpu_memory", "40GiB", "--host_memory", "1TiB"),
        ("--recipe", "llama-70b", "--gpu_memory", "80GB", "--host_memory", "512GiB"),
        ("--recipe", "llama-8b", "--gpu_memory", "30GB", "--host_memory", "100GiB"),
    ],
    ids=" ".join,
)
def test_every_remedy_is_a_flag_that_makes_it_fit(capsys: Capture, arguments: tuple[str, ...]) -> None:
    found = as_json(capsys, *arguments)
    assert found["remedies"]
    for remedy in found["remedies"]:
        again = as_json(capsys, *arguments, *(word for flag in remedy["flags"] for word in flag.split()))
        assert again["fits"], remedy
        assert again["device_peak"] == remedy["device_peak"]
        assert again["host_peak"] == remedy["host_peak"]


@pytest.mark.unit
def test_the_remedies_are_listed_with_their_figures(capsys: Capture) -> None:
    arguments = ("--recipe", "llama-8b", "--gpu_memory", "40GB", "--host_memory", "2TiB")
    first = as_json(capsys, *arguments)["remedies"][0]
    plan(*arguments)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"  {first['flags'][0]} ")]
    assert line.split()[2:4] == [words.gib(first["device_peak"]), words.gib(first["host_peak"])]


@pytest.mark.unit
@pytest.mark.timeout(60)
@pytest.mark.parametrize("flag", ["--batch_size", "--max_length", "--keep_checkpoints", "--sub_group_size"])
@pytest.mark.parametrize("number", ["1000000000", "1e30"])
def test_absurd_numbers_are_answered(capsys: Capture, flag: str, number: str) -> None:
    """Nothing grows with the number: not the search for changes, and not the time of a step."""
    found = as_json(capsys, "--model_name", "llama-8b", *BIG, "--save_checkpoint", flag, number)
    assert found["time"]["superoffload"]["step_s"] > 0


@pytest.mark.unit
def test_a_remedy_that_hardly_fits_is_marked(capsys: Capture) -> None:
    plan("--recipe", "llama-8b", "--gpu_memory", "48GB", "--host_memory", "256GiB")
    out = capsys.readouterr().out
    marked = {line.split()[0]: line.endswith(" *") for line in out.splitlines() if line.startswith("  --")}
    assert marked["--batch_size"] and not marked["--offload_params"]  # 44.7 and 35.1 of 44.7 GiB
    assert "* leaves less than 5%" in out


@pytest.mark.unit
def test_the_nearest_miss_is_said(capsys: Capture) -> None:
    assert plan("--recipe", "llama-70b", "--gpu_memory", "4GB", "--host_memory", "16GiB") == 1
    assert re.search(r"The nearest:.*still\s+missing: [\d.]+ GiB", capsys.readouterr().out, re.S)


@pytest.mark.unit
def test_disk_is_checked_where_the_output_folder_is_given(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--recipe", "llama-8b", "--save_steps", "100", "--keep_checkpoints", "5", *BIG)
    assert as_json(capsys, *arguments)["capacity"]["disk"] is None
    monkeypatch.setattr(machine, "disk_free_bytes", lambda folder: 400 * GIB if folder == tmp_path else 0)
    found = as_json(capsys, *arguments, "--output_dir", str(tmp_path))
    assert list(found["missing"]) == ["disk"]
    assert [remedy["flags"] for remedy in found["remedies"]] == [["--keep_checkpoints 3"], ["--optimizer_state bf16"]]


@pytest.mark.unit
def test_the_machine_at_hand_is_used(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (Device(name="NVIDIA H200", total_bytes=140 * GIB, free_bytes=130 * GIB),) * 2)
    found = as_json(capsys, "--model_name", "llama-1b")
    assert found["capacity"] == {"device": 140 * GIB, "host": 64 * GIB, "disk": None}
    assert (found["job"]["ranks"], found["hardware"]["device"]) == (2, "H200")
    plan("--model_name", "llama-1b")
    assert "/dev/shm has 64 MiB" in capsys.readouterr().out
    plan("--model_name", "llama-1b", "--nodes", "2")
    assert "ulimit -l is 8 MiB" in capsys.readouterr().out


@pytest.mark.unit
def test_without_a_gpu_the_host_holds_everything(capsys: Capture) -> None:
    on_cpu, elsewhere = (as_json(capsys, "--model_name", "llama-1b", *more) for more in ((), ("--link", "pcie5")))
    assert on_cpu["job"]["on_cpu"] and not elsewhere["job"]["on_cpu"]
    assert on_cpu["host"]["device"] > 0 and "device" not in on_cpu["missing"]
    assert on_cpu["host_peak"] > elsewhere["host_peak"]
    assert on_cpu["time"] is on_cpu["best_mode"] is None and elsewhere["time"]
    assert plan("--model_name", "llama-1b") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "There is no GPU here. This is a run on the CPU" in out and "The time of a step is not estimated" in out
    plan("--model_name", "llama-1b", "--link", "pcie5")
    out = capsys.readouterr().out
    assert "The device was not checked: give its memory" in out and "AS FAR AS IT WAS CHECKED, IT FITS: " in out


@pytest.mark.unit
def test_rounding_of_pinned_memory_is_that_of_the_environment(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--model_name", "qwen3-4b", "--deepspeed_config", "configs/zerooffload.json", *BIG)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    plan(*arguments)
    assert "set PYTORCH_ALLOC_CONF=pinned_max_round_threshold_mb:64" in " ".join(capsys.readouterr().out.split())
    rounded = as_json(capsys, *arguments)["host"]["pinned"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:64")
    assert as_json(capsys, *arguments)["host"]["pinned"] < rounded / 10


@pytest.mark.unit
def test_what_others_use_now_is_said(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(name="NVIDIA H200", total_bytes=140 * GIB, free_bytes=GIB)
    pretend(monkeypatch, (device,), available=3 * GIB)
    assert plan("--model_name", "llama-1b") == 0
    out = capsys.readouterr().out
    assert "But now only 1.0 GiB of a device are free" in out
    assert "But now only 3.0 GiB of host memory are available" in out
    plan("--model_name", "llama-1b", "--gpu_memory", "80GB")
    assert "But now" not in capsys.readouterr().out


@pytest.mark.unit
def test_measured_rates_are_used_for_the_machine_at_hand_alone(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, (Device(name="NVIDIA H200", total_bytes=140 * GIB, free_bytes=130 * GIB),))
    rates = Rates(
        adam_parameters_per_s=1e9, host_copy_bytes_per_s=1e11, to_device_bytes_per_s=1e10, from_device_bytes_per_s=1e10,
        device_bf16_flops_per_s=7e14, disk_write_bytes_per_s=1e9,
    )  # fmt: skip
    monkeypatch.setattr(machine, "measured_rates", lambda found=None: rates)
    plan("--model_name", "llama-1b")
    assert " ".join(capsys.readouterr().out.split()).count("measured by superoffload doctor") == 3
    assert as_json(capsys, "--model_name", "llama-1b")["hardware"]["measured"] == ["flops", "copies", "adam"]
    assert as_json(capsys, "--model_name", "llama-1b", "--gpu_memory", "80GB")["hardware"]["measured"] == []


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model_name: no model is given; give one, or a --recipe"),
        (
            ("--recipe", "llama-8b", "--gpus", "3"),
            "--recipe llama-8b: its batch of 4 cannot be divided among 3 devices",
        ),
        (("--recipe", "llama-70b", "--nodes", "2"), "--recipe llama-70b: its batch of 4 cannot be divided among 8 "),
        (
            ("--model_name", "llama-8b", "--gpus", "3", "--sequence_parallel_size", "3"),
            "--sequence_parallel_size 3: the 32 attention heads of llama-8b cannot be divided among 3 ranks",
        ),
        (("--recipe", "gpt-5"), "--recipe gpt-5: must be one of gpt-oss-20b, "),
        (("--model_name", "llama-8b", "--batch_size", "0"), "--batch_size 0: must be 1 <= value"),
        (("--recipe", "llama-8b", "--plot", "plan.txt"), "--plot plan.txt: must be the name of a PNG file"),
        (("--recipe", "llama-8b", "--plot", ""), "--plot: is empty; give a name"),
        (("--recipe", "llama-8b", "--deepspeed_config", "missing.json"), "--deepspeed_config missing.json: cannot be"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        plan(*arguments)
    assert str(error.value).startswith(message)


@pytest.mark.unit
@pytest.mark.parametrize("number", ["0", "-5", "nan", "inf", "many"])
def test_an_epoch_has_a_number_of_tokens(number: str) -> None:
    with pytest.raises(click.BadParameter) as error:
        plan("--recipe", "llama-8b", *BIG, "--tokens", number)
    assert error.value.param and error.value.param.name == "tokens"


@pytest.mark.unit
def test_a_folder_is_planned_from_its_configuration(capsys: Capture, tmp_path: Path) -> None:
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps({**kind, **sizes}))
    found = as_json(capsys, "--model_name", str(tmp_path), *BIG)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    assert found["model"]["parameters"] == 2 * 256 * 64 + 2 * layer + 64


def test_a_well_known_model_needs_no_large_library() -> None:
    program = "import sys; from superoffload.commands import group; group.main(sys.argv[1:], standalone_mode=False); "
    program += (
        "print({'torch', 'transformers', 'deepspeed', 'numpy', 'huggingface_hub', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "plan", "--recipe", "llama-70b", *BIG],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=60,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1] == "set()", result.stderr
    assert "IT FITS" in result.stdout


@pytest.mark.unit
def test_every_flag_of_a_run_that_is_named_is_taken() -> None:
    taken = {option.name for option in group.commands["plan"].params}
    assert {name for names in plan_command.SETTINGS.values() for name in names} <= taken
    assert {"recipe", "gpus", "nodes", "gpu_memory", "host_memory", "link", "output_dir", "json", "plot"} <= taken


@pytest.mark.unit
def test_recipes_are_read_from_the_repository() -> None:
    assert ds_config.REPOSITORY == REPOSITORY
    assert len(recipes.names()) == 8
    assert recipes.values("llama-8b")["MAX_LENGTH"] == "4096"  # not those of a recipe whose name begins with it
