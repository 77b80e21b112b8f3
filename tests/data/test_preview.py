"""What `superoffload preview` prints."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from superoffload.commands import group
from superoffload.data.preview import DIM, GREEN, RESET, shown
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer
from tests.helpers.rows import WriteJsonLines

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> str:
    """Write the tokenizer as a model folder."""
    tokenizer.save_pretrained(str(tmp_path / "model"))
    return str(tmp_path / "model")


def preview(capsys: Capture, *arguments: str) -> str:
    group.main(["preview", *arguments], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.unit
def test_rows_and_statistics(capsys: Capture, folder: str, jsonl: WriteJsonLines) -> None:
    name = jsonl([{"instruction": "q", "output": f"answer {n}"} for n in range(9)])
    out = preview(capsys, "--model_name", folder, "--dataset_name", name, "-n", "2", "--batch_size", "2")
    assert out.count("--- row") == 2
    assert "\u27e6answer 1<eos>\u27e7" in out and "answer 2" not in out
    for word in ("rows ", "tokens ", "target tokens", "p50", "truncated", "dropped", "packs ", "steps per epoch", "##"):
        assert word in out


@pytest.mark.unit
def test_held_out_rows_have_their_own_statistics(capsys: Capture, folder: str, jsonl: WriteJsonLines) -> None:
    name = jsonl([{"instruction": "q", "output": f"answer {n}"} for n in range(9)])
    out = preview(capsys, "--model_name", folder, "--dataset_name", name, "--eval_percentage", "20", "--no_packing")
    assert "Training rows" in out and "Held-out rows" in out and "not packed" in out


@pytest.mark.unit
def test_several_data_sets(capsys: Capture, folder: str, jsonl: WriteJsonLines) -> None:
    first = jsonl([{"instruction": "q", "output": f"answer {n}"} for n in range(9)], "first.jsonl")
    second = jsonl([{"text": f"text {n}"} for n in range(20)], "second.jsonl")
    out = preview(
        capsys, "--model_name", folder, "--dataset_name", first, f"{second}#10", "-n", "1", "--eval_percentage", "20"
    )
    rows, statistics = out.split("Training rows\n")
    assert rows.splitlines()[0] == "first" and "⟦answer" in rows
    assert "\nsecond\n--- row 1:" in rows and rows.count("--- row") == 2
    figures, held_out = statistics.split("Held-out rows\n")
    assert "rows             15 of 19" in figures and "packs " in figures
    assert "\nTraining rows, first\nrows             7 of 9\n" in figures
    assert "\nTraining rows, second\nrows             8 of 10\n" in figures
    assert figures.count("in an epoch      ") == 2
    assert "\nHeld-out rows, second\nrows             2 of 10\n" in held_out


@pytest.mark.unit
def test_colours_and_plain_marks(tokenizer: Tokenizer) -> None:
    ids = tokenizer("hello you")["input_ids"]
    labels = [-100] * (len(ids) - 1) + ids[-1:]
    head, tail = tokenizer.decode(ids[:-1]), tokenizer.decode(ids[-1:])
    assert shown(ids, labels, tokenizer, colours=True) == f"{DIM}{head}{RESET}{GREEN}{tail}{RESET}"
    assert shown(ids, labels, tokenizer, colours=False) == f"{head}\u27e6{tail}\u27e7"


@pytest.mark.unit
@pytest.mark.parametrize("said", ["\u27e6", "a\u27e7b", "\\", "\\\u27e7", "\\\\\u27e6\\", "\\n", ">>>", "c:\\x\\"])
def test_plain_marks_can_be_told_from_the_same_characters_in_the_data(tokenizer: Tokenizer, said: str) -> None:
    given, answer = tokenizer(said + "q")["input_ids"], tokenizer(said)["input_ids"]
    text = shown(
        [*given, *answer, *given], [-100] * len(given) + answer + [-100] * len(given), tokenizer, colours=False
    )
    parts = [""]
    for plain, slashes, mark in re.findall(r"(.*?)(\\*)([\u27e6\u27e7]|\Z)", text, re.S):
        half, escaped = divmod(len(slashes), 2)
        parts[-1] += plain + "\\" * half + (mark if escaped else "")
        parts += [""] if mark and not escaped else []
    assert parts == [said + "q", said, said + "q"]


@pytest.mark.unit
def test_weights_that_leave_a_source_out_are_an_error_before_any_row_is_shown(
    capsys: Capture, folder: str, jsonl: WriteJsonLines
) -> None:
    first, second = jsonl([{"text": "a"}] * 9, "first.jsonl"), jsonl([{"text": "a"}], "second.jsonl")
    with pytest.raises(UserError, match="--dataset_weights 1 0.001: an epoch of 10 rows would hold none of second"):
        preview(capsys, "--model_name", folder, "--dataset_name", first, second, "--dataset_weights", "1", "0.001")
    assert capsys.readouterr().out == ""


def test_mistakes_are_one_line(folder: str, jsonl: WriteJsonLines) -> None:
    name = jsonl([{"a": 1}])
    command = [sys.executable, "-m", "superoffload.commands", "preview", "--model_name", folder, "--dataset_name", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no known format" in done.stderr and done.stderr.startswith("Error: ")


@pytest.mark.unit
def test_value_outside_its_limits_is_refused(folder: str) -> None:
    with pytest.raises(UserError, match="--max_length 3"):
        group.main(["preview", "--model_name", folder, "--max_length", "3"], standalone_mode=False)


def test_deepspeed_is_not_imported(folder: str, jsonl: WriteJsonLines) -> None:
    name = jsonl([{"instruction": "q", "output": "a"}])
    code = (
        "import sys; from superoffload.commands import group; "
        f"group.main(['preview', '--model_name', {folder!r}, '--dataset_name', {name!r}], standalone_mode=False); "
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
