"""DeepSpeed's hooks only delegate."""

import ast

import pytest

from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.unit


def test_hooks_have_three_lines_at_most() -> None:
    """The limit keeps decisions out of the class that DeepSpeed calls; the constructor is exempt."""
    source = (REPOSITORY / "superoffload/offload/zero3/optimizer.py").read_text(encoding="utf-8")
    (cls,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    hooks = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    for hook in hooks:
        body = hook.body[ast.get_docstring(hook) is not None :]
        assert (hook.end_lineno or 0) - body[0].lineno < 3, hook.name
    assert len(hooks) > 20
