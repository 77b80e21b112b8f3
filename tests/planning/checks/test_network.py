from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, errors

from superoffload import hub
from superoffload.hub import Answer
from superoffload.planning.checks import network
from tests.helpers import machines

pytestmark = pytest.mark.unit


def answer(*, has_token: bool = False, account: str | None = None, problem: str | None = None) -> Answer:
    return Answer(endpoint="https://hub.example", has_token=has_token, account=account, problem=problem)


@pytest.mark.parametrize(
    ("given", "verdict", "text", "fix"),
    [
        (None, "skipped", "offline", ""),
        (answer(), "good", "reachable, not logged in", "$ hf auth login"),
        (answer(has_token=True, account="ada"), "good", "logged in as ada", ""),
        (answer(has_token=True), "broken", "refuses the token", "$ hf auth login"),
        (answer(problem="timed out"), "slow", "wait for it: timed out", "$ export HF_HUB_OFFLINE=1"),
    ],
)
def test_hub(given: Answer | None, verdict: str, text: str, fix: str) -> None:
    found = network.hub_finding(given)
    assert found.verdict == verdict
    assert text in found.found
    assert found.fix.splitlines()[-1:] == [fix][: bool(fix)]


def test_a_password_in_the_address_is_not_shown() -> None:
    given = Answer(endpoint="https://ada:secret@hub.example", has_token=False, account=None, problem=None)
    assert network.hub_finding(given).looked_at == "https://...@hub.example"


def session(monkeypatch: pytest.MonkeyPatch, *, status: int = 200, error: Exception | None = None) -> list[float]:
    """Let the hub answer with a status, or not at all; return the time limits that it was asked with."""
    limits: list[float] = []

    def get(address: str, *, headers: dict[str, str], timeout: float) -> Any:
        limits.append(timeout)
        if error:
            raise error
        return SimpleNamespace(status_code=status, json=lambda: {"name": "ada"})

    monkeypatch.setattr(hub, "get_session", lambda: SimpleNamespace(get=get))
    return limits


@pytest.mark.parametrize(
    ("status", "account", "problem"),
    [(200, "ada", None), (401, None, None), (503, None, "it answered with status 503")],
)
def test_the_hub_is_asked_once_with_a_limit(
    monkeypatch: pytest.MonkeyPatch, status: int, account: str | None, problem: str | None
) -> None:
    limits = session(monkeypatch, status=status)
    found = hub.who_am_i(2.0)
    assert (found.account, found.problem, limits) == (account, problem, [2.0])


@pytest.mark.parametrize("error", [errors.HTTPError("no route"), ConnectionError("no route")])
def test_a_hub_that_cannot_be_reached_is_no_error(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    session(monkeypatch, error=error)
    assert hub.who_am_i(2.0).problem == "no route"


def test_offline_mode_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = session(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (found,) = network.hub(machines.around(tmp_path))
    assert (found.verdict, limits) == ("skipped", [])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (found,) = network.hub(machines.around(tmp_path))
    assert (found.verdict, len(limits)) == ("good", 1)


@pytest.mark.parametrize(
    ("environment", "logins", "text"),
    [
        ({}, {}, "no key, which is needed only with --use_wandb"),
        ({"WANDB_MODE": "offline"}, {}, "WANDB_MODE is offline"),
        ({"WANDB_API_KEY": "secret"}, {}, "a key for api.wandb.ai"),
        ({}, {"api.wandb.ai": "user"}, "a key for api.wandb.ai"),
        ({"WANDB_BASE_URL": "https://w.example:8080/x"}, {"api.wandb.ai": "user"}, "no key"),
        ({"WANDB_BASE_URL": "https://w.example:8080/x"}, {"w.example": "user"}, "a key for w.example"),
    ],
)
def test_wandb(environment: dict[str, str], logins: dict[str, str], text: str) -> None:
    found = network.wandb_finding(environment, logins)
    assert found.verdict == "good"
    assert text in found.found
    assert "secret" not in str(found)
    assert ("wandb login" in found.fix) == ("no key" in text)


def test_the_netrc_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine api.wandb.ai login user password secret\n")
    path.chmod(0o600)
    (found,) = network.wandb(machines.around(tmp_path, environment={"NETRC": str(path)}))
    assert found.found == "a key for api.wandb.ai"
    path.write_text("nonsense")
    (found,) = network.wandb(machines.around(tmp_path, environment={"NETRC": str(path)}))
    assert found.found.startswith("no key")
