"""The files of an export beside its weights."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import transformers

from superoffload.checkpoint import rank_files
from superoffload.checkpoint.trust import Trust
from superoffload.errors import UserError
from superoffload.export import files, picture, weights
from tests.helpers.exports import STEPS, Trained, load


def test_the_files_of_an_export(trained: dict[str, Trained], tmp_path: Path) -> None:
    run = trained["llama"]
    target = tmp_path / "new" / "target"
    weights.export(run.output_dir / f"global_step{STEPS}", target)
    assert set(os.listdir(target)) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert os.listdir(tmp_path / "new") == ["target"]
    described = json.loads((target / "config.json").read_text())
    assert (described["dtype"], described["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert described["use_cache"] is True
    assert transformers.AutoTokenizer.from_pretrained(target).eos_token == "<eos>"
    assert transformers.GenerationConfig.from_pretrained(target).eos_token_id == 0


def test_missing_files_come_from_the_original_model(damaged: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (damaged / name).unlink()
    weights.export(damaged, tmp_path / "target")
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "target")) == 257
    assert load(tmp_path / "target").config.num_hidden_layers == 2


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "additional_chat_templates"])
def test_a_link_out_of_the_output_folder_is_not_copied(name: str, damaged: Path, tmp_path: Path) -> None:
    private = damaged.parents[1] / f"private_{name}"
    private.mkdir()
    shutil.copyfile(damaged / "tokenizer_config.json", private / "file")
    (damaged / name).unlink(missing_ok=True)
    (damaged / name).symlink_to(private if name.startswith("additional") else private / "file")
    with pytest.raises(UserError, match=f"{damaged / name}: a link that leads out of the output folder; --trust_ch"):
        weights.export(damaged, tmp_path / "target")
    weights.export(damaged, tmp_path / "target", trust=Trust(files=True))
    assert (tmp_path / "target" / name).exists()


def test_the_model_card_names_data_settings_and_loss(damaged: Path, tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 5.0 - step} for step in range(1, STEPS + 3)]
    (damaged / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"cut sho')
    weights.export(damaged, tmp_path / "target")
    card = (tmp_path / "target" / "README.md").read_text()
    assert f"| training loss | {5.0 - STEPS:.4f} |" in card  # the last line was cut off
    assert "datasets:\n- tatsu-lab/alpaca\n" in card
    assert "| lr | 0.005 |" in card
    assert f"| steps | {STEPS} |" in card
    (damaged / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert files.reached_loss(damaged, STEPS) == 5.0 - STEPS  # of the checkpoint, not of the run's end
    (damaged / "metrics.jsonl").unlink()
    assert "| dataset_name | tatsu-lab/alpaca |" in card and "dataset_weights" not in card
    assert files.reached_loss(damaged, STEPS) is None
    (damaged / "summary.json").write_text(json.dumps({"steps": STEPS, "final_loss": 1.25}))
    assert files.reached_loss(damaged, STEPS) == 1.25
    assert files.reached_loss(damaged, STEPS - 1) is None


def test_the_model_card_has_curve_evaluation_and_licence(damaged: Path, tmp_path: Path) -> None:
    lines: list[dict[str, float]] = [{"step": step, "loss": 5.0 - step} for step in range(1, STEPS + 1)]
    lines += [{"step": STEPS, "eval_loss": 3.25}, {"step": STEPS + 1, "eval_loss": 1.0}]
    (damaged / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    weights.export(damaged, tmp_path / "target")
    card = (tmp_path / "target" / "README.md").read_text()
    assert f"| loss on held-out rows | 3.2500 (step {STEPS}) |" in card and "license" not in card
    assert card.endswith("(loss.png)\n")
    assert (tmp_path / "target" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_licence_is_that_of_a_base_model_in_a_folder(trained: dict[str, Trained], tmp_path: Path) -> None:
    checkpoint = rank_files.read(trained["llama"].output_dir)
    checkpoint.config["model_name"] = str(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model\n")
    assert "\nlicense: apache-2.0\n" in files.card(checkpoint, "bfloat16")
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in files.card(checkpoint, "bfloat16")


def test_the_model_card_names_every_data_set(trained: dict[str, Trained]) -> None:
    checkpoint = rank_files.read(trained["llama"].output_dir)
    checkpoint.config.update(
        dataset_name=["owner/one:0.5", "./rows.jsonl", "owner/two#7"], dataset_weights=[1.0, 2.0, 1.0]
    )
    card = files.card(checkpoint, "bfloat16")
    assert "datasets:\n- owner/one\n- owner/two\n---" in card
    assert "on one, rows.jsonl, two\n" in card
    assert "| dataset_name | owner/one:0.5 ./rows.jsonl owner/two#7 |" in card
    assert "| dataset_weights | 1.0 2.0 1.0 |" in card


def test_the_model_card_names_what_was_trained(trained: dict[str, Trained]) -> None:
    checkpoint = rank_files.read(trained["llama"].output_dir)
    card = files.card(checkpoint, "bfloat16")
    assert "| loss | cross_entropy |" in card
    names = ("decay", "min_lr_ratio", "label_smoothing", "neftune_alpha", "freeze")
    assert not any(f"| {name} |" in card for name in names)
    for name in names:
        checkpoint.config.pop(name)  # as in a checkpoint of 0.1.0
    assert files.card(checkpoint, "bfloat16") == card
    checkpoint.config.update(lr_scheduler="wsd", decay=0.1, label_smoothing=0.2, freeze=["embed|head", "norm"])
    card = files.card(checkpoint, "bfloat16")
    assert "| decay | 0.1 |" in card and "| label_smoothing | 0.2 |" in card
    assert r"| freeze | embed\|head norm |" in card


@pytest.mark.unit
def test_a_matplotlib_that_does_not_work_leaves_out_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # an import raises ImportError
    assert not picture.draw(tmp_path / "loss.png", [(1, 2.0), (2, 1.0)], [])
    assert "The model card has no curve of the loss: " in caplog.text and list(tmp_path.iterdir()) == []
