import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from superoffload import commands
from superoffload.planning import environment
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
        "HOME": "/home/ada",
        "WANDB_HTTP_HEADERS": "secret6",
        "AWS_SECRET_ACCESS_KEY": "secret5",
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
    }
    assert "secret" not in str(shown)


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


def test_the_commit_is_that_of_the_checkout(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) == "not a checkout"
    if (REPOSITORY / ".git").exists():
        assert len(environment.commit(REPOSITORY).removesuffix("-dirty")) >= 7
