"""A conversation: the template, its turns, and what is typed."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from superoffload import config
from superoffload.data.formats import Chat, Pair, Text
from superoffload.errors import UserError
from superoffload.model.load import load_whole
from superoffload.training import evaluation
from superoffload.use import dialogue, speaker
from superoffload.use.finished import Source
from superoffload.use.speaker import Manner, Speaker, Template
from tests.helpers.tokenizers import make_chat_tokenizer

pytestmark = pytest.mark.unit

Capture = pytest.CaptureFixture[str]


def run_on(rows: Path, **values: Any) -> Source:
    run = config.build({"model_name": "m", "output_dir": "o", "dataset_name": (str(rows),), **values})
    return Source(name="out", model=run.model, run=run)


def test_prompts_are_written_as_the_rows_of_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats, plain = make_chat_tokenizer("{{ messages }}"), make_chat_tokenizer()
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    assert speaker.template_of(run_on(rows), chats, {}).kind is Pair
    assert speaker.template_of(run_on(rows), chats, {"dataset_format": "messages"}).kind is Chat
    unknown = Source(name="m", model=run_on(rows).model)
    assert speaker.template_of(unknown, chats, {}).kind is Chat
    assert speaker.template_of(unknown, plain, {}).kind is Text
    assert speaker.template_of(unknown, plain, {"chat_template": "plain"}).kind is Chat
    rows.unlink()
    with caplog.at_level("WARNING", "superoffload"):
        assert speaker.template_of(run_on(rows, dataset_format="alpaca"), chats, {}).kind is Pair
    assert "cannot be read" in caplog.text and "prompts are written as pairs" in caplog.text


def make_speaker(model_folder: Path, kind: Any, **values: Any) -> Speaker:
    model, tokenizer = load_whole(model_folder)
    settings = config.DataSettings(chat_template="plain" if kind is Chat else "auto")
    return Speaker("small", model, tokenizer, Template(kind=kind, settings=settings), Manner(**values))


def test_a_system_message_needs_a_template_with_turns(model_folder: Path) -> None:
    with pytest.raises(UserError, match="--system: the Alpaca template has no place"):
        make_speaker(model_folder, Pair, system="Be brief.")


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    left: Iterator[str | type[BaseException]] = iter(lines)

    def read(_: str) -> str:
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of tokens of each prompt, and answer with a random model's four tokens."""
    lengths: list[int] = []
    generate: Callable[..., Any] = evaluation.generate_ids

    def recording(model: Any, tokenizer: Any, ids: list[int], **options: Any) -> Any:
        lengths.append(len(ids))
        if tokenizer.decode(ids).count("stop"):
            raise KeyboardInterrupt
        return generate(model, tokenizer, ids, **options)

    monkeypatch.setattr(evaluation, "generate_ids", recording)
    return lengths


def test_a_conversation_keeps_its_turns_until_it_is_reset(
    monkeypatch: pytest.MonkeyPatch, asked: list[int], model_folder: Path, capsys: Capture
) -> None:
    typed(monkeypatch, "hello", KeyboardInterrupt, "hello", "/nonsense", "/reset", "stop", "/reset", "hello", "/quit")
    dialogue.talk([make_speaker(model_folder, Chat, max_new_tokens=4)])
    first, second, _, again = asked
    assert first == again < second
    err = capsys.readouterr().err
    assert "small: the plain template, earlier turns are kept" in err and "/nonsense: no such command" in err


def test_prompts_of_a_script_stand_alone(asked: list[int], model_folder: Path, capsys: Capture) -> None:
    both = [make_speaker(model_folder, Chat, max_new_tokens=4), make_speaker(model_folder, Pair, max_new_tokens=4)]
    dialogue.answer_all(both, ["hello", "", "hello"])
    assert asked[:2] == asked[2:]
    assert capsys.readouterr().out.count("--- small\n") == 4
    with pytest.raises(KeyboardInterrupt):
        dialogue.answer_all(both, ["stop"])


def test_a_prompt_longer_than_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, capsys: Capture
) -> None:
    typed(monkeypatch, "word " * 200, EOFError)
    dialogue.talk([make_speaker(model_folder, Text)])
    assert "Error: the prompt has 999 tokens, and the model 512 positions; shorten it\n" in capsys.readouterr().err


def test_a_prompt_that_was_refused_is_no_turn_of_the_conversation(
    monkeypatch: pytest.MonkeyPatch, asked: list[int], model_folder: Path, capsys: Capture
) -> None:
    typed(monkeypatch, "word " * 200, "hello", EOFError)
    dialogue.talk([make_speaker(model_folder, Chat, max_new_tokens=4)])
    assert capsys.readouterr().err.count("Error: the prompt has") == 1
    assert len(asked) == 1 and asked[0] < 100


def test_sampling_depends_on_the_seed_alone(model_folder: Path) -> None:
    warm = make_speaker(model_folder, Text, temperature=1.0, max_new_tokens=12)
    answers = []
    for number in (1, 1, 2):
        speaker.seed(number)
        answers.append(warm.ask("hello", lambda text: None))
    assert answers[0] == answers[1] != answers[2]
