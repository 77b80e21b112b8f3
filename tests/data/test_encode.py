"""Labels: exactly the assistant's words and the tokens that end them."""

import pytest

from superoffload.data.chat import answer_spans
from superoffload.data.encode import IGNORED, Encoder, alpaca_prompt, plain_segments
from superoffload.data.formats import BadRow, Chat, Pair, Text
from superoffload.errors import UserError
from tests.data.conftest import make_tokenizer

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
# Closes the last turn with another token than the others.
RETURNS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Writes an empty reasoning into the last turn only and takes it out of earlier ones.
THINKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Its header opens a reasoning that the turns do not have.
OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# No header, no end of turn but a line's end.
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# Trims, and writes its end of a turn before the next one.
TRIMS = (
    "{% for m in messages %}{% if not loop.first %}<eos>{% endif %}[{{ m.role }}]{{ m.content.strip() }}{% endfor %}"
)
MARKS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}"
)


def encoder(tokenizer, template="auto", train_on_prompt=False):
    return Encoder(tokenizer, template, train_on_prompt)


def with_template(text):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def test_pair_is_written_as_upstream_does_and_learns_to_stop(tokenizer, decoded_targets):
    pair = Pair("Name three colours.", "warm ones", "Red.")
    encoded = encoder(tokenizer)(pair)
    assert tokenizer.decode(encoded.input_ids) == (
        "### Instruction:\nName three colours.\n\n### Input:\nwarm ones\n\n### Response:\nRed.<eos>"
    )
    assert decoded_targets(encoded) == ["Red.<eos>"]
    assert "### Input" not in alpaca_prompt(Pair("q", " ", "a"))


def test_answer_follows_the_prompts_own_tokens(tokenizer):
    pair = Pair("hello", "", "hi")
    encoded = encoder(tokenizer)(pair)
    prompt = tokenizer(alpaca_prompt(pair))["input_ids"]
    assert encoded.input_ids[: len(prompt)] == prompt
    assert encoded.labels[: len(prompt)] == [IGNORED] * len(prompt)


def test_padding_token_that_ends_sequences_still_counts():
    tokenizer = make_tokenizer(pad_token="<eos>")
    assert encoder(tokenizer)(Pair("q", "", "a")).labels[-1] == tokenizer.eos_token_id


def test_every_token_of_a_text_counts(tokenizer):
    encoded = encoder(tokenizer)(Text("hello"))
    assert encoded.labels == encoded.input_ids
    assert encoded.input_ids[-1] == tokenizer.eos_token_id
    assert encoded.target_tokens == len(encoded.input_ids) - 1


def test_train_on_prompt_counts_all(tokenizer):
    encoded = encoder(tokenizer, train_on_prompt=True)(Pair("q", "", "a"))
    assert encoded.labels == encoded.input_ids


def test_truncation_keeps_the_head_of_the_answer(tokenizer):
    encoded = encoder(tokenizer)(Pair("q", "", "red orange yellow"))
    cut = encoded.head(encoded.shortest + 1)
    assert cut.target_tokens == 2
    assert cut.input_ids == encoded.input_ids[: encoded.shortest + 1]
    assert encoded.head(encoded.shortest).target_tokens == 1
    assert encoded.head(encoded.shortest - 1).target_tokens == 0


def test_plain_template(tokenizer, decoded_targets):
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
def test_every_turn_of_the_assistant_in_any_template(template, expected, decoded_targets):
    encoded = encoder(with_template(template))(TURNS)
    found = decoded_targets(encoded)
    assert found == expected if expected else all(run == "hi there<|end|>\n" for run in found) and len(found) == 2


def test_reasoning_of_the_last_turn_counts(decoded_targets):
    think = "<think>\nhm\n</think>\n\n"
    turns = [
        {**turn, "content": think + turn["content"]} if turn["role"] == "assistant" else turn for turn in TURNS.turns
    ]
    encoded = encoder(with_template(THINKS))(Chat(tuple(turns)))
    assert decoded_targets(encoded) == ["hi there<|end|>", f"{think}hi there<|end|>"]


def test_tokens_are_those_of_the_whole_rendered_text():
    tokenizer = with_template(CHATML)
    encoded = encoder(tokenizer)(TURNS)
    text = tokenizer.apply_chat_template(list(TURNS.turns), tokenize=False)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_answer_of_several_bytes_a_character(decoded_targets):
    turns = Chat(({"role": "user", "content": "q"}, {"role": "assistant", "content": " \u00fc\U0001f600 "}))
    assert decoded_targets(encoder(with_template(CHATML))(turns)) == [" \u00fc\U0001f600 <|end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), "does not write its content|depends on"),
        (CHATML.replace("{{ m.content }}", "{{ m.content[0] }}"), "cannot be found"),
        ("{{ messages | length }} {% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "2 times"),
        (MARKS.replace("{{ m.content }}{% endgen", "{% endgen"), "enclose nothing"),
    ],
)
def test_span_that_cannot_be_found_is_an_error(template, reason):
    with pytest.raises(UserError, match=reason) as error:
        encoder(with_template(template))(TURNS)
    assert "--chat_template plain" in str(error.value)


def test_what_a_template_refuses_is_a_bad_row():
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    with pytest.raises(BadRow, match="no system"):
        encoder(with_template(template))(TURNS)


def test_template_that_needs_a_turn_is_no_obstacle():
    template = "{% set first = messages[0].role %}{{ first[0] }}" + CHATML
    turns = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "q"}]

    def render(given, asks):
        return (
            with_template(template).apply_chat_template(list(given), tokenize=False, add_generation_prompt=asks)
            if given
            else ""
        )

    text, spans = answer_spans(turns, render, ["<|end|>"])
    assert [text[a:b] for a, b in spans] == ["hi<|end|>"]


def test_choice_of_the_template(tmp_path, decoded_targets):
    pair = Pair("q", "c", "a")
    tokenizer = with_template(CHATML)
    assert tokenizer.decode(encoder(tokenizer)(pair).input_ids).startswith("### Instruction")
    chat = tokenizer.decode(encoder(tokenizer, "tokenizer")(pair).input_ids)
    assert chat == "<|start|>user\nq\n\nc<|end|>\n<|start|>assistant\na<|end|>\n"
    assert tokenizer.decode(encoder(tokenizer, "plain")(pair).input_ids).startswith("### User:\nq\n\nc")
    (tmp_path / "own.jinja").write_text(RETURNS)
    assert decoded_targets(encoder(tokenizer, str(tmp_path / "own.jinja"))(TURNS))[-1] == "hi there<|return|>"


@pytest.mark.parametrize("choice", ["tokenizer", "missing.jinja"])
def test_template_that_cannot_be_had(tokenizer, choice):
    with pytest.raises(UserError, match=f"--chat_template {choice}"):
        encoder(tokenizer, choice)
