"""Holds the README and the other documents to the code: their commands, what these print, and tables of values."""

import json
import re
import shlex
from pathlib import Path

import pytest

from superoffload import cli, commands
from superoffload.data import formats
from superoffload.planning import fits, recipes
from tests.helpers import documents
from tests.helpers.ranks import REPOSITORY
from tests.helpers.recipes import SCRIPTS, TINY, call, program, seen
from tests.helpers.recipes import stand_in as stand_in

README = documents.read(REPOSITORY / "README.md")
RECIPES_PAGE = documents.read(REPOSITORY / "docs/recipes.md")
MULTI_NODE = REPOSITORY / "docs/multi_node.md"
ASSIGNMENT = re.compile(r"[A-Z_]+=")
# Commands of tools that are not part of this project.
OTHERS = {
    "source .venv/bin/activate",
    "pre-commit install",
    "vllm serve my-model",
    'eval "$(_SUPEROFFLOAD_COMPLETE=bash_source superoffload)"',  # tests/test_config_command.py runs it
    "git switch --detach main",
    "git switch -",
    "git tag v0.2.0",
    "diff <(cut -d, -f1-5 before_output/metrics.jsonl) <(cut -d, -f1-5 after_output/metrics.jsonl)",
    "cmp before_output/global_step30/*_optim_states.pt after_output/global_step30/*_optim_states.pt",
}


def split(line: str) -> tuple[dict[str, str], list[str]]:
    """Split a command line into its assignments of environment variables and its words, without redirections."""
    words = shlex.split(re.sub(r" [<>] ?[\w.]+", "", line), comments=True)
    count = next((i for i, word in enumerate(words) if not ASSIGNMENT.match(word)), len(words))
    return dict(word.split("=", 1) for word in words[:count]), words[count:]


def lines(text: str) -> list[str]:
    return [line for block in documents.blocks(text, "bash") for line in block.splitlines()]


LINES = {line: split(line)[1] for path in documents.DOCUMENTS for line in lines(documents.read(path))}
RECIPES = [line for line, words in LINES.items() if words[0] == "bash" and words[1].startswith("scripts/finetune_")]
PROGRAMS = [line for line, words in LINES.items() if words[0] in ("bash", "python") and line not in RECIPES]
JOBS = [line for line, words in LINES.items() if words[0] == "sbatch"]
SCRIPT = [line for line, words in LINES.items() if words[0] == "deepspeed"]
TOOLS = [line for line, words in LINES.items() if words[0] == "superoffload"]
# Those that need neither a model nor a network are run.
PLANS = [line for line in TOOLS if line.startswith("superoffload plan ") and "llama-" in line]


@pytest.mark.unit
def test_every_command_is_of_a_kind_that_is_tried_here() -> None:
    assert set(LINES) - {*RECIPES, *PROGRAMS, *JOBS, *SCRIPT, *TOOLS} == OTHERS
    in_readme = lines(README)
    assert not [line for line in in_readme if line in PROGRAMS]
    assert len([line for line in in_readme if line in RECIPES]) >= 4
    assert [line for line in in_readme if line in SCRIPT]
    assert [line for line in in_readme if line in TOOLS]


@pytest.mark.parametrize("line", RECIPES)
def test_a_recipe_is_called_correctly(line: str, stand_in: Path) -> None:
    env, words = split(line)
    script = REPOSITORY / words[1]
    if "HOSTFILE" in env:
        hosts = next(block for block in documents.blocks(documents.read(MULTI_NODE), "") if "slots=" in block)
        (stand_in.parent / "elsewhere").mkdir()
        (stand_in.parent / "elsewhere" / env["HOSTFILE"]).write_text(hosts)
    if script == TINY:  # tests/test_tiny_example.py runs it
        program(stand_in / "superoffload", "true")
    result = call(script, stand_in, *words[2:], **{**env, "OUTPUT_DIR": "out"})
    if env.get("DRY_RUN") == "1":
        assert result.returncode == 0, result.stderr
        cli.parse(shlex.split(result.stdout.splitlines()[-1].partition("finetune_zero3.py ")[2]))
    else:
        assert result.returncode == 7, result.stderr  # the stand-in's
        cli.parse(seen(stand_in)[1])


@pytest.mark.parametrize("line", JOBS)
def test_a_job_starts_its_recipe(line: str, stand_in: Path) -> None:
    """Run the script as Slurm does, with one node; what precedes the script are flags of sbatch."""
    _, words = split(line)
    at = words.index("scripts/slurm.sh")
    assert all(re.fullmatch(r"--(nodes|gpus-per-node)=\d+", word) for word in words[1:at])
    program(stand_in / "scontrol", "echo node1")
    program(stand_in / "srun", 'shift; export SLURM_NODEID=0; exec "$@"')
    recipe, *arguments = words[at + 1 :]
    job = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "OUTPUT_DIR": "out"}
    result = call(REPOSITORY / words[at], stand_in, str(REPOSITORY / recipe), *arguments, **job)
    assert result.returncode == 7, result.stderr  # the stand-in's
    cli.parse(seen(stand_in)[1])


@pytest.mark.unit
@pytest.mark.parametrize("line", PROGRAMS)
def test_a_program_exists_and_knows_its_flags(line: str) -> None:
    _, words = split(line)
    path = REPOSITORY / (words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1])
    text = path.read_text(encoding="utf-8")
    for word in words[2:]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", text), f"{words[1]} has no {word}"
        elif "/" in word:
            assert (REPOSITORY / word).exists(), word


@pytest.mark.unit
@pytest.mark.parametrize("line", SCRIPT)
def test_the_script_takes_the_flags(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, *_ = documents.blocks(documents.read(REPOSITORY / "docs/config_file.md"), "yaml")
    (tmp_path / "run.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    _, words = split(line)
    flags = words[words.index("finetune_zero3.py") + 1 :]
    if flags == ["--help"]:
        with pytest.raises(SystemExit, match="0"):
            cli.parse(flags)
    else:
        cli.parse(flags)


@pytest.mark.unit
@pytest.mark.parametrize("line", TOOLS)
def test_the_tool_takes_the_arguments(line: str) -> None:
    _, words = split(line)
    commands.group.commands[words[1]].make_context(words[1], words[2:])


@pytest.mark.parametrize("line", PLANS)
def test_a_plan_runs(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the run fits is not checked: some examples show one that does not, some depend on this machine."""
    status = commands.group.main(split(line)[1][1:], standalone_mode=False)
    shown = capsys.readouterr().out
    assert status in (0, 1, None)
    assert "FIT" in shown or json.loads(shown)["model"]


def test_the_dry_run_prints_what_is_shown(stand_in: Path) -> None:
    line, shown = re.search(r"`(DRY_RUN=1 [^`]*)`[^`]*```\n(.*?)```", RECIPES_PAGE, re.S).groups()  # type: ignore[union-attr]
    env, words = split(line)
    result = call(REPOSITORY / words[1], stand_in, *words[2:], **env)
    assert result.stdout.replace(str(REPOSITORY), "...").rstrip() == shown.replace(" \n", "\n").rstrip()


def test_the_lines_for_transformers_run(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my-model").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)
    (block,) = documents.blocks(README, "python")
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Once upon a time")


@pytest.mark.unit
def test_the_examples_of_rows_have_the_format_that_is_said() -> None:
    table = next(table for table in documents.tables(README) if table[0] == ["format", "a row"])
    for name, row in table[1:]:
        values = json.loads(row.strip("`"))
        assert formats.detect(list(values), "auto", None, "README.md").name == name.strip("`")
    assert {name.strip("`") for name, _ in table[1:]} == set(formats.REQUIRED)


@pytest.mark.unit
def test_the_table_of_recipes_is_what_the_program_writes() -> None:
    written = fits.table()
    assert {row[0].strip("`") for row in documents.tables(written)[0][1:]} == {
        path.name for path in SCRIPTS.glob("finetune_*gpu.sh")
    }
    assert written in README, f"the table is now:\n{written}"


@pytest.mark.unit
def test_several_gpus_need_numactl_as_the_readme_says() -> None:
    assert "Recipes for several GPUs need numactl" in README
    for name in recipes.names():
        assert (recipes.values(name)["BIND_CORES"] == "true") == (recipes.devices(name) > 1)


@pytest.mark.unit
def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 170
