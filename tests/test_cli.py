"""The command line: its flags, its help and its errors."""

import runpy
import signal
import sys
import time
from collections.abc import Callable

import click
import pytest

from superoffload import cli, config
from superoffload.errors import UserError
from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.unit

REQUIRED = ["--model_name", "m", "--output_dir", "out"]
UPSTREAM = [
    "--model_name", "m", "--lr", "1e-5", "--batch_size", "4", "--output_dir", "out", "--attn_implementation", "eager",
    "--leaf_module", "Block", "--activation_checkpointing", "--num_train_epochs", "2", "--max_length", "4096",
    "--weight_decay", "0.01", "--warmup", "0.05", "--local_rank=0", "--seed", "42", "--deterministic",
    "--log_interval", "1", "--log_level", "INFO", "--warmup_steps", "20", "--bench_steps", "10", "--save_checkpoint",
    "--use_wandb", "--wandb_project", "p", "--wandb_run_name", "n", "--wandb_tags", "a", "b",
    "--dataset_name", "tatsu-lab/alpaca", "--dataset_percentage", "10.0", "--deepspeed", "--deepspeed_config=ds.json",
]  # fmt: skip


def run_script(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int | str | None:
    """Run finetune_zero3.py as a script in this process until it exits, and return its status."""
    script = str(REPOSITORY / "finetune_zero3.py")
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.setattr(cli, "leave", sys.exit)  # which would end this process
    with pytest.raises(SystemExit) as raised:
        runpy.run_path(script, run_name="__main__")
    return raised.value.code


def test_every_flag_of_upstream_is_accepted() -> None:
    values = config.flat(cli.parse(UPSTREAM))
    assert values["wandb_tags"] == ("a", "b")
    assert values["warmup"] == 0.05
    assert values["deepspeed_config"] == "ds.json"
    assert values["local_rank"] == 0
    assert values["bench_steps"] == 10


def test_a_flag_may_take_several_values() -> None:
    assert cli.parse([*REQUIRED, "--wandb_tags", "x", "y", "z"]).tracking.wandb_tags == ("x", "y", "z")
    assert cli.parse([*REQUIRED, "--wandb_tags", "x"]).tracking.wandb_tags == ("x",)
    data = cli.parse([*REQUIRED, "--dataset_name", "a.jsonl:0.5", "b", "--dataset_weights", "1", "2e-1"]).data
    assert (data.dataset_name, data.dataset_weights) == (("a.jsonl:0.5", "b"), (1.0, 0.2))
    assert cli.parse(REQUIRED).data.dataset_name == ("tatsu-lab/alpaca",)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ("", "none"),
        ("--activation_checkpointing", "full"),  # a switch once
        ("--activation_checkpointing --lr 1e-5", "full"),
        ("--activation_checkpointing --wandb_tags a b", "full"),
        ("--no_activation_checkpointing", "none"),
        ("--activation_checkpointing --no_activation_checkpointing", "none"),
        ("--no_activation_checkpointing --activation_checkpointing", "full"),
        ("--activation_checkpointing none", "none"),
        ("--activation_checkpointing full", "full"),
        ("--activation_checkpointing offload", "offload"),
        ("--activation_checkpointing=offload", "offload"),
        ("--activation_checkpointing true", "full"),
        ("--activation_checkpointing off", "none"),
    ],
)
def test_a_former_switch_takes_a_value(flags: str, value: str) -> None:
    found = cli.parse([*flags.split(), *REQUIRED])
    assert found.model.activation_checkpointing == value
    assert found.model.recomputes == (value != "none")
    assert ("activation_checkpointing" in found.explicit) == bool(flags)
    built = config.build({"model_name": "m", "output_dir": "o", "activation_checkpointing": value != "none"})
    assert built.model.activation_checkpointing == ("full" if value != "none" else "none")


@pytest.mark.parametrize("last", [["--dataset_name", "c", "d"], ["--dataset_name=c", "d"]])
def test_the_last_of_two_equal_flags_counts(last: list[str]) -> None:
    """A recipe gives its own values before those of its arguments."""
    for first in (["--dataset_name", "a", "b"], ["--dataset_name=a"]):
        assert cli.parse([*first, *REQUIRED, *last]).data.dataset_name == ("c", "d")


@pytest.mark.parametrize("flags", [["--wandb_tags"], ["--wandb_tags", "--use_wandb"]])
def test_a_flag_for_several_values_needs_one(flags: list[str]) -> None:
    with pytest.raises(UserError, match=r"^--wandb_tags: no value is given; give one or more, separated by spaces$"):
        cli.parse([*REQUIRED, *flags])


def test_any_other_error_is_a_traceback_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(parsed: config.Config) -> int:
        raise ValueError(f"of {parsed.model.model_name}")

    monkeypatch.setattr(sys, "argv", ["finetune_zero3.py", *REQUIRED])
    monkeypatch.setattr(cli, "leave", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        cli.run(main)
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback ") and printed.endswith("ValueError: of m\n")


def raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def raise_another_error_because_of_it() -> None:
    try:
        raise KeyboardInterrupt
    finally:
        raise TimeoutError


@pytest.mark.parametrize("interrupt", [raise_keyboard_interrupt, raise_another_error_because_of_it])
def test_ctrl_c_outside_training_is_one_line(
    interrupt: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: config.Config) -> int:
        interrupt()
        return 0

    monkeypatch.setattr(sys, "argv", ["finetune_zero3.py", *REQUIRED])
    monkeypatch.setattr(cli, "leave", sys.exit)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match="130"):
            cli.run(main)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "Error: stopped by Ctrl-C, before the first step or after the last\n"


def test_defaults_of_this_program() -> None:
    parsed = cli.parse(REQUIRED)
    assert parsed.training.lr == 1e-5
    assert parsed.training.batch_size == 1
    assert parsed.training.max_grad_norm == 1.0
    assert parsed.measurement.bench_steps == 0
    assert parsed.model.attn_implementation == "auto"
    assert parsed.explicit == {"model_name", "output_dir"}


def test_the_check_of_the_first_steps_takes_no_number_below_minus_one() -> None:
    assert cli.parse([*REQUIRED, "--verify_steps", "0"]).offload.verify_steps == 0
    with pytest.raises(UserError, match=r"^--verify_steps -2: must be -1 <= value$"):
        cli.parse([*REQUIRED, "--verify_steps", "-2"])


def test_whole_numbers_may_be_written_with_an_exponent() -> None:
    assert cli.parse([*REQUIRED, "--sub_group_size", "4e8"]).offload.sub_group_size == 400_000_000


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0"], "--lr 0.0: must be 0 < value"),
        (["--lr", "nan"], "--lr nan"),
        (["--lr", "fast"], "'--lr'"),
        (["--dataset_name"], "--dataset_name: no value is given"),
        (["--dataset_name", "--lr", "1"], "--dataset_name: no value is given"),
        (["--dataset_name", "a", "b", "--dataset_weights", "1"], "--dataset_weights 1.0: --dataset_name has 2 values"),
        (["--dataset_name", "a", "b", "--dataset_weights", "1", "-2"], "--dataset_weights 1.0 -2.0: must be 0 < value"),
        (["--dataset_weights", "much"], "'much' is not a valid float"),
        (["--batch_size", "0"], "--batch_size 0: must be 1 <= value"),
        (["--batch_size", "-2"], "--batch_size -2"),
        (["--sequence_parallel_size", "0"], "--sequence_parallel_size 0: must be 1 <= value"),
        (["--batch_size", "1.5"], "'1.5' is not a whole number"),
        (["--max_length", "0"], "--max_length 0"),
        (["--num_train_epochs", "0"], "--num_train_epochs 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0"),
        (["--weight_decay", "-0.1"], "--weight_decay -0.1: must be 0 <= value <= 1"),
        (["--gradient_accumulation_steps", "9" * 20], "must be 1 <= value <= 65536"),
        (["--warmup", "1.5"], "--warmup 1.5: above 1 it is a number of steps, and must be a whole number"),
        (["--decay", "2.5"], "--decay 2.5: above 1 it is a number of steps, and must be a whole number"),
        (["--decay", "0.01"], "--decay 0.01: --lr_scheduler cosine has none; use wsd"),
        (["--warmup", "-1"], "--warmup -1.0: must be 0 <= value"),
        (["--lr_scheduler", "cosine_with_min_lr"], "--lr_scheduler cosine_with_min_lr: needs --min_lr_ratio, such as"),
        (["--min_lr_ratio", "0.1"], "--min_lr_ratio 0.1: --lr_scheduler cosine has none; use cosine_with_min_lr or"),
        (["--min_lr_ratio", "1.1"], "--min_lr_ratio 1.1: must be 0 <= value <= 1"),
        (["--label_smoothing", "1"], "--label_smoothing 1.0: must be 0 <= value < 1"),
        (["--label_smoothing", "0.1", "--loss", "dft"], "--label_smoothing 0.1: --loss dft is not defined with it"),
        (["--neftune_alpha", "-5"], "--neftune_alpha -5.0: must be 0 <= value"),
        (["--freeze", "embed", "layers.[0-"], "--freeze layers.[0-: is not a regular expression (unterminated char"),
        (["--dataset_percentage", "0"], "--dataset_percentage 0.0: must be 0 < value <= 100"),
        (["--dataset_percentage", "101"], "--dataset_percentage 101.0"),
        (["--offload_ratio", "2"], "--offload_ratio 2.0: must be 0 <= value <= 1 or auto"),
        (["--offload_ratio", "most"], "'most' is neither a number nor auto"),
        (["--tiled_mlp", "-1"], "--tiled_mlp -1: must be 0 <= value or auto"),
        (["--tiled_mlp", "1.5"], "'1.5' is neither a whole number nor auto"),
        (["--offload_ratio", "nan"], "--offload_ratio nan: must be"),
        (["--lr", "auto"], "'auto' is not a valid float"),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1.0"),
        (["--max_steps", "-1"], "--max_steps -1"),
        (["--log_interval", "0"], "--log_interval 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--lr_scheduler", "zigzag"], "'zigzag' is not one of 'cosine', 'linear', 'constant', 'cosine_with_min_lr', "),
        (["--lr_scheduler", "cosin"], "; did you mean cosine?"),
        (["--log_level", "info"], "; did you mean INFO?"),
        (["--max_lenght", "8"], "'--max_length'"),
        (["--attn_implementation", "fast"], "'fast' is not one of"),
        (["--log_level", "LOUD"], "'LOUD' is not one of"),
        (["--no_such_flag", "1"], "--no_such_flag"),
        (["--max_length"], "'--max_length' requires an argument"),
    ],
)
def test_bad_values_name_flag_and_value(flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as raised:
        cli.parse([*REQUIRED, *flags])
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_flag_is_named() -> None:
    with pytest.raises(UserError, match="'--output_dir'"):
        cli.parse(["--model_name", "m"])


def test_an_error_is_one_line_and_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(monkeypatch, *REQUIRED, "--lr", "0") == 2
    assert capsys.readouterr() == ("", "Error: --lr 0.0: must be 0 < value <= 10\n")


def test_other_ranks_wait_before_they_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 usually reports the same error, and the launcher then terminates them."""
    waits: list[tuple[float, str]] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", "1")
    assert run_script(monkeypatch, *REQUIRED, "--lr", "0") == 2
    assert waits == [(cli.SILENT_RANK_PATIENCE_S, "")]
    assert cli.SILENT_RANK_PATIENCE_S >= 5
    assert capsys.readouterr() == ("", "[rank 1] Error: --lr 0.0: must be 0 < value <= 10\n")


def test_rank_0_does_not_wait(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("rank 0 waits"))
    monkeypatch.setenv("RANK", "0")
    assert run_script(monkeypatch, *REQUIRED, "--lr", "0") == 2
    assert capsys.readouterr().err.startswith("Error: ")


def test_help_is_grouped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    for group in config.GROUPS.values():
        heading = group.__doc__.rstrip(".") + ":"
        assert f"\n{heading}\n" in shown
    for flag in config.flat(cli.parse(REQUIRED)):
        assert f"--{flag}" in shown


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80GB", 80 * 10**9), ("80g", 80 * 2**30), ("1.5 TiB", 3 * 2**39), ("512m", 2**29)],
)
def test_sizes_have_units(text: str, size: int) -> None:
    assert cli.Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["80", "0GB", "-1GB", "80 GiBs", "many", "1e3GB"])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size; write it with its unit, e.g. 80GiB or 80GB"):
        cli.Size().convert(text, None, None)
