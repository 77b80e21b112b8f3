"""The measurements of whole runs: how turns are taken and compared; and each of them in small."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import packing_speed, program_speed, program_turns, trl_speed
from tests.benchmarks.rounds import Bar, bars_table, ratio, spread, turns, write
from tests.helpers.models import write_rows
from tests.helpers.ranks import REPOSITORY, run

SMALL = "--rounds 2 --steps 1 --hidden 64 --layers 1 --max_length 128 --batch_size 2 --threads 1".split()


@pytest.mark.unit
def test_every_second_round_has_the_opposite_order() -> None:
    assert list(turns(["a", "b", "c"], 3)) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


@pytest.mark.unit
def test_ratios_are_those_of_the_same_round() -> None:
    found = ratio([2.0, 30.0, 5.0], [1.0, 10.0, 2.0])
    assert (found.median, found.lowest, found.highest, found.count) == (2.5, 2.0, 3.0, 3)
    assert found.show(".1f") == "2.5 (2.0 to 3.0)"
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.unit
def test_the_median_decides_whether_a_bar_is_reached() -> None:
    above = Bar(what="rate", limit=2.0, found=spread([1.0, 2.0, 9.0]))
    below = Bar(what="time", limit=1.03, found=spread([1.0, 1.04, 1.05]), at_least=False, form=".2f")
    assert above.reached and not below.reached
    assert bars_table([above, below])[2:] == [
        "| rate | at least 2.0 | 2.0 (1.0 to 9.0) | yes |",
        "| time | at most 1.03 | 1.04 (1.00 to 1.05) | **no** |",
    ]
    assert below.as_dict()["reached"] is False and below.as_dict()["found"]["highest"] == 1.05


@pytest.mark.unit
def test_results_are_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "new", "speed", {"a": 1}, ["# Speed", "", "fast"])
    assert (tmp_path / "new" / "speed.md").read_text(encoding="utf-8") == "# Speed\n\nfast\n" == capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "speed.json").read_text(encoding="utf-8")) == {"a": 1}


class Recorder:
    """Stands in for both processes of program_speed.py: notes who was asked, and answers with fixed times."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, name: str, *_: Any) -> Any:
        self.asked.append(name)
        answers = {
            "whole": [9.0, 1.02, 2.04],
            "bare_loop": [(9.0, 9.0), (1.0, 0.05), (2.0, 0.1)],
            "forward_backward": [9.0, 0.5, 1.0],
            "flops": [1e12, 2.5e11, 5e11],
            "product_flops_per_s": 1e12,
        }
        return answers[name]


@pytest.mark.unit
def test_the_loops_take_turns_without_their_first_steps() -> None:
    process: Any = Recorder()
    times = program_speed.compare_loops(process, process, "model", 2)
    loops = ["whole", "bare_loop", "forward_backward"]
    assert process.asked == loops + loops[::-1]
    shares = program_speed.shares_of_rate(process, {512: "a", 1024: "b"}, 2)
    assert shares["shares"] == {"512": [0.5, 0.5], "1024": [0.5, 0.5]}
    bars = program_speed.bars_of({"step_times_s": {"zerooffload": times}, **shares})
    assert [(round(bar.found.median, 3), bar.reached) for bar in bars] == [
        (1.02, True), (2.0, False), (0.5, False), (0.5, False)
    ]  # fmt: skip


@pytest.mark.unit
def test_a_process_answers_until_the_connection_closes() -> None:
    class Ends:
        def __init__(self) -> None:
            self.sent: list[Any] = []
            self.commands: Any = iter([("add", 1, 2), ("add", 3, 4)])

        def add(self, first: int, second: int) -> int:
            return first + second

        def recv(self) -> Any:
            command = next(self.commands, None)
            if command is None:
                raise EOFError
            return command

        def send(self, value: Any) -> None:
            self.sent.append(value)

    ends: Any = Ends()
    program_turns.answer(ends, ends)
    assert ends.sent == [3, 7]


def measured(script: Any, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """Run a measurement in small; check what all of them write, and return its figures."""
    name = Path(script.__file__).stem
    data = write_rows(tmp_path / "rows.json", count=60)
    command = [sys.executable, f"tests/benchmarks/{name}.py", "--data", str(data), "--results", str(tmp_path), *SMALL]
    done = run([*command, *flags], timeout_s=1100, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert done.stdout.endswith((tmp_path / f"{name}.md").read_text(encoding="utf-8"))
    for bar in found["bars"]:
        assert 0 < bar["found"]["lowest"] <= bar["found"]["median"] <= bar["found"]["highest"]
        assert bar["what"] in done.stdout
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_packing_in_small(tmp_path: Path) -> None:
    found = measured(packing_speed, tmp_path, "--curve_steps", "2", "--rows", "100")
    assert {name: len(times) for name, times in found["step_times_s"].items()} == {
        "packing": 2,
        "padding_max_length": 2,
    }
    assert found["targets_per_step"]["packing"] > found["targets_per_step"]["padding_max_length"] > 0
    assert found["curves"]["same_target_tokens"] and found["curves"]["largest_difference"] < 1e-4
    assert found["memory"]["rows"] == 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_trl_in_small(tmp_path: Path) -> None:
    """In this environment, which has TRL for other tests, so that nothing is installed."""
    found = measured(trl_speed, tmp_path, "--python", sys.executable)
    assert {name: len(times) for name, times in found["step_times_s"].items()} == dict.fromkeys(trl_speed.NAMES, 2)
    targets = found["targets_per_step"]
    assert targets["trl"] == pytest.approx(targets["zerooffload"], rel=0.2)  # the packs differ a little
    assert found["trl"]["packing_strategy"] == "bfd" and len(found["trl"]["losses"]) == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_program_in_small(tmp_path: Path) -> None:
    found = measured(program_speed, tmp_path, "--starts", "2")
    for times in found["step_times_s"].values():
        assert {name: list(map(len, by_round)) for name, by_round in times.items()} == {name: [1] * 4 for name in times}
    assert list(found["shares"]) == ["64", "128"] and len(found["bars"]) == 6
    assert len(found["flops_per_s"]["product"]) == 4
