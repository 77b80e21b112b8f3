from dataclasses import replace
from pathlib import Path

import pytest

from superoffload.planning.checks import storage
from superoffload.planning.checks.finding import GIB
from tests.helpers import machines

pytestmark = pytest.mark.unit

FOLDER = Path("/data")


@pytest.mark.parametrize(
    ("free_gib", "rate", "problem", "verdict", "text"),
    [
        (
            1000,
            2e9,
            None,
            "good",
            "1000.0 GiB free, enough for a checkpoint of 89.5 billion parameters; written at 2.0 GB/s",
        ),
        (1000, 0.1e9, None, "slow", "so a checkpoint of 8 billion takes 16.0 min"),
        (1000, None, None, "good", "not timed"),
        (0.5, None, None, "broken", "0.5 GiB free"),
        (1000, None, "may not be written to", "broken", "may not be written to"),
    ],
)
def test_disk(free_gib: float, rate: float | None, problem: str | None, verdict: str, text: str) -> None:
    found = storage.disk_finding(FOLDER, int(free_gib * GIB), rate, problem)
    assert (found.verdict, bool(found.fix)) == (verdict, verdict != "good")
    assert text in found.found


def test_a_write_is_timed_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WRITTEN_BYTES", storage.BLOCK_BYTES)
    around = machines.around(tmp_path)
    (found,) = storage.disk(around)
    assert around.measured["disk_write_bytes_per_s"] > 0
    assert "written at" in found.found
    assert list(tmp_path.iterdir()) == []


def test_quick_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "write_rate", lambda folder: pytest.fail("written"))
    around = machines.around(tmp_path, quick=True)
    (found,) = storage.disk(around)
    assert (found.verdict, around.measured) == ("good", {})


def test_a_folder_that_takes_no_files_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> float:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(storage, "write_rate", full)
    (found,) = storage.disk(machines.around(tmp_path))
    assert (found.verdict, found.found) == ("broken", "cannot be written to: Disk quota exceeded")


def test_a_folder_without_permission_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write anywhere
    (found,) = storage.disk(machines.around(tmp_path))
    assert (found.verdict, found.found, found.looked_at) == ("broken", "may not be written to", str(tmp_path))


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/again"])
def test_a_file_in_the_place_of_the_folder_is_broken(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (found,) = storage.disk(replace(machines.around(tmp_path), output_dir=tmp_path / name))
    assert (found.verdict, found.found, found.looked_at) == ("broken", "is no folder", str(tmp_path / "file"))
