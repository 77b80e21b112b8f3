"""The documents of the repository, and what they contain."""

import re
from pathlib import Path

from tests.helpers.ranks import REPOSITORY

DOCUMENTS = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    REPOSITORY / "CHANGELOG.md",
    *sorted((REPOSITORY / "docs").glob("**/*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name(path: Path) -> str:
    """Return a document's name for the id of a test."""
    return str(path.relative_to(REPOSITORY))


def blocks(text: str, language: str) -> list[str]:
    """List the fenced blocks of a language; blocks without one have the language ''."""
    return [content for found, content in FENCE.findall(text) if found == language]


def without_blocks(text: str) -> str:
    """Return the text outside of fenced blocks."""
    return FENCE.sub("", text)


def tables(text: str) -> list[list[list[str]]]:
    """List the tables: rows of cells, the heading first, without the line of dashes."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    return [
        [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if "---" not in line]
        for table in found
    ]
