"""The Jinja template in use: where it comes from, what form of a conversation it takes, and its text for one."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from superoffload.data.formats import BadRow
from superoffload.errors import UserError, first_line
from superoffload.protocols import Tokenizer

Turn = dict[str, Any]
Span = tuple[int, int]

MARK = re.compile(r"\{%[-+]?\s*generation\b")
ASKS_FOR_NONE = re.compile(r"content\b['\"\])]*\s+is\s+(?:not\s+)?none\b")
REASONING = ("reasoning_content", "reasoning", "thinking")  # the names under which templates read reasoning
# What Jinja and the code in a template raise if a conversation does not suit it.
ERRORS = (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
# A header for an answer may open a reasoning block, which is part of what the assistant says.
OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*(</\1>\s*)?\Z")
PROBE = "Qx7zProbeZj"


@dataclass(frozen=True, slots=True)
class Form:
    """How a conversation is handed to a template.

    `null` is what null content becomes, and empty content beside calls, which says the same; `arguments_as_json` is
    whether arguments are JSON text instead of mappings.
    """

    null: str | None
    arguments_as_json: bool


class Template:
    """A compiled chat template.

    `marked` is whether it has `{% generation %}` marks. `closed` is the text of a conversation that is one user turn;
    `header` is what the template adds to ask for an answer, empty if it adds nothing; `before_answer` is what it writes
    between the user turn and an answer. Raises `UserError` if the text is empty or not a valid template; `flag` is what
    the message begins with.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, flag: str) -> None:
        self.text = text
        self.marked = MARK.search(text) is not None
        # Only those that the template names: each rendering copies them.
        self._variables = {name: value for name, value in tokenizer.special_tokens_map.items() if name in text}
        self._as_parts = False
        if not text.strip():
            raise UserError(f"{flag}: the chat template is empty")
        try:
            self._as_parts = not self._writes_text() and self._writes_parts()
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{flag}: line {error.lineno} is not valid Jinja: {first_line(error)}") from error
        self.closed, self.header, self.before_answer = self._around_turns()

    def _around_turns(self) -> tuple[str, str, str]:
        turns = [{"role": "user", "content": "q"}]
        try:
            closed, asked = self.render(turns), self.render(turns, ask=True)
        except BadRow:
            return "", "", ""
        try:
            answered = self.render([*turns, {"role": "assistant", "content": PROBE}]).partition(PROBE)[0]
        except BadRow:
            answered = ""
        return closed, asked[shared(closed, asked) :], answered[shared(closed, answered) :]

    def _writes_text(self) -> bool:
        try:
            return PROBE in self._text([{"role": "user", "content": "q"}, {"role": "assistant", "content": PROBE}])
        except jinja2.TemplateSyntaxError:
            raise
        except ERRORS:
            return False

    def _writes_parts(self) -> bool:
        self._as_parts = True
        return self._writes_text()

    def _text(self, turns: Sequence[Turn], **options: Any) -> str:
        return str(self._rendered(turns, **options)[0][0])

    def _rendered(self, turns: Sequence[Turn], **options: Any) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template  # slow; --help must not wait for it

        given = [_in_parts(turn) for turn in turns] if self._as_parts else list(turns)
        return render_jinja_template([given], chat_template=self.text, **options, **self._variables)

    def render(self, turns: Sequence[Turn], ask: bool = False, **options: Any) -> str:
        """Render turns as text, with `ask` followed by the header that asks the model for an answer.

        `options` may hold `tools` and `documents`. Raises `BadRow` if the template rejects the conversation.
        """
        try:
            return self._text(turns, add_generation_prompt=ask, **options)
        except ERRORS as error:
            raise _rejected(error) from error

    def render_marked(self, turns: Sequence[Turn], **options: Any) -> tuple[str, list[Span]]:
        """Render turns as text; return it, and the spans of characters that the generation marks enclose."""
        try:
            texts, spans = self._rendered(turns, return_assistant_tokens_mask=True, **options)
        except ERRORS as error:
            raise _rejected(error) from error
        return texts[0], [(start, end) for start, end in spans[0]]

    def forms(self, turns: Sequence[Turn]) -> list[Form]:
        """List the forms in which the template may take these turns, the most likely one first."""
        calls = any(turn.get("tool_calls") for turn in turns)
        nulls: list[str | None] = [""]
        asks = ASKS_FOR_NONE.search(self.text) is not None
        if any(turn.get("content") is None for turn in turns):
            nulls = [None, ""] if asks else ["", None]
        elif calls and asks:
            nulls = ["", None]
        return [Form(null, as_json) for as_json in ((False, True) if calls else (False,)) for null in nulls]


def shared(first: str, second: str) -> int:
    """Return the number of characters with which two texts begin alike."""
    differ = (at for at, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(differ, min(len(first), len(second)))


def in_form(turns: Sequence[Turn], form: Form) -> list[Turn]:
    """Write turns in a form. Reasoning is given under every name that templates read it by."""
    return [_turn_in_form(turn, form) for turn in turns]


def _turn_in_form(turn: Turn, form: Form) -> Turn:
    result = turn
    if turn.get("content") is None or (turn["content"] == "" and turn.get("tool_calls")):
        result = {**turn, "content": form.null}
    name = reasoning_name(turn)
    if name is not None:
        result = {**result, **dict.fromkeys(REASONING, turn[name])}
    if form.arguments_as_json and turn.get("tool_calls"):
        result = {**result, "tool_calls": [_with_json(call) for call in turn["tool_calls"]]}
    return result


def reasoning_name(turn: Turn) -> str | None:
    """Return the field that holds a turn's reasoning, None if it has none."""
    for name in REASONING:
        if name in turn and isinstance(turn[name], str) and turn[name].strip():
            return name
    return None


def _with_json(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_json(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)} if isinstance(arguments, Mapping) else call


def _in_parts(turn: Turn) -> Turn:
    """Write content as a list of parts, as the templates of models that see images want it."""
    content = turn.get("content")
    return {**turn, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else turn


def _rejected(error: Exception) -> BadRow:
    said = " ".join(str(error).split())
    kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
    return BadRow(f"the chat template rejects it: {kind}{said}")


def choose(tokenizer: Tokenizer, chat_template: str) -> str | None:
    """Return the text of the template that `--chat_template` chooses; None for the plain template.

    Raises `UserError` if there is no such template.
    """
    if chat_template == "plain":
        return None
    own = tokenizer.chat_template or None
    if isinstance(own, Mapping) and chat_template in own:
        return str(own[chat_template])
    if chat_template in ("auto", "tokenizer"):
        if own is None and chat_template == "tokenizer":
            raise UserError("--chat_template tokenizer: the tokenizer has no chat template; use plain, or name a file")
        return _default(own, f"--chat_template {chat_template}: the tokenizer") if own is not None else None
    return _read(chat_template)


def keep(tokenizer: Tokenizer, chat_template: str) -> None:
    """Make the template that `--chat_template` chooses the tokenizer's own, so that an export has it."""
    text, own = choose(tokenizer, chat_template), tokenizer.chat_template
    if text is not None:
        tokenizer.chat_template = {**own, "default": text} if isinstance(own, Mapping) else text


def _default(templates: Any, where: str) -> str:
    """Return a tokenizer's template; the one called `default` if it has several."""
    if isinstance(templates, str):
        return templates
    named = templates if isinstance(templates, Mapping) else {item["name"]: item["template"] for item in templates}
    if "default" not in named:
        raise UserError(f"{where} has several chat templates and no default; name one: {', '.join(sorted(named))}")
    return str(named["default"])


def _read(file: str) -> str:
    """Read a file that holds a template, or a tokenizer's configuration with one in it."""
    path = Path(file).expanduser()
    flag = f"--chat_template {file}"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{flag}: not a readable file; use auto, tokenizer, plain, or a file that holds a Jinja template"
        ) from error
    if path.suffix.lower() != ".json":
        return text
    try:
        found = json.loads(text)["chat_template"]
        return _default(found, f"{flag}: it")
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{flag}: holds no chat_template") from error
