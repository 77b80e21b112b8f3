"""Find the assistant's turns in a rendered chat template, exactly or not at all."""

from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from superoffload.data.formats import BadRow
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer

Turns = Sequence[dict[str, Any]]
Render = Callable[[Turns, bool], str]  # (turns, add_generation_prompt) -> text
Span = tuple[int, int]

PLACEHOLDER = "\ue000answer\ue001"  # private-use characters, which no template and no row contains


def renderer(tokenizer: Tokenizer, template: str | None) -> Render:
    """Return a function that renders turns as text, optionally followed by the header that asks for an answer."""

    def render(turns: Turns, add_generation_prompt: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(turns),
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except jinja2.TemplateError as error:
            raise _rejected(error) from error

    return render


def _rejected(error: jinja2.TemplateError) -> BadRow:
    return BadRow(f"the chat template rejects it: {' '.join(str(error).split())}")


def answer_spans(turns: Turns, render: Render, special: Sequence[str]) -> tuple[str, list[Span]]:
    """Render a conversation and find what the assistant says in it, for templates without generation marks.

    Returns the text and one span of characters for each assistant turn. A span starts after the turn's
    header. It includes the end-of-turn token (one of the texts `special`); if the template has none, the span ends
    where the turn ends.

    A turn starts where the conversation before it ends when rendered with the header for an answer. It ends where
    the conversation up to and including it ends. Both must be prefixes of the whole text, character by character.
    Some templates break this: they write the last turn differently (they leave out earlier reasoning, or close with
    another token), or their header opens a reasoning block that the turn does not have. Such a turn is rendered with a
    placeholder as its content, and the text around the placeholder must be the text around the turn.

    Raises `UserError` if neither works, or if the text found does not contain the turn's content.
    """
    whole = render(turns, False)
    spans: list[Span] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start = _start(turns, index, render, whole)
        end = _end(turns, index, render, whole)
        end = _with_end_token(whole, start, end, special)
        if end < start or (spans and start < spans[-1][1]):
            raise UserError(_not_found(index, "the text found overlaps with other text"))
        if (turn["content"] or "").rpartition("</think>")[2].strip() not in whole[start:end]:
            raise UserError(_not_found(index, "the template changes its content"))
        spans.append((start, end))
    return whole, spans


def _start(turns: Turns, index: int, render: Render, whole: str) -> int:
    try:
        before, with_header = render(turns[:index], False), render(turns[:index], True)
    except BadRow:  # some templates reject an empty conversation
        before = with_header = ""
    if with_header != before and whole.startswith(with_header):
        return len(with_header)
    head, _ = _around(turns, index, render)
    if not whole.startswith(head):
        raise UserError(_not_found(index, "the text before it depends on its content"))
    return len(head)


def _end(turns: Turns, index: int, render: Render, whole: str) -> int:
    try:
        closed = render(turns[: index + 1], False)
    except BadRow:
        closed = None
    if closed is not None and whole.startswith(closed):
        return len(closed)
    _, tail = _around(turns, index, render)
    if not whole.endswith(tail):
        raise UserError(_not_found(index, "the text after it depends on its content"))
    return len(whole) - len(tail)


def _around(turns: Turns, index: int, render: Render) -> tuple[str, str]:
    """Render the conversation with a placeholder as one turn's content; return the text before and after it."""
    marked = [*turns[:index], {**turns[index], "content": PLACEHOLDER}, *turns[index + 1 :]]
    parts = render(marked, False).split(PLACEHOLDER)
    if len(parts) != 2:
        raise UserError(_not_found(index, f"its content appears {len(parts) - 1} times"))
    return parts[0], parts[1]


def _with_end_token(whole: str, start: int, end: int, special: Sequence[str]) -> int:
    """Return the end of a turn including its end-of-turn token; `end` itself if there is no such token."""
    if is_closed(whole[start:end], special):
        return start + len(whole[start:end].rstrip())
    rest = whole[end:]
    following = rest.lstrip()
    for token in special:
        if following.startswith(token):
            return end + len(rest) - len(following) + len(token)
    return end


def is_closed(said: str, special: Sequence[str]) -> bool:
    """Return whether a turn ends with an end-of-turn token, ignoring white space after it."""
    said = said.rstrip()
    return any(said.endswith(token) for token in special)


def _not_found(index: int, reason: str) -> str:
    return (
        f"--chat_template: the assistant's answer (message {index + 1}) cannot be found in the rendered text: "
        f"{reason}; use --chat_template plain, or a template with {{% generation %}} marks"
    )


def marked_tokens(
    tokenizer: Tokenizer, template: str, turns: Turns, special: Sequence[str]
) -> tuple[list[int], list[bool]]:
    """Tokenise with a template that marks its generation spans; return the ids, and for each whether it is a target.

    If the marks leave out the end-of-turn token, it becomes a target as well. Raises `UserError` if nothing is
    marked although there is an assistant turn.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            list(turns), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
    except jinja2.TemplateError as error:
        raise _rejected(error) from error
    ids, is_target = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if answers and not any(is_target):
        raise UserError(_not_found(answers[0], "its generation marks enclose nothing"))
    ends = set(tokenizer.convert_tokens_to_ids(list(special)))
    start = 0
    for position in range(1, len(ids)):
        if is_target[position] and not is_target[position - 1]:
            start = position
        left_out = is_target[position - 1] and not is_target[position] and ids[position] in ends
        if left_out and not is_closed(tokenizer.decode(ids[start:position]), special):
            is_target[position] = True
    return ids, is_target
