"""Labels: the targets are exactly the assistant's words and the tokens that end them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from superoffload.data.chat import Turns, answer_spans
from superoffload.data.encode import IGNORED, Encoded, Encoder, alpaca_prompt, plain_segments
from superoffload.data.formats import BadRow, Chat, Pair, Text
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


def encoder(tokenizer: Tokenizer, template: str = "auto", train_on_prompt: bool = False) -> Encoder:
    return Encoder(tokenizer, template, train_on_prompt)


def test_pair_is_written_as_upstream_does_and_learns_to_stop(tokenizer: Tokenizer, decoded_targets: Decode) -> None:
    pair = Pair("Name three colours.", "warm ones", "Red.")
    encoded = encoder(tokenizer)(pair)
    assert tokenizer.decode(encoded.input_ids) == (
        "### Instruction:\nName three colours.\n\n### Input:\nwarm ones\n\n### Response:\nRed.<eos>"
    )
    assert decoded_targets(encoded) == ["Red.<eos>"]
    assert "### Input" not in alpaca_prompt(Pair("q", " ", "a"))


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


def test_reasoning_of_the_last_turn_is_a_target(decoded_targets: Decode) -> None:
    think = "<think>\nhm\n</think>\n\n"
    turns = [
        {**turn, "content": think + turn["content"]} if turn["role"] == "assistant" else turn for turn in TURNS.turns
    ]
    encoded = encoder(make_chat_tokenizer(THINKS))(Chat(tuple(turns)))
    assert decoded_targets(encoded) == ["hi there<|end|>", f"{think}hi there<|end|>"]


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
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "changes its content|depends on"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[0] }}"), "cannot be found"),
        ("{{ messages | length }} {% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        (MARKS.replace("{{ m.content }}{% endgen", "{% endgen"), "enclose nothing"),
    ],
)
def test_span_that_cannot_be_found_is_an_error(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        encoder(make_chat_tokenizer(template))(TURNS)
    assert "--chat_template plain" in str(error.value)


def test_row_that_the_template_rejects_is_a_bad_row() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(BadRow, match="no system"):
        encoder(make_chat_tokenizer(template))(TURNS)


def test_template_may_reject_an_empty_conversation() -> None:
    template = "{% set first = messages[0].role %}{{ first[0] }}" + CHATML
    turns = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"}]

    def render(given: Turns, add_generation_prompt: bool) -> str:
        if not given:
            return ""
        tokenizer = make_chat_tokenizer(template)
        return str(
            tokenizer.apply_chat_template(list(given), tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    text, spans = answer_spans(turns, render, ["<|end|>"])
    assert [text[a:b] for a, b in spans] == ["hi<|end|>"]


def test_choice_of_the_template(tmp_path: Path, decoded_targets: Decode) -> None:
    pair = Pair("q", "c", "a")
    tokenizer = make_chat_tokenizer(CHATML)
    assert tokenizer.decode(encoder(tokenizer)(pair).input_ids).startswith("### Instruction")
    chat = tokenizer.decode(encoder(tokenizer, "tokenizer")(pair).input_ids)
    assert chat == "<|start|>user\nq\n\nc<|end|>\n<|start|>assistant\na<|end|>\n"
    assert tokenizer.decode(encoder(tokenizer, "plain")(pair).input_ids).startswith("### User:\nq\n\nc")
    (tmp_path / "own.jinja").write_text(RETURNS)
    assert decoded_targets(encoder(tokenizer, str(tmp_path / "own.jinja"))(TURNS))[-1] == "hi there<|return|>"


@pytest.mark.parametrize("choice", ["tokenizer", "missing.jinja"])
def test_missing_template(tokenizer: Tokenizer, choice: str) -> None:
    with pytest.raises(UserError, match=f"--chat_template {choice}"):
        encoder(tokenizer, choice)
