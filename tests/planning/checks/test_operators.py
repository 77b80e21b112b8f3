import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import setuptools  # type: ignore[import-untyped]  # noqa: F401 - before anything imports distutils, which it replaces

from superoffload.planning.checks import child, finding, operators
from superoffload.planning.checks.child import Outcome
from superoffload.planning.checks.finding import Finding
from tests.helpers import machines
from tests.helpers.ranks import REPOSITORY

FAILED_BUILD = """Error building extension 'cpu_adam': [1/3] c++ -MMD -MF cpu_adam.o.d -c /ds/cpu_adam.cpp -o cpu_adam.o
FAILED: [code=1] cpu_adam.o
c++ -MMD -MF cpu_adam.o.d -c /ds/cpu_adam.cpp -o cpu_adam.o
In file included from /ds/cpu_adam.cpp:6:
/torch/extension.h:5:10: fatal error: Python.h: No such file or directory
compilation terminated.
ninja: build stopped: subcommand failed.
"""


@pytest.mark.unit
@pytest.mark.parametrize(
    ("version", "ninja", "verdict", "found", "fix"),
    [
        ("g++ 12.2.0", "/bin/ninja", "good", "g++ 12.2.0", ""),
        (None, "/bin/ninja", "broken", "the C++ compiler c++ not found", "apt-get install g++"),
        ("g++ 12.2.0", None, "broken", "ninja not found", "-m pip install ninja"),
        (None, None, "broken", "the C++ compiler c++ and ninja not found", "-m pip install ninja"),
    ],
)
def test_compiler(version: str | None, ninja: str | None, verdict: str, found: str, fix: str) -> None:
    line = operators.compiler_finding("c++", version, ninja)
    assert (line.verdict, line.found) == (verdict, found)
    assert fix in line.fix


def test_the_compiler_of_this_machine_is_found(tmp_path: Path) -> None:
    (found,) = operators.compiler(machines.around(tmp_path))
    assert found.verdict == "good"
    (missing,) = operators.compiler(machines.around(tmp_path, environment={"CXX": "no-such-compiler"}))
    assert missing.found == "the C++ compiler no-such-compiler not found"
    (wrapped,) = operators.compiler(machines.around(tmp_path, environment={"CXX": "env c++"}))
    assert (wrapped.verdict, wrapped.found) == ("good", found.found)
    (failing,) = operators.compiler(machines.around(tmp_path, environment={"CXX": "sh -c 'echo no licence; exit 1'"}))
    assert (failing.verdict, failing.looked_at) == ("broken", "CXX, PATH")
    assert "failed: no licence" in failing.found
    assert "$ unset CXX" in failing.fix


@pytest.mark.unit
def test_an_environment_without_pip_is_changed_by_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.compiler_finding("c++", "g++", None).fix == f"$ {sys.executable} -m pip install ninja"
    monkeypatch.setattr(finding, "find_spec", lambda name: None)
    assert operators.compiler_finding("c++", "g++", None).fix == f"$ uv pip install ninja --python {sys.executable}"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FAILED_BUILD, "/torch/extension.h:5:10: fatal error: Python.h: No such file or directory"),
        (
            "Error building extension 'x'\n/bin/ld: cannot find -lcurand: No such file",
            "/bin/ld: cannot find -lcurand: No such file",
        ),
        ("/ops/cpu_adam.so: undefined symbol: _ZN3c10", "/ops/cpu_adam.so: undefined symbol: _ZN3c10"),
        ("Unable to JIT load the cpu_adam op", "Unable to JIT load the cpu_adam op"),
        ("", "no message"),
    ],
)
def test_the_compilers_own_error_is_shown(text: str, expected: str) -> None:
    assert operators.compiler_error(text) == expected


def judge(*results: dict[str, Any], failure: str | None = None) -> list[Finding]:
    return list(operators.operator_findings(Outcome(results=list(results), failure=failure), "compiled and loaded now"))


@pytest.mark.unit
def test_an_operator_that_fails_is_broken_and_the_fused_kernel_only_slow() -> None:
    found = judge(
        {"started": "cpu_adam"},
        {"operator": "cpu_adam", "error": FAILED_BUILD},
        {"started": "superoffload_fused"},
        {"operator": "superoffload_fused", "error": "c++: error: no"},
        {"started": "deepspeed_shm_comm"},
        {"operator": "deepspeed_shm_comm", "error": None},
    )
    assert [line.verdict for line in found] == ["broken", "slow", "good"]
    assert found[0].found.startswith("cpu_adam fails, so runs cannot start: /torch/extension.h:5:10: fatal error")
    assert "apt-get install python3-dev" in found[0].fix
    assert "-m superoffload.planning.checks.measure operators" in found[1].fix


@pytest.mark.unit
def test_an_operator_that_kills_the_process_is_broken() -> None:
    (found,) = judge({"started": "cpu_adam"}, failure="killed by SIGILL")
    assert (found.verdict, found.found) == (
        "broken",
        "cpu_adam fails, so runs cannot start: its process ended: killed by SIGILL",
    )
    assert "another processor" in found.fix
    assert found.fix.endswith("/cpu_adam")


@pytest.mark.unit
def test_a_folder_that_cannot_be_written_to_is_no_fault_of_the_compiler() -> None:
    error = "[Errno 30] Read-only file system: '/users/ada/.cache/torch_extensions'"
    (found,) = judge({"started": "cpu_adam"}, {"operator": "cpu_adam", "error": error})
    assert found.fix == "Let TORCH_EXTENSIONS_DIR name a folder that can be written to."


@pytest.mark.unit
def test_a_process_that_fails_before_the_first_operator_says_why() -> None:
    with pytest.raises(RuntimeError, match="ModuleNotFoundError: No module named 'deepspeed'"):
        judge(failure="ModuleNotFoundError: No module named 'deepspeed'")


@pytest.mark.unit
@pytest.mark.parametrize(("copy_gb_per_s", "verdict"), [(14.0, "good"), (28.1, "slow")])
def test_adam_is_compared_with_a_copy(copy_gb_per_s: float, verdict: str) -> None:
    """At 28 bytes a parameter, a billion parameters a second are 28 GB/s; a copy reads and writes each byte."""
    measured = {"adam_parameters_per_s": 1e9, "host_copy_bytes_per_s": copy_gb_per_s * 1e9}
    found = operators.adam_finding(measured, 8)
    assert (found.verdict, bool(found.fix)) == (verdict, verdict == "slow")
    assert f"1.00 billion parameters/s on 8 cores: 28.0 GB/s, a copy reaches {2 * copy_gb_per_s:.1f}" in found.found


@pytest.mark.unit
def test_nothing_is_measured_with_quick_or_without_adam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = list(operators.operators(machines.around(tmp_path, quick=True)))
    assert [line.verdict for line in quick] == ["skipped", "skipped"]
    outcome = Outcome(results=[{"started": "cpu_adam"}, {"operator": "cpu_adam", "error": "no"}], failure=None)
    monkeypatch.setattr(child, "run", lambda part: outcome)
    assert [line.verdict for line in operators.operators(machines.around(tmp_path))] == ["broken", "skipped"]


@pytest.mark.unit
def test_a_step_of_adam_that_fails_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator of another processor may load, and fail at its first instruction."""
    built = Outcome(results=[{"started": "cpu_adam"}, {"operator": "cpu_adam", "error": None}], failure=None)
    outcomes = {"operators": built, "adam": Outcome(results=[], failure="killed by SIGILL")}
    monkeypatch.setattr(child, "run", lambda part, environment=None: outcomes[part])
    around = machines.around(tmp_path)
    found = list(operators.operators(around))
    assert [(line.name, line.verdict) for line in found] == [("operator", "good"), ("Adam", "broken")]
    assert "$ rm -r " in found[1].fix
    assert around.measured == {}


def test_a_compiler_that_fails_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real build with a compiler that answers questions about itself and compiles nothing."""
    compiler = tmp_path / "failing-c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *" -c "*) echo "source.cpp:1:1: error: out of registers" >&2; exit 1;; esac\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "operators"))
    found = list(operators.operators(machines.around(tmp_path)))
    assert [(line.name, line.verdict) for line in found] == [
        ("operator", "broken"),
        ("operator", "broken"),
        ("operator", "slow"),
        ("Adam", "skipped"),
    ]
    assert found[0].found == "cpu_adam fails, so runs cannot start: source.cpp:1:1: error: out of registers"


def test_a_measurement_that_hangs_ends_with_all_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    program = f"import subprocess; subprocess.run(['sh', '-c', 'echo $$ > {note}; exec sleep 600'])"
    monkeypatch.setattr(child, "_COMMAND", (sys.executable, "-c", program))
    outcome = child.run("operators", timeout_s=8.0)
    assert (outcome.results, outcome.failure) == ([], "not finished after 8 s")
    pid = int(note.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_during_a_build_leaves_no_compiler_and_no_lock(tmp_path: Path) -> None:
    """ninja starts compilers in process groups of their own, and the next process would wait for torch's lock."""
    note, folder, compiler = tmp_path / "pid", tmp_path / "operators", tmp_path / "slow-c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ > {note}; exec sleep 600;; esac\nexec c++ "$@"\n')
    compiler.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "superoffload.commands", "doctor", "--output_dir", str(tmp_path)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(folder), "HF_HUB_OFFLINE": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job of a shell ignores it
    )  # fmt: skip
    try:
        while not (note.is_file() and note.read_text().strip()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        assert list(folder.glob("*/lock"))
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, output) == (130, "")
    assert "Traceback" not in errors
    assert list(folder.glob("*/lock")) == []
    pid = int(note.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("program", "results", "failure"),
    [
        ("print('noise'); print('RESULT {\"a\": 1}')", [{"a": 1}], None),
        ("import os; print('RESULT {\"a\": 1}', flush=True); os.kill(os.getpid(), 4)", [{"a": 1}], "killed by SIGILL"),
        ("raise ValueError('what is wrong')", [], "ValueError: what is wrong"),
        ("raise SystemExit(3)", [], "exit status 3"),
    ],
)
def test_how_a_measurement_ended_is_known(
    monkeypatch: pytest.MonkeyPatch, program: str, results: list[dict[str, Any]], failure: str | None
) -> None:
    monkeypatch.setattr(child, "_COMMAND", (sys.executable, "-c", program))
    outcome = child.run("operators")
    assert (outcome.results, outcome.failure) == (results, failure)
