"""Holds the documents to the repository: links, paths, flags, the tree, and the functions that are named."""

import ast
import re
from pathlib import Path

import click
import pytest

from superoffload import commands, config
from tests.helpers import documents, overlap
from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.unit

ARCHITECTURE = documents.read(REPOSITORY / "docs/architecture.md")
PACKAGE = REPOSITORY / "superoffload"
each_document = pytest.mark.parametrize("path", documents.DOCUMENTS, ids=documents.name)


def anchors(text: str) -> set[str]:
    """List the anchors of a document: its headings, as a renderer of Markdown turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", documents.without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]*)\)", documents.without_blocks(documents.read(path))):
        if target.startswith("https://"):  # tests use no network
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(documents.read(linked)), target


@each_document
def test_every_path_exists(path: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", documents.without_blocks(documents.read(path)))
    roots = r"(?:superoffload|tests|scripts|docs|configs|\.ci)/"
    for found in {word for span in spans for word in re.findall(rf"(?<![\w./]){roots}[\w./-]*", span)}:
        assert "NAME" in found or (REPOSITORY / found).exists(), found


@each_document
def test_every_flag_exists(path: Path) -> None:
    known = {f"--{name}" for name in config.SPECS} | {"--no_packing", "--no_preflight", "--help"}
    for command in commands.group.commands.values():
        known |= {flag for option in command.params if isinstance(option, click.Option) for flag in option.opts}
    for script in ("test.sh", "lock.sh"):
        known |= set(re.findall(r"--[a-z]+", (REPOSITORY / "scripts" / script).read_text(encoding="utf-8")))
    found = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", documents.without_blocks(documents.read(path))))
    assert found - known - {"--flag", "--no_NAME"} == set()  # the last two stand for any


def test_the_index_lists_every_page() -> None:
    index = documents.read(REPOSITORY / "docs/README.md")
    pages = {path.name for path in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    assert sorted(re.findall(r"^\* \[[^\]]*\]\((\w+\.md)\)", index, re.M)) == sorted(pages)


def test_the_messages_of_the_symptoms_are_those_of_the_program() -> None:
    """Each message in a first column, in parts of two words or more, is in the code; `...` stands for values."""
    others = {"No such option", "launcher 'pdsh' not installed"}  # click's and DeepSpeed's
    files = [*PACKAGE.rglob("*.py"), *(REPOSITORY / "scripts").glob("*.sh")]
    code = re.sub(r'"\s*\\?\s*f?"', " ", " ".join(map(documents.read, files)))  # joins literals
    code = re.sub(r"[\s\\]+", " ", code).lower()
    found = 0
    for page in ("troubleshooting", "multi_node"):
        text = documents.read(REPOSITORY / f"docs/{page}.md")
        symptoms = [row[0] for table in documents.tables(text) if table[0][0] == "you see" for row in table[1:]]
        for message in re.findall(r"`([^`]*)`", " ".join(symptoms)):
            for part in message.split("..."):
                words = part.strip(" ().,")
                if len(words.split()) > 1 and words not in others:
                    assert words.lower() in code, message
                    found += 1
    assert found > 30


def test_the_drawing_of_the_overlap_is_what_the_program_writes() -> None:
    """And it shows what the text says: the clipped step waits for all of Adam, the other for one sub-group."""
    assert documents.read(REPOSITORY / "docs/overlap.svg") == overlap.draw()
    accepted, clipped, offload = (
        sum(end - start for _, start, end, kind, _ in line.blocks if kind == "idle") for line in overlap.timelines()
    )
    assert 3 * accepted < len(overlap.SUB_GROUPS) * overlap.STEP < clipped < offload


def test_the_tree_is_that_of_the_repository() -> None:
    """Every name in the tree is a file or folder, and every file of the package is in the tree."""
    (tree,) = [block for block in documents.blocks(ARCHITECTURE, "") if block.startswith("finetune_zero3.py")]
    folders: list[str] = []
    named: set[Path] = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r", ", re.split(r"\s{2,}", line.strip())[0]):
            found = set(REPOSITORY.glob("/".join([*folders[:depth], name.rstrip("/")])))
            assert found, line
            assert not found & named, f"{line}: named twice"
            named |= found
            if name.endswith("/"):
                folders[depth:] = [name.rstrip("/")]
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    files |= {path for path in (REPOSITORY / "scripts").iterdir() if path.is_file()}
    assert {path.name for path in files - named} <= {"__init__.py", "py.typed"}


def definitions(path: Path) -> set[str]:
    """List the functions, classes and methods of a file; methods as `Class.method`."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def test_every_function_of_the_walks_exists() -> None:
    walks = [table[1:] for table in documents.tables(ARCHITECTURE) if table[0][:2] == ["file", "function"]]
    assert len(walks) == 3
    for file, functions, _ in (row for walk in walks for row in walk):
        path = REPOSITORY / "finetune_zero3.py" if file == "`finetune_zero3.py`" else PACKAGE / file.strip("`")
        missing = set(re.findall(r"`([\w.]+)`", functions)) - definitions(path)
        assert not missing, f"{file}: {missing}"


def test_the_formats_are_those_of_the_setting() -> None:
    table = next(
        table
        for table in documents.tables(documents.read(REPOSITORY / "docs/data.md"))
        if table[0][0] == "`--dataset_format`"
    )
    choices = config.SPECS["dataset_format"].metadata["choices"]
    assert ["auto", *(row[0].strip("`") for row in table[1:])] == list(choices)
