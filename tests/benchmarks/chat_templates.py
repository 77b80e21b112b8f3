"""Write the table of chat templates in docs/chat_templates.md: python -m tests.benchmarks.chat_templates."""

from pathlib import Path

from tests.helpers import chat_templates

PAGE = Path(__file__).parents[2] / "docs" / "chat_templates.md"


def with_table(text: str) -> str:
    """Replace the table of a page, which begins with its first line of cells and ends with its last."""
    lines = text.splitlines(keepends=True)
    rows = [number for number, line in enumerate(lines) if line.startswith("| ")]
    return "".join([*lines[: rows[0]], chat_templates.table(), *lines[rows[-1] + 1 :]])


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
