"""The chat templates that the package `trl` ships, and what their generation marks say the assistant says.

`NAME.jinja` is a model family's own template; `NAME_training.jinja` is the same with `{% generation %}` marks.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from superoffload.config import DataSettings
from superoffload.data.encode import Encoder
from superoffload.data.formats import BadRow, Chat
from tests.helpers.tokenizers import decode_targets, make_trained_tokenizer

Turn = dict[str, Any]

SPECIAL = re.compile(
    r"<\|[^<>|\s]{1,40}\|>|<｜[^<>｜\s]{1,40}｜>|<\|(?:turn|tool|tool_call|tool_response|channel)>"
    r"|<(?:turn|tool|tool_call|tool_response|channel)\|>|<(?:start|end)_of_turn>|<end_of_utterance>|</s>|\[gMASK\]|<sop>"
)


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


CALL = {
    "type": "function",
    "id": "abcde1234",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
}
RESULT = {"role": "tool", "content": "rain", "tool_call_id": "abcde1234", "name": "weather"}
CONVERSATIONS: dict[str, list[Turn]] = {
    "multi-turn": [user("Is water wet?"), assistant("Yes"), user("How are you?"), assistant("Fine, and you?")],
    "system": [{"role": "system", "content": "Be brief."}, user("Is water wet?"), assistant("Yes, it is.")],
    "call": [user("Weather?"), assistant(None, tool_calls=[CALL]), RESULT, assistant("It rains.")],
    "text and call": [user("Weather?"), assistant("Let me look.", tool_calls=[CALL]), RESULT, assistant("It rains.")],
    "reasoning": [user("2+2?"), assistant("4", reasoning_content="Two and two are four.")],
    "reasoning, two turns": [
        user("2+2?"), assistant("4", reasoning_content="Two and two are four."),
        user("Is water wet?"), assistant("Yes", reasoning_content="Let me look."),
    ],
    "reasoning and call": [
        user("Weather?"), assistant(None, reasoning_content="Let me look.", tool_calls=[CALL]), RESULT,
        assistant("It rains.", reasoning_content="It is rain."),
    ],
    "ends with a call": [user("Weather?"), assistant(None, tool_calls=[CALL])],
}  # fmt: skip


def folder() -> Path:
    """Return the folder of the installed templates."""
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"


def families() -> list[str]:
    """List the families that have both templates."""
    return sorted(path.name.removesuffix("_training.jinja") for path in folder().glob("*_training.jinja"))


@cache
def template(name: str) -> str:
    """Return the text of a template."""
    return (folder() / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def special_tokens() -> tuple[str, ...]:
    """List the special tokens of all templates."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder().glob("*.jinja"))]
    return tuple(sorted({token for text in texts for token in SPECIAL.findall(text)}))


@dataclass(frozen=True)
class Form:
    """How a conversation is handed to the template with marks: what null content becomes, and so on."""

    null: str | None = ""
    as_json: bool = False
    parts: bool = False

    def turn(self, given: Turn) -> Turn:
        turn = {**given, "content": self.null if given["content"] is None else given["content"]}
        if "reasoning_content" in turn:
            turn["thinking"] = turn["reasoning_content"]
        if self.as_json and "tool_calls" in turn:
            function = {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}
            turn["tool_calls"] = [{**CALL, "function": function}]
        return {**turn, "content": [{"type": "text", "text": turn["content"]}]} if self.parts else turn


FORMS = (Form(), Form(null=None), Form(as_json=True), Form(null=None, as_json=True), Form(parts=True))
VARIABLES = {"bos_token": "<bos>", "eos_token": "<eos>"}
EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*")


def spoken(turn: Turn) -> list[str]:
    """List what an assistant turn says: reasoning, content, and the call's name and arguments."""
    called = ["weather", "city", "Oslo", "days", "2"] if "tool_calls" in turn else []
    return [*filter(None, [turn.get("reasoning_content"), turn["content"]]), *called]


def marked(name: str, turns: list[Turn]) -> list[str] | None:
    """Return what the marks of a family's training template enclose, by turn; None if they leave out a word.

    Adjacent spans are one. The empty spans that some templates have are left out.
    """
    for form in FORMS:
        try:
            texts, spans = render_jinja_template(
                [[form.turn(turn) for turn in turns]],
                chat_template=template(f"{name}_training"),
                return_assistant_tokens_mask=True,
                **VARIABLES,
            )
        except Exception:
            continue
        runs: list[tuple[int, int]] = []
        for start, end in (span for span in spans[0] if span[0] < span[1]):
            if runs and not texts[0][runs[-1][1] : start].strip():
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        said = [texts[0][start:end] for start, end in runs]
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if len(said) == len(answers) and all(
            word in run for run, turn in zip(said, answers, strict=True) for word in spoken(turn)
        ):
            return said
    return None


@dataclass(frozen=True)
class Result:
    """What a family's own template gives for a conversation: the targets by turn, or why the row is refused."""

    targets: list[str]
    text: str = ""
    refused: str = ""


def found(name: str, turns: list[Turn], kind: str = "gpt2") -> Result:
    """Encode a conversation with a family's own template."""
    tokenizer = make_trained_tokenizer(kind, special_tokens(), template(name))
    try:
        encoded = Encoder(tokenizer, DataSettings())(Chat(tuple(turns)))
    except BadRow as refused:
        return Result([], refused=str(refused))
    return Result(decode_targets(encoded, tokenizer), tokenizer.decode(encoded.input_ids))


def asked(name: str, turns: list[Turn]) -> str:
    """Return the prompt that a family's own template writes to ask for the answer after some turns."""
    for form in FORMS:
        try:
            texts, _ = render_jinja_template(
                [[form.turn(turn) for turn in turns]],
                chat_template=template(name), add_generation_prompt=True, **VARIABLES,
            )  # fmt: skip
        except Exception:
            continue
        return str(texts[0])
    raise AssertionError(f"{name}: no prompt")


def right(name: str, turns: list[Turn], result: Result) -> list[str] | None:
    """Return what the targets should be, by turn; None if the marks do not say it.

    It is what the marks enclose, apart from two things. Some marks enclose a part of the header with which the prompt
    ends, and the model never writes that (an opened reasoning block is not part of the header). Some training templates
    write an empty reasoning block where the family's own template writes none.
    """
    said = marked(name, turns)
    if said is None:
        return None
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    expected = []
    for text, index in zip(said, answers, strict=True):
        prompt = re.sub(r"<think>\s*(</think>\s*)?\Z", "", asked(name, turns[:index]))
        given = next((n for n in range(min(len(prompt), len(text)), 0, -1) if text.startswith(prompt[-n:])), 0)
        text = text[given:].rstrip()
        without = EMPTY_REASONING.sub("", text, count=1)
        expected.append(text if text in result.text or not text.startswith("<think>") else without)
    return expected


def without_end(text: str) -> str:
    """Remove the special tokens and the white space around a text."""
    while match := re.search(rf"(?:{SPECIAL.pattern}|<eos>)\s*\Z", text):
        text = text[: match.start()]
    return text.strip()


def verdict(name: str, turns: list[Turn]) -> str:
    """Say whether a family's own template gives the right targets for a conversation: right, refused or wrong."""
    result = found(name, turns)
    if result.refused:
        return "refused"
    expected = right(name, turns, result)
    same = expected is not None and list(map(without_end, expected)) == list(map(without_end, result.targets))
    return "right" if same else "wrong"


def table() -> str:
    """Return the table of families and conversations as Markdown."""
    lines = ["| family | " + " | ".join(CONVERSATIONS) + " |", "| --- |" + " --- |" * len(CONVERSATIONS)]
    for name in families():
        verdicts = [verdict(name, turns) for turns in CONVERSATIONS.values()]
        lines.append(f"| `{name}` | " + " | ".join(verdicts) + " |")
    return "\n".join(lines) + "\n"
