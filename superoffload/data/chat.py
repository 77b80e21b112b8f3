"""The assistant's turns in a rendered chat template, found exactly or not at all."""

from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from superoffload.data.formats import BadRow
from superoffload.errors import UserError

Turns = Sequence[dict[str, Any]]
Render = Callable[[Turns, bool], str]
Span = tuple[int, int]

STAND_IN = "\ue000answer\ue001"  # private characters, so that no template and no row contains it


def renderer(tokenizer: Any, template: str | None) -> Render:
    """Return a function that renders turns, with or without the header that asks for an answer, as text."""

    def render(turns: Turns, asks: bool) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(turns), chat_template=template, tokenize=False, add_generation_prompt=asks
                )
            )
        except jinja2.TemplateError as error:
            raise BadRow(f"the chat template refuses it: {' '.join(str(error).split())}") from error

    return render


def answer_spans(turns: Turns, render: Render, special: Sequence[str]) -> tuple[str, list[Span]]:
    """Render a conversation and find what the assistant says in it, without generation marks.

    Returns the text, and for each turn of the assistant the characters from the first after the header up to
    its end-of-turn token (one of the texts `special`), or to the end of the turn where the template has none.

    A turn starts where the conversation before it ends when rendered with the header for an answer, and it
    ends where the conversation up to and with it ends, if these are prefixes of the whole, character by
    character. Templates that write the last turn in another way (leave out earlier reasoning, close with
    another token) or whose header opens a reasoning that the turn does not have break the prefixes: then the
    turn is rendered with a stand-in for its content, and what surrounds the stand-in must surround the turn.
    Raises `UserError` where neither holds, or where what is found lacks the content.
    """
    whole = render(turns, False)
    spans: list[Span] = []
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        start = _start(turns, place, render, whole)
        end = _end(turns, place, render, whole)
        end = _with_end_token(whole, start, end, special)
        if end < start or (spans and start < spans[-1][1]):
            raise UserError(_not_found(place, "what is found overlaps"))
        if turn["content"].rpartition("</think>")[2].strip() not in whole[start:end]:
            raise UserError(_not_found(place, "the template does not write its content as it is"))
        spans.append((start, end))
    return whole, spans


def _start(turns: Turns, place: int, render: Render, whole: str) -> int:
    try:
        before, asking = render(turns[:place], False), render(turns[:place], True)
    except BadRow:  # some templates refuse a conversation without any turn
        before = asking = ""
    if asking != before and whole.startswith(asking):
        return len(asking)
    head, _ = _around(turns, place, render)
    if not whole.startswith(head):
        raise UserError(_not_found(place, "the text before it depends on what it says"))
    return len(head)


def _end(turns: Turns, place: int, render: Render, whole: str) -> int:
    try:
        closed = render(turns[: place + 1], False)
    except BadRow:
        closed = None
    if closed is not None and whole.startswith(closed):
        return len(closed)
    _, tail = _around(turns, place, render)
    if not whole.endswith(tail):
        raise UserError(_not_found(place, "the text after it depends on what it says"))
    return len(whole) - len(tail)


def _around(turns: Turns, place: int, render: Render) -> tuple[str, str]:
    """Render the conversation with a stand-in for one turn's content: the text before and after it."""
    marked = [*turns[:place], {**turns[place], "content": STAND_IN}, *turns[place + 1 :]]
    parts = render(marked, False).split(STAND_IN)
    if len(parts) != 2:
        raise UserError(_not_found(place, f"its content is written {len(parts) - 1} times"))
    return parts[0], parts[1]


def _with_end_token(whole: str, start: int, end: int, special: Sequence[str]) -> int:
    """Move the end of a turn to right behind its end-of-turn token; where there is none, leave it."""
    if is_closed(whole[start:end], special):
        return start + len(whole[start:end].rstrip())
    rest = whole[end:]
    following = rest.lstrip()
    for token in special:
        if following.startswith(token):
            return end + len(rest) - len(following) + len(token)
    return end


def is_closed(said: str, special: Sequence[str]) -> bool:
    """Tell whether a turn ends with an end-of-turn token, perhaps with blanks behind it."""
    said = said.rstrip()
    return any(said.endswith(token) for token in special)


def _not_found(place: int, reason: str) -> str:
    return (
        f"--chat_template: the assistant's answer (message {place + 1}) cannot be found in the rendered text: "
        f"{reason}; use --chat_template plain, or a template with {{% generation %}} marks"
    )


def marked_tokens(tokenizer: Any, template: str, turns: Turns, special: Sequence[str]) -> tuple[list[int], list[bool]]:
    """Tokenise with a template that marks its generation spans: ids, and for each whether it counts.

    Where the marks leave the end-of-turn token out, it is taken in. Raises `UserError` where nothing is marked
    although the assistant says something.
    """
    try:
        encoded = tokenizer.apply_chat_template(
            list(turns), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
    except jinja2.TemplateError as error:
        raise BadRow(f"the chat template refuses it: {' '.join(str(error).split())}") from error
    ids, counts = list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    if answers and not any(counts):
        raise UserError(_not_found(answers[0], "its generation marks enclose nothing"))
    ends = set(tokenizer.convert_tokens_to_ids(list(special)))
    start = 0
    for place in range(1, len(ids)):
        if counts[place] and not counts[place - 1]:
            start = place
        left_out = counts[place - 1] and not counts[place] and ids[place] in ends
        if left_out and not is_closed(tokenizer.decode(ids[start:place]), special):
            counts[place] = True
    return ids, counts
