"""The report as a whole: this machine for real, texts, exit statuses, and that nothing remains."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from superoffload import commands
from superoffload.planning import doctor, machine
from superoffload.planning.checks import storage
from superoffload.planning.checks.finding import Finding, Surroundings, Verdict, size
from tests.helpers import machines
from tests.helpers.ranks import REPOSITORY

GOOD = Finding(name="huge pages", looked_at="/sys/x", found="advise", verdict="good")
FULL = {"adam_parameters_per_s": 1e9, "host_copy_bytes_per_s": 2e10, "disk_write_bytes_per_s": 1e9}


def finding(verdict: Verdict, fix: str = "") -> Finding:
    return Finding(name="disk", looked_at="/data", found="what was found", verdict=verdict, fix=fix)


def cleared(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Keep the rates of the test in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.mark.unit
def test_a_check_that_fails_is_a_finding_and_ends_no_other(tmp_path: Path) -> None:
    def fails(around: Surroundings) -> Iterator[Finding]:
        yield finding("good")
        raise ValueError("\nfirst line\nsecond line")

    found = doctor.examine(machines.around(tmp_path), {"what fails": fails, "pages": lambda around: [GOOD]})
    assert [(line.name, line.verdict, line.found) for line in found] == [
        ("disk", "good", "what was found"),
        ("what fails", "broken", "first line"),
        ("huge pages", "good", "advise"),
    ]


@pytest.mark.unit
def test_what_libraries_print_stays_out_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def noisy(around: Surroundings) -> list[Finding]:
        print("noise of a library")
        return [GOOD]

    doctor.examine(machines.around(tmp_path), {"noisy": noisy})
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "noise of a library\n")


@pytest.mark.unit
def test_lines_fit_80_columns_and_commands_stay_whole() -> None:
    command = "$ rm " + " ".join(f"/dev/shm/deepspeed_{number}" for number in range(9))
    long = Finding(
        name="leftovers",
        looked_at="files in /dev/shm",
        found="nine files of dead runs, 0.6 GiB of memory, and some more words until the line is full",
        verdict="slow",
        fix=f"No process that is visible from here uses them, and it is safe to remove them all at once:\n{command}",
    )
    assert doctor.lines([GOOD, long], 80, colours=False) == [
        "good    huge pages      advise (/sys/x)",
        "slow    leftovers       nine files of dead runs, 0.6 GiB of memory, and some",
        "                        more words until the line is full (files in /dev/shm)",
        "                        > No process that is visible from here uses them, and it",
        "                          is safe to remove them all at once:",
        f"                          {command}",
    ]


@pytest.mark.unit
def test_only_the_verdict_is_coloured() -> None:
    (line,) = doctor.lines([finding("broken")], 80, colours=True)
    assert line == "\x1b[31mbroken  \x1b[0mdisk            what was found (/data)"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("terminal", "variable", "expected"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colours_are_for_terminals(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, variable: str, expected: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", variable)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    assert commands.doctor._takes_colours(stream) == expected


@pytest.mark.unit
@pytest.mark.parametrize(
    ("verdict", "status"), [("good", 0), ("slow", 0), ("unknown", 0), ("skipped", 0), ("broken", 1)]
)
def test_only_what_is_broken_gives_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, status: int
) -> None:
    cleared(monkeypatch, tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda around, checks, starting: [GOOD, finding(verdict)])
    monkeypatch.setattr(machine, "look", machines.machine)
    result = CliRunner().invoke(commands.group, ["doctor"], standalone_mode=False)
    assert result.return_value == status, result.output


@pytest.mark.unit
def test_ctrl_c_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "surroundings", interrupted)
    monkeypatch.setattr(sys, "argv", ["superoffload", "doctor"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 130


@pytest.mark.unit
@pytest.mark.parametrize("missing", [None, *FULL])
def test_rates_are_saved_if_all_of_the_hosts_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str | None
) -> None:
    cleared(monkeypatch, tmp_path)
    seen = machine.look(devices=())
    path = doctor.save_rates({name: rate for name, rate in FULL.items() if name != missing}, seen)
    rates = machine.measured_rates(seen)
    assert (path is None) == (rates is None) == (missing is not None)
    assert rates is None or (rates.adam_parameters_per_s, rates.to_device_bytes_per_s) == (1e9, None)


@pytest.mark.unit
def test_rates_that_cannot_be_saved_are_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    cleared(monkeypatch, tmp_path / "file")
    around = machines.around(tmp_path)
    around.measured.update(FULL)
    report = doctor.diagnose(around, {"pages": lambda around: [GOOD]})
    assert report.rates_file is None
    assert [line.verdict for line in report.findings] == ["good", "slow"]
    assert "XDG_CACHE_HOME" in report.findings[1].fix


@pytest.mark.unit
@pytest.mark.parametrize(
    ("quick", "rates_file", "last"),
    [
        (True, None, "Changed nothing."),
        (False, Path("/c/r.json"), "Changed nothing but compiled operators and the measured rates in /c/r.json."),
        (False, None, "Changed nothing but compiled operators; rates were not saved, as not all could be measured."),
    ],
)
def test_the_last_line_says_what_has_changed(quick: bool, rates_file: Path | None, last: str) -> None:
    report = doctor.Report(findings=[GOOD, GOOD, finding("broken")], measured={}, rates_file=rates_file)
    assert doctor.summary(report, quick=quick) == ["2 good, 1 broken", last]


@pytest.mark.unit
@pytest.mark.parametrize(("ranks", "devices", "expected"), [(None, 0, 1), (None, 3, 3), (2, 3, 2)])
def test_ranks_are_by_default_the_devices(
    monkeypatch: pytest.MonkeyPatch, ranks: int | None, devices: int, expected: int
) -> None:
    monkeypatch.setattr(machine, "look", lambda: machines.machine((machines.device(),) * devices))
    assert doctor.surroundings(ranks, Path(), quick=True).ranks == expected


@pytest.mark.unit
@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0.0 GiB"), (8 << 20, "8.0 MiB"), (1 << 30, "1.0 GiB"), (1 << 29, "0.5 GiB")]
)
def test_sizes(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_a_missing_library_is_a_finding() -> None:
    """The report would be of no use if it could not be written without what it looks for."""
    program = (
        "import sys\n"
        "for name in ('huggingface_hub', 'psutil'): sys.modules[name] = None\n"
        "from superoffload.planning import doctor\n"
        "checks = {'hub': doctor.CHECKS['hub']}\n"
        "(found,) = doctor.examine(doctor.surroundings(1, doctor.Path(), quick=True), checks)\n"
        "print(found.verdict, found.found)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.startswith("broken import of huggingface_hub halted")


@pytest.mark.unit
@pytest.mark.parametrize("columns", ["1", "40", "500"])
def test_a_narrow_terminal_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, columns: str) -> None:
    cleared(monkeypatch, tmp_path)
    monkeypatch.setenv("COLUMNS", columns)
    long = finding("slow", "What to do about it, " * 9)
    monkeypatch.setattr(doctor, "examine", lambda around, checks, starting: [long])
    monkeypatch.setattr(machine, "look", machines.machine)
    result = CliRunner().invoke(commands.group, ["doctor"], standalone_mode=False, catch_exceptions=False)
    assert max(map(len, result.stdout.splitlines()[:-2])) <= max(60, min(int(columns), 110))


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_this_machine_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every check runs, none fails unexpectedly, and nothing is written."""
    cleared(monkeypatch, tmp_path / "cache")
    (tmp_path / "out").mkdir()
    before = set(os.listdir("/dev/shm"))
    arguments = ["doctor", "--quick", "--json", "--output_dir", str(tmp_path / "out" / "run")]
    result = CliRunner().invoke(commands.group, arguments, standalone_mode=False, catch_exceptions=False)
    report = json.loads(result.stdout)
    names = [line["name"] for line in report["findings"]]
    expected = {
        "versions", "DeepSpeed", "devices", "CUDA", "host memory", "cores", "load", "hyperthreads", "NUMA nodes",
        "threads", "shared memory", "leftovers", "huge pages", "locked memory", "open files", "compiler", "operators",
        "Adam", "attention", "disk", "hub", "W&B",
    }  # fmt: skip
    assert expected <= set(names)
    assert all(line["looked_at"] for line in report["findings"]), "a check has failed"
    assert result.return_value == int(report["broken"]) == int("broken" in [f["verdict"] for f in report["findings"]])
    assert (report["measured"], report["rates_file"]) == ({}, None)
    assert below(tmp_path) == {tmp_path / "out"}
    assert {name for name in os.listdir("/dev/shm") if f"_{os.getpid()}" in name} - before == set()


def test_this_machine_in_full(tmp_path: Path) -> None:
    """Operators build and load, rates are measured and read back, and nothing remains but their file."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "80"}
    (tmp_path / "out").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "superoffload.commands", "doctor", "--output_dir", str(tmp_path / "out"), "--json"],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert result.returncode == int(report["broken"])
    operators = [line for line in report["findings"] if line["name"] == "operator"]
    assert [(line["found"], line["verdict"]) for line in operators] == [
        (f"{name} builds and loads", "good") for name in ("cpu_adam", "deepspeed_shm_comm", "superoffload_fused")
    ]
    measured: dict[str, Any] = report["measured"]
    assert set(measured) >= set(FULL)
    assert all(rate > 1e6 for rate in measured.values())
    with pytest.MonkeyPatch.context() as patched:
        cleared(patched, tmp_path / "cache")
        rates = machine.measured_rates()
        assert str(machine.rates_file()) == report["rates_file"]
    assert rates is not None
    assert rates.adam_parameters_per_s == measured["adam_parameters_per_s"]
    assert [path for path in below(tmp_path) if path.is_file()] == [Path(report["rates_file"])]


def test_help_imports_no_large_library() -> None:
    program = (
        "import sys; from superoffload.commands import doctor, env; "
        "print([name for name in ('torch', 'deepspeed', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
    assert storage.WRITTEN_BYTES >= 64 * 2**20


def test_a_machine_with_devices_is_read_by_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lists two devices, and this environment's torch, which is built for the CPU."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"""#!/bin/sh
case "$*" in
    *memory.total*) cat <<'END'
{machines.SMI}END
    ;;
    *pci.bus_id*) printf 'GPU-aaaa1111-0000, 00000000:3B:00.0\\nGPU-bbbb2222-0000, 00000000:5E:00.0\\n' ;;
    "") echo '| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4 |' ;;
    *) exit 6 ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.version.cuda", None)  # whatever torch is installed
    checks = {name: doctor.CHECKS[name] for name in ("devices", "CUDA", "cores", "device link", "locked memory")}
    around = doctor.surroundings(None, tmp_path, quick=True)
    found = {line.name: line for line in doctor.examine(around, checks)}
    assert around.ranks == 2
    assert (
        found["devices"].verdict,
        "other processes use some memory: 19.5 GiB free on 1" in found["devices"].found,
    ) == (
        "slow",
        True,
    )
    assert found["CUDA"].found.startswith("torch without CUDA, driver up to 12.4, nvcc ")
    assert found["CUDA"].verdict == "broken"
    assert found["device locality"].verdict in ("good", "unknown", "slow")
    assert found["device link"].verdict == "skipped"
    assert all(line.looked_at for line in found.values()), "a check has failed"
