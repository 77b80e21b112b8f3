import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from superoffload import commands
from superoffload.planning import environment
from superoffload.planning.checks.finding import public
from tests.helpers.ranks import REPOSITORY


@pytest.mark.unit
def test_secrets_are_named_and_not_shown() -> None:
    given = {
        "WANDB_API_KEY": "secret1",
        "HF_TOKEN": "secret2",
        "HUGGING_FACE_HUB_TOKEN": "secret3",
        "NCCL_DEBUG": "INFO",
        "HF_ENDPOINT": "https://user:secret4@hub.example/x",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HOME": "/users/ada",
        "WANDB_HTTP_HEADERS": "secret6",
        "AWS_SECRET_ACCESS_KEY": "secret5",
        "HTTPS_PROXY": "http://user:secret7@proxy",
        "SLURM_JOB_USER": "secret8",
        "WANDB_USERNAME": "secret9",
    }
    shown = environment.variables(given)
    assert shown == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "HF_ENDPOINT": "https://...@hub.example/x",
        "HF_TOKEN": "set, not shown",
        "NCCL_DEBUG": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_API_KEY": "set, not shown",
        "WANDB_HTTP_HEADERS": "set, not shown",
        "SLURM_JOB_USER": "set, not shown",
        "WANDB_USERNAME": "set, not shown",
    }
    assert "secret" not in str(shown)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://ada:pass@word@hub.example/x", "https://...@hub.example/x"),
        ("http://a:b@one,http://c:d@two", "http://...@one,http://...@two"),
        ("https://wandb.example/?api=abc&x=1", "https://wandb.example/?api=...&x=..."),
        ("hf_abcdefghijklmnopqrstuv", "..."),
        ("hf_home", "hf_home"),
        ("0123456789abcdef0123456789abcdef01234567", "..."),
        ("/users/ada/cache:/users/ada", "~/cache:~"),
        ("/users/adam/cache:/data/users/ada", "/users/adam/cache:/data/users/ada"),
    ],
)
def test_values_name_no_secret_and_no_person(monkeypatch: pytest.MonkeyPatch, value: str, shown: str) -> None:
    monkeypatch.setenv("HOME", "/users/ada")
    assert public(value) == shown


@pytest.mark.unit
@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nmodel name : AMD EPYC 9554\nflags : fpu avx2 avx512f\n", "AMD EPYC 9554 (avx2, avx512f)"),
        ("processor : 0\nFeatures : fp asimd sve sve2\nCPU part : 0xd4f\n", "0xd4f (asimd, sve, sve2)"),
    ],
)
def test_the_processor_and_its_vectors(cpuinfo: str, expected: str) -> None:
    assert environment.processor(cpuinfo) == expected


def test_the_report_of_this_machine() -> None:
    result = CliRunner().invoke(commands.group, ["env", "--json"], standalone_mode=False, catch_exceptions=False)
    report = json.loads(result.stdout)
    assert list(report) == ["superoffload", "packages", "torch", "machine", "variables"]
    assert {"Python", "torch", "deepspeed", "transformers", "wandb"} <= set(report["packages"])
    assert "GiB" in report["machine"]["host memory"]
    assert report["variables"]["OMP_NUM_THREADS"] == "1"
    text = CliRunner().invoke(commands.group, ["env"], standalone_mode=False, catch_exceptions=False).stdout
    assert text.startswith("superoffload\n  version  ")
    assert f"  deepspeed        {report['packages']['deepspeed']}\n" in text


def test_a_package_that_is_not_installed_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "installed_version", lambda name: None)
    monkeypatch.setenv("CXX", "env c++")
    report = environment.collect()
    assert report["superoffload"]["version"] == report["packages"]["torch"] == "not installed"
    assert report["torch"]["compiler"] not in ("none", "")


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) == "not a checkout"
    assert environment.commit(REPOSITORY / "superoffload") == "not a checkout"  # such as site-packages inside another
    if (REPOSITORY / ".git").exists():
        assert len(environment.commit(REPOSITORY).removesuffix("-dirty")) >= 7
