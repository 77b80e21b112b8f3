"""`superoffload chat` and `superoffload eval` with what a run has left: the same answers, the same losses."""

import json
import re
from pathlib import Path

import pytest

from superoffload.model.tokenizer import load_tokenizer
from tests.helpers import models
from tests.helpers.forked import launch, run_forked
from tests.helpers.tokenizers import make_chat_tokenizer

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PROMPTS = ("the of and to", "that is for it")


@pytest.fixture(scope="module")
def said(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run on two sources with held-out rows and sample prompts; return the output folder and what was logged."""
    folder = tmp_path_factory.mktemp("use")
    first, second = (models.write_rows(folder / f"{name}.json", seed=seed) for seed, name in enumerate(("one", "two")))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    done = launch(
        1, "--model_name", str(model_folder), "--dataset_name", str(first), str(second), "--output_dir",
        str(folder / "out"), "--max_length", "128", "--max_steps", "6", "--lr", "5e-3", "--eval_percentage", "20",
        "--sample_prompts", str(folder / "prompts.txt"), "--save_checkpoint", "--export", "--batch_size", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", done.stderr


@pytest.mark.slow
def test_an_export_has_the_template_of_training_and_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    models.make_model(vocab_size=448).save_pretrained(tmp_path / "model")
    make_chat_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "own.jinja").write_text(CHATML)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 8)
    done = launch(
        1, "--model_name", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir",
        str(tmp_path / "out"), "--chat_template", str(tmp_path / "own.jinja"), "--max_length", "128", "--max_steps",
        "1", "--save_checkpoint", "--export",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    export = tmp_path / "out" / "model_step1"
    tokenizer = load_tokenizer(str(export))
    assert tokenizer.chat_template == CHATML
    ends = json.loads((export / "generation_config.json").read_text())["eos_token_id"]
    assert ends == tokenizer.convert_tokens_to_ids(["<eos>", "<|end|>"])


def run(*words: str) -> str:
    done = run_forked(["-m", "superoffload.commands", *words])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("where", ["", pytest.param("global_step6", marks=pytest.mark.slow), "model_step6"])
def test_answers_are_those_of_the_evaluation(where: str, said: tuple[Path, str]) -> None:
    out, log = said
    samples = re.findall(r"INFO Sample \|.*?### Response:\n \| (.*?)\n(?=\d{4}-)", log, re.S)
    flags = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert len(samples) == len(PROMPTS)
    assert run("chat", str(out / where), "--max_new_tokens", "64", *flags) == "".join(f"{text}\n" for text in samples)


def test_a_run_is_compared_with_the_model_it_started_from(said: tuple[Path, str], model_folder: Path) -> None:
    shown = run("chat", str(said[0]), "--prompt", PROMPTS[0], "--compare", "base", "--max_new_tokens", "8")
    assert re.findall(r"^--- (.*)$", shown, re.M) == [f"{said[0]} (step 6)", str(model_folder)]


def test_losses_are_those_of_the_evaluation(said: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (expected,) = [line for line in lines if "eval_loss" in line]
    for where in ("", "model_step6"):
        table = run("eval", str(out / where), "--json", str(tmp_path / "losses.json"))
        found = json.loads((tmp_path / "losses.json").read_text())
        assert found["loss"] == expected["eval_loss"] and found["target_tokens"] == expected["eval_target_tokens"]
        for label in ("one", "two"):
            assert found["sources"][label]["loss"] == expected[f"eval_loss/{label}"]
        assert [line.split()[0] for line in table.splitlines()[1:]] == ["source", "one", "two", "all"]


def test_losses_of_another_data_set(said: tuple[Path, str], model_folder: Path, tmp_path: Path) -> None:
    other = models.write_rows(tmp_path / "other.json", count=9, seed=5)
    shown = {
        str(model): run("eval", str(model), "--dataset_name", str(other), "--max_length", "128").splitlines()[-1]
        for model in (said[0], model_folder)
    }
    trained, before = (line.split() for line in shown.values())
    assert trained[3] == before[3]  # the same target tokens
    assert float(trained[1]) < float(before[1]) - 0.5
