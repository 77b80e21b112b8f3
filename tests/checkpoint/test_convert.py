"""Convert checkpoints for another number of ranks."""

from pathlib import Path

import pytest

from superoffload.checkpoint.convert import convert
from superoffload.errors import UserError
from tests.helpers.forked import launch, run_forked
from tests.helpers.runs import damage, flags, logged, make_checkpoint


def command(*words: str) -> str:
    result = run_forked(["-m", "superoffload.commands", *words])
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_from_two_ranks_to_one_and_back(model_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    steps = ["--max_steps", "9", "--save_checkpoint", "--warmup_steps", "0"]
    whole, first, second, third = (tmp_path / name for name in ("whole", "first", "second", "third"))
    assert launch(2, *flags(model_folder, rows_file, whole, *steps)).returncode == 0
    assert launch(2, *flags(model_folder, rows_file, first, *steps, "--bench_steps", "3")).returncode == 0

    alone = ["--gradient_accumulation_steps", "4"]  # as many packs per step on one rank as on two
    refused = launch(1, *flags(model_folder, rows_file, second, *steps, *alone, "--resume", str(first)))
    assert refused.returncode == 2
    assert "was saved by 2 ranks, this run has 1" in refused.stderr
    for_any = tmp_path / "universal_3"
    assert "any number of ranks" in command("convert", str(first / "global_step3"), str(for_any))
    more = [*steps, *alone, "--bench_steps", "6", "--resume", str(for_any)]
    one = launch(1, *flags(model_folder, rows_file, second, *more))
    assert one.returncode == 0, one.stderr[-3000:]

    back = tmp_path / "universal_6"
    command("convert", str(second / "global_step6"), str(back))
    both = launch(2, *flags(model_folder, rows_file, third, *steps, "--resume", str(back)))
    assert both.returncode == 0, both.stderr[-3000:]

    found = {line["step"]: line for line in [*logged(first), *logged(second), *logged(third)] if "lr" in line}
    for line in logged(whole):
        if "lr" in line:
            assert found[line["step"]]["lr"] == pytest.approx(line["lr"])
            assert found[line["step"]]["loss"] == pytest.approx(line["loss"], rel=2e-3)
    assert sorted(found) == list(range(1, 10))


@pytest.mark.unit
def test_what_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a complete checkpoint"):
        convert(tmp_path, tmp_path / "new", 1)
    made = make_checkpoint(tmp_path, 3, 1.0)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: already exists; use a new folder"):
        convert(made, tmp_path / "there", 1)
    damage(made, "flipped")
    with pytest.raises(UserError, match="damaged: zero_pp_rank_0.* does not match its checksum"):
        convert(made, tmp_path / "new", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step3", "latest", "there"]
