"""The rows, the tokenizer, the model and the scoring of the example."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from superoffload import tiny

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

pytestmark = pytest.mark.unit

EVERY_BYTE = "".join(map(chr, range(256)))
TEXTS = [
    EVERY_BYTE,
    "  two  spaces, a tab\t, line ends \r\n\n, and a trailing space ",
    "Zürich, 北京, \N{GRINNING FACE}, e\u0301, \u200d, \U0010ffff",
    tiny.prompt_of({"instruction": "Add.", "input": "1 + 1", "output": "2"}) + "2",
    "### Instruction: not a heading, ### Input",
]


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the example's files once for all tests."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write(folder)
    return folder


def test_rows_follow_from_the_seed() -> None:
    assert tiny.make_rows(1, 300, 30) == tiny.make_rows(1, 300, 30)
    assert tiny.make_rows(1, 300, 30) != tiny.make_rows(2, 300, 30)


def test_held_out_rows_do_not_depend_on_the_number_of_training_rows() -> None:
    assert tiny.make_rows(1, 10, 30)[1] == tiny.make_rows(1, 300, 30)[1]


@pytest.mark.parametrize("n_held_out", [200, tiny.MAX_HELD_OUT])
def test_no_held_out_input_is_in_the_training_rows(n_held_out: int) -> None:
    train, held_out = tiny.make_rows(3, 5000, n_held_out)
    lookups = {task.instruction for task in tiny.TASKS if task.is_lookup}
    seen = {(row["instruction"], row["input"]) for row in train}
    asked = [(row["instruction"], row["input"]) for row in held_out if row["instruction"] not in lookups]
    assert not seen & set(asked)
    assert len(set(asked)) == len(asked)
    assert len(train) == 5000
    assert len(held_out) == n_held_out


def test_too_many_held_out_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at most"):
        tiny.make_rows(1, 10, tiny.MAX_HELD_OUT + 1)


def test_every_kind_of_task_is_held_out_equally_often() -> None:
    _, held_out = tiny.make_rows(4, 0, 10 * len(tiny.TASKS))
    for task in tiny.TASKS:
        assert sum(row["instruction"] == task.instruction for row in held_out) == 10


def test_answers_are_right() -> None:
    rows, _ = tiny.make_rows(5, 6000, 0)
    opposites = {(row["input"], row["output"]) for row in rows if row["instruction"] == "Give the opposite."}
    assert {(answer, question) for question, answer in opposites} == opposites
    for row in rows:
        given, answer = row["input"], row["output"]
        match row["instruction"]:
            case "Reverse the word.":
                assert answer[::-1] == given
            case "Sort the digits.":
                assert list(answer) == sorted(given)
            case "Write in capitals.":
                assert answer.lower() == given
                assert answer.isupper()
            case "Count on.":
                assert [int(number) - int(given) for number in answer.split()] == [1, 2, 3]
            case "Name the capital.":
                assert answer.istitle()
                assert answer not in given


def test_answers_fit_into_the_tokens_that_scoring_generates() -> None:
    rows, _ = tiny.make_rows(6, 3000, 0)
    assert max(len(row["output"].encode()) for row in rows) < tiny.MAX_NEW_TOKENS


def test_a_row_without_input_has_no_input_heading() -> None:
    row = {"instruction": "Say hello.", "input": " ", "output": "hello"}
    assert tiny.prompt_of(row) == "### Instruction:\nSay hello.\n\n### Response:\n"


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_decodes_every_text_to_the_original(written: Path, text: str) -> None:
    made, loaded = tiny.make_tokenizer(), _load_tokenizer(written / "model")
    ids = made(text)["input_ids"]
    assert loaded(text)["input_ids"] == ids
    assert made.decode(ids) == loaded.decode(ids) == text


def test_tokenizer_has_one_token_for_each_byte_and_heading() -> None:
    tokenizer = tiny.make_tokenizer()
    assert len(tokenizer) == 256 + 2 + 3
    assert len(tokenizer("Zürich")["input_ids"]) == 7
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    assert len(tokenizer(tiny.prompt_of(row))["input_ids"]) == 3 + len("Add.") + len("1 + 1")


def test_model_is_written_and_loads_offline(written: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    expected = tiny.make_model(len(tiny.make_tokenizer())).bfloat16().state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    model = AutoModelForCausalLM.from_pretrained(written / "model", local_files_only=True, dtype="auto")
    tokenizer = _load_tokenizer(written / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.config.vocab_size == len(tokenizer)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_rows_are_written(written: Path) -> None:
    rows = [json.loads((written / name).read_text("utf-8")) for name in ("train.json", "held_out.json")]
    assert rows == list(tiny.make_rows(tiny.SEED, tiny.N_TRAIN, tiny.N_HELD_OUT))


def test_an_untrained_model_answers_every_row_and_gets_none_right(written: Path) -> None:
    tokenizer = _load_tokenizer(written / "model")
    _, held_out = tiny.make_rows(tiny.SEED, 0, 20)
    answers = tiny.score(tiny.make_model(len(tokenizer)), tokenizer, held_out)
    assert len(answers) == 20
    assert tiny.share_right(held_out, answers) == 0.0


def test_scoring_reads_what_comes_after_the_prompt_up_to_the_end_of_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    monkeypatch.setattr(tiny, "SCORE_BATCH_SIZE", 4)
    tokenizer = tiny.make_tokenizer()
    _, rows = tiny.make_rows(7, 0, 10)
    answer_of = {tiny.prompt_of(row): row["output"] for row in rows}

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: object) -> torch.Tensor:
        assert attention_mask[:, -1].all(), "prompts are padded on the left"
        assert not options["do_sample"]
        prompts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        answers = [answer_of[prompt] + tiny.EOS for prompt in prompts]
        ids = tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        return torch.cat([input_ids, ids], dim=1)

    model = cast("LlamaForCausalLM", SimpleNamespace(generate=generate, device=torch.device("cpu")))
    answers = tiny.score(model, tokenizer, rows)
    assert tiny.share_right(rows, answers) == 1.0


def test_share_right_counts_exact_answers() -> None:
    rows = [{"instruction": "Add.", "input": "1 + 1", "output": "2"}] * 4
    assert tiny.share_right(rows, ["2", "2 ", "22", "2"]) == 0.5
    with pytest.raises(ValueError):
        tiny.share_right(rows, ["2"])
    with pytest.raises(ValueError, match="no rows"):
        tiny.share_right([], [])
