"""In the templates of real model families, the targets are what generation marks enclose, or the row is refused."""

import re

import pytest

from tests.benchmarks import chat_templates as table
from tests.helpers import chat_templates
from tests.helpers.chat_templates import CONVERSATIONS, without_end

pytestmark = pytest.mark.unit

# The marks of GLM end a turn with the header of the next role, and those of Gemma leave out the token that asks for
# the result of a tool, with which its own template ends a call.
OTHER_END = {"glm4moe", "diffusion_gemma"}


@pytest.mark.parametrize("kind", ["gpt2", "metaspace", "llama2"])
@pytest.mark.parametrize("name", chat_templates.families())
def test_targets_are_what_the_marks_enclose(name: str, kind: str) -> None:
    for title, turns in CONVERSATIONS.items():
        result = chat_templates.found(name, turns, kind)
        if result.refused:
            assert "template" in result.refused, title
            continue
        expected = chat_templates.right(name, turns, chat_templates.found(name, turns))
        assert expected is not None, f"{title}: the marks leave something out, but the targets are {result.targets}"
        found = [text.rstrip() for text in result.targets]
        if kind != "gpt2":  # SentencePiece adds blanks and removes them, and writes a blank as U+2581
            expected, found = [[re.sub("[ \u2581]", "", text) for text in texts] for texts in (expected, found)]
        if name in OTHER_END:
            assert list(map(without_end, found)) == list(map(without_end, expected)), title
        else:
            assert found == expected, title


@pytest.mark.parametrize("name", chat_templates.families())
def test_templates_with_marks_give_what_these_enclose(name: str) -> None:
    for title, turns in CONVERSATIONS.items():
        result = chat_templates.found(f"{name}_training", turns)
        expected = chat_templates.marked(name, turns)
        if result.refused:
            assert expected is None, f"{title}: {result.refused}"
        else:
            assert result.targets == expected, title


def test_table_is_that_of_the_code() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert "wrong" not in chat_templates.table()
    assert table.with_table(text) == text, "write it again with: python -m tests.benchmarks.chat_templates"
