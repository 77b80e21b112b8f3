"""Labels: the targets are exactly the assistant's words and the tokens that end them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from superoffload.config import DataSettings
from superoffload.data import template
from superoffload.data.encode import IGNORED, Encoded, Encoder, alpaca_prompt, plain_segments
from superoffload.data.formats import BadRow, Chat, Conversation, Pair, Text
from superoffload.errors import UserError
from superoffload.protocols import Tokenizer
from tests.helpers.tokenizers import make_chat_tokenizer

pytestmark = pytest.mark.unit

Decode = Callable[[Encoded], list[str]]

TURNS = Chat(
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi there"},
        {"role": "user", "content": "hello hi there"},
        {"role": "assistant", "content": "hi there"},
    )
)
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Closes the last turn with a different token.
RETURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Writes an empty reasoning into the last turn only and removes it from earlier turns.
THINKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Its header opens a reasoning that the turns do not have.
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# Has no header, and a newline as the only end of a turn.
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# Trims the content, and closes a turn only before the next one.
TRIMS = (
    "{% for m in messages %}{% if not loop.first %}<eos>{% endif %}[{{ m.role }}]{{ m.content.strip() }}{% endfor %}"
)
MARKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
)


def encoder(tokenizer: Tokenizer, template: str = "auto", **settings: Any) -> Encoder:
    return Encoder(tokenizer, DataSettings(chat_template=template, **settings))


def test_pair_is_written_as_upstream_does_and_learns_to_stop(tokenizer: Tokenizer, decoded_targets: Decode) -> None:
    pair = Pair("Name three colours.", "warm ones", "Red.")
    encoded = encoder(tokenizer)(pair)
    assert tokenizer.decode(encoded.input_ids) == (
        "### Instruction:\nName three colours.\n\n### Input:\nwarm ones\n\n### Response:\nRed.<eos>"
    )
    assert decoded_targets(encoded) == ["Red.<eos>"]
    assert "### Input" not in alpaca_prompt(Pair("q", " ", "a"))


@pytest.mark.parametrize("template", ["plain", "tokenizer"])
def test_rows_encoded_together_are_those_encoded_alone(tokenizer: Tokenizer, template: str) -> None:
    tokenizer.chat_template = "{% if 'hello' == messages[0].content %}{{ raise_exception('no') }}{% endif %}" + CHATML
    rows: list[Conversation] = [
        Pair("hi", "", "there"),
        TURNS,
        Chat(TURNS.turns[1:3]),
        Text("hello"),
        Text(""),
        Pair("a", "b", "c"),
    ]
    encode = encoder(tokenizer, template)
    alone: list[Encoded | str] = []
    for row in rows:
        try:
            alone.append(encode(row))
        except BadRow as error:
            alone.append(str(error))
    together = [str(row) if isinstance(row, BadRow) else row for row in encode.encode(rows)]
    assert together == alone
    assert [isinstance(row, str) for row in alone] == [False, False, template == "tokenizer", False, False, False]
    assert encode.encode([]) == []


@pytest.mark.parametrize("template", ["plain", "tokenizer"])
def test_of_long_rows_few_are_tokenised_together(
    tokenizer: Tokenizer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = CHATML
    sizes: list[list[int]] = []

    def counted(texts: list[str], **options: Any) -> Any:
        sizes.append([len(text) for text in texts])
        return tokenizer(texts, **options)

    encode = encoder(tokenizer, template)
    rows: list[Conversation] = [Pair("hi", "", "there " * count) for count in (1, 2, 200, 3, 100, 1)]
    whole = encode.encode(rows)
    monkeypatch.setattr(encode, "_tokenizer", counted)
    monkeypatch.setattr("superoffload.data.encode.CHARACTERS_AT_A_TIME", 500)
    assert encode.encode(rows) == whole
    assert max(len(part) for part in sizes) > 1
    assert all(len(part) == 1 or sum(part) <= 500 for part in sizes)


def test_answer_follows_the_prompts_own_tokens(tokenizer: Tokenizer) -> None:
    pair = Pair("hello", "", "hi")
    encoded = encoder(tokenizer)(pair)
    prompt = tokenizer(alpaca_prompt(pair))["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)] == [IGNORED] * len(prompt)


def test_end_of_sequence_is_a_target_even_if_it_is_the_padding_token() -> None:
    tokenizer = make_chat_tokenizer(pad_token="<eos>")
    assert encoder(tokenizer)(Pair("q", "", "a")).labels[-1] == tokenizer.eos_token_id


def test_every_token_of_a_text_is_a_target(tokenizer: Tokenizer) -> None:
    encoded = encoder(tokenizer)(Text("hello"))
    assert encoded.labels == encoded.input_ids
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.target_tokens == len(encoded.input_ids) - 1


def test_train_on_prompt_makes_every_token_a_target(tokenizer: Tokenizer) -> None:
    encoded = encoder(tokenizer, train_on_prompt=True)(Pair("q", "", "a"))
    assert encoded.labels == encoded.input_ids


def test_truncation_keeps_the_start_of_the_answer(tokenizer: Tokenizer) -> None:
    encoded = encoder(tokenizer)(Pair("q", "", "red orange yellow"))
    cut = encoded.head(encoded.shortest + 1)
    assert cut.target_tokens == 2
    assert cut.input_ids == encoded.input_ids[: encoded.shortest + 1]
    assert encoded.head(encoded.shortest).target_tokens == 1
    assert encoded.head(encoded.shortest - 1).target_tokens == 0


def test_plain_template(tokenizer: Tokenizer, decoded_targets: Decode) -> None:
    encoded = encoder(tokenizer)(TURNS)
    assert tokenizer.decode(encoded.input_ids) == (
        "### System:\nBe brief.\n\n### User:\nhello\n\n### Assistant:\nhi there<eos>\n\n"
        "### User:\nhello hi there\n\n### Assistant:\nhi there<eos>"
    )
    assert decoded_targets(encoded) == ["hi there<eos>", "hi there<eos>"]
    assert plain_segments(Chat(({"role": "user", "content": "q"},))) == [("### User:\nq", False)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["hi there<|end|>", "hi there<|end|>"]),
        (RETURNS, ["hi there<|end|>", "hi there<|return|>"]),
        (THINKS, ["hi there<|end|>", "<think>\n\n</think>\n\nhi there<|end|>"]),
        (OPENS, ["hi there<|end|>", "hi there<|end|>"]),
        (BARE, ["hi there\n", "hi there\n<eos>"]),
        (TRIMS, ["hi there<eos>", "hi there<eos>"]),
        (MARKS, ["hi there<|end|>", "hi there<|end|>"]),
        (MARKS.replace("{{ m.content }}{% endgen", "{{ m.content }}<|end|>\n{% endgen"), None),
    ],
    ids=["chatml", "returns", "thinks", "opens", "bare", "trims", "marks", "marks_with_end"],
)
def test_every_turn_of_the_assistant_in_any_template(
    template: str, expected: list[str] | None, decoded_targets: Decode
) -> None:
    encoded = encoder(make_chat_tokenizer(template))(TURNS)
    found = decoded_targets(encoded)
    assert found == expected if expected else all(run == "hi there<|end|>\n" for run in found) and len(found) == 2


def test_reasoning_that_only_the_last_turn_keeps(decoded_targets: Decode) -> None:
    think = "<think>\nhm\n</think>\n\n"
    turns = [
        {**turn, "content": think + turn["content"]} if turn["role"] == "assistant" else turn for turn in TURNS.turns
    ]
    tokenizer = make_chat_tokenizer(THINKS)
    with pytest.raises(BadRow, match="does not write reasoning in content of message 3"):
        encoder(tokenizer)(Chat(tuple(turns)))
    encoded = encoder(tokenizer, drop_unrendered=True)(Chat(tuple(turns)))
    assert decoded_targets(encoded) == ["hi there<|end|>", f"{think}hi there<|end|>"]
    assert encoded.unwritten == 1
    assert decoded_targets(encoder(tokenizer)(Chat(tuple(turns[-2:])))) == [f"{think}hi there<|end|>"]


def test_tokens_are_those_of_the_whole_rendered_text() -> None:
    tokenizer = make_chat_tokenizer(CHATML)
    encoded = encoder(tokenizer)(TURNS)
    text = tokenizer.apply_chat_template(list(TURNS.turns), tokenize=False)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answer_of_several_bytes_a_character(decoded_targets: Decode) -> None:
    turns = Chat(({"role": "user", "content": "q"}, {"role": "assistant", "content": " \u00fc\U0001f600 "}))
    assert decoded_targets(encoder(make_chat_tokenizer(CHATML))(turns)) == [" \u00fc\U0001f600 <|end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "does not write content of message 3"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | reverse }}"), "does not write content of message 3"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | replace('i t', 'it') }}"), "does not write content of"),
        (CHATML.replace("<|end|>", "{{ '!' if m.content == 'hi there' }}<|end|>"), "changes content of message 3"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content | length }}"), "changes content|other text"),
        (CHATML.replace("<|end|>", "{{ m.content | length }}<|end|>"), "changes content|other text"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "its content is written twice"),
        ("{{ messages | length }} {% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "twice"),
        (MARKS.replace("{{ m.content }}{% endgen", "{% endgen"), "does not write content of message 3"),
        (MARKS.replace("{{ m.content }}{% endgeneration %}", "{% endgeneration %}{{ m.content }}"), "do not enclose"),
        (MARKS.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"), "enclose"),
    ],
)
def test_turn_that_cannot_be_found_is_a_bad_row(template: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason) as error:
        encoder(make_chat_tokenizer(template))(TURNS)
    assert "--chat_template" in str(error.value) or "changes" in str(error.value) or "other text" in str(error.value)


@pytest.mark.parametrize(
    "code",
    [
        "{{ raise_exception('no system') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content.index('nowhere') }}",
        "{{ {}['x'].y }}",
        "{{ '%d' | format(messages[0].content) }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.nothing() }}",
    ],
)
def test_any_error_in_a_template_is_a_bad_row(code: str) -> None:
    tokenizer = make_chat_tokenizer("{% if messages[0].role == 'system' %}" + code + "{% endif %}" + CHATML)
    with pytest.raises(BadRow, match="the chat template rejects it: "):
        encoder(tokenizer)(TURNS)
    assert encoder(tokenizer)(Chat(TURNS.turns[1:])).target_tokens


@pytest.mark.parametrize("template", [CHATML, THINKS, RETURNS, MARKS])
def test_conversation_may_start_with_the_assistant(template: str, decoded_targets: Decode) -> None:
    turns = Chat(({"role": "assistant", "content": "hello"}, *TURNS.turns[1:3]))
    assert decoded_targets(encoder(make_chat_tokenizer(template))(turns))[0] == "hello<|end|>"
    assert len(decoded_targets(encoder(make_chat_tokenizer(template))(turns))) == 2


def test_choice_of_the_template(tmp_path: Path, decoded_targets: Decode) -> None:
    pair = Pair("q", "c", "a")
    tokenizer = make_chat_tokenizer(CHATML)
    assert tokenizer.decode(encoder(tokenizer)(pair).input_ids).startswith("### Instruction")
    chat = tokenizer.decode(encoder(tokenizer, "tokenizer")(pair).input_ids)
    assert chat == "<|start|>user\nq\n\nc<|end|>\n<|start|>assistant\na<|end|>\n"
    assert tokenizer.decode(encoder(tokenizer, "plain")(pair).input_ids).startswith("### User:\nq\n\nc")
    (tmp_path / "own.jinja").write_text(RETURNS)
    assert decoded_targets(encoder(tokenizer, str(tmp_path / "own.jinja"))(TURNS))[-1] == "hi there<|return|>"


def test_the_tokenizer_keeps_the_template_of_the_rows(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(RETURNS)
    tokenizer = make_chat_tokenizer()
    for choice, expected in (("auto", None), ("plain", None), (str(tmp_path / "own.jinja"), RETURNS)):
        template.keep(tokenizer, choice)
        assert tokenizer.chat_template == expected
    tokenizer.chat_template = {"default": CHATML, "tools": MARKS}
    template.keep(tokenizer, "tools")
    assert tokenizer.chat_template == {"default": MARKS, "tools": MARKS}


@pytest.mark.parametrize("choice", ["tokenizer", "missing.jinja"])
def test_missing_template(tokenizer: Tokenizer, choice: str) -> None:
    with pytest.raises(UserError, match=f"--chat_template {choice}"):
        encoder(tokenizer, choice)


@pytest.mark.parametrize(("template", "choice"), [(CHATML, "auto"), (None, "plain")])
def test_a_prompt_that_follows_others_is_written_as_in_a_row(template: str | None, choice: str) -> None:
    encode = encoder(make_chat_tokenizer(template), choice)
    row = encode(TURNS).input_ids
    ids = encode.prompt_ids("hello hi there", Chat, TURNS.turns[:3])
    assert row[: len(ids)] == ids
    assert len(row) - len(ids) == len(encode.prompt_ids("hi there", Text)) + (2 if template else 1)  # what ends a turn


def test_what_ends_an_answer_is_what_the_template_writes_after_it() -> None:
    tokenizer = make_chat_tokenizer(CHATML)
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<eos>"])
    assert encoder(tokenizer).end_ids(Chat) == [eos, end]
    assert encoder(tokenizer).end_ids(Pair) == encoder(tokenizer, "plain").end_ids(Chat) == [eos]
