"""Settings: declared once, checked on construction."""

import dataclasses

import pytest

from superoffload import config
from superoffload.errors import UserError
from superoffload.setting import settings_of

pytestmark = pytest.mark.unit

VALUES = {"model_name": "m", "output_dir": "out"}


def test_flat_is_the_inverse_of_build() -> None:
    values = config.flat(config.build({**VALUES, "lr": 3e-4, "wandb_tags": ("a",)}))
    assert values["lr"] == 3e-4
    assert config.flat(config.build(values)) == values


def test_no_setting_has_two_owners() -> None:
    names = [spec.name for group in config.GROUPS.values() for spec in settings_of(group)]
    assert len(names) == len(set(names))


def test_every_setting_has_a_help_text() -> None:
    for spec in config.SPECS.values():
        assert spec.metadata["help"].endswith(".")


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.build(VALUES).training.lr = 1.0  # type: ignore[misc]


def test_construction_checks_the_limits() -> None:
    with pytest.raises(UserError, match="--warmup 2.5"):
        config.TrainingSettings(warmup=2.5)
    with pytest.raises(UserError, match="--lr inf"):
        config.TrainingSettings(lr=float("inf"))


def test_several_values_may_be_given_as_one_text() -> None:
    data = config.build({**VALUES, "dataset_name": "rows.jsonl"}).data
    assert data.dataset_name == ("rows.jsonl",)
    assert config.build({**VALUES, "dataset_name": ["a", "b"]}).data.dataset_name == ("a", "b")


@pytest.mark.parametrize("saved", ["tatsu-lab/alpaca", ["tatsu-lab/alpaca"]])
def test_a_checkpoint_may_name_its_only_data_set_as_a_text(saved: str | list[str]) -> None:
    """Release 0.1.0 wrote a text; a manifest holds a list."""
    assert config.differences(config.build(VALUES), {**VALUES, "dataset_name": saved}) == []


def test_every_choice_of_rows_shapes_the_run() -> None:
    before = {**VALUES, "dataset_name": ["a", "b:0.5"], "dataset_weights": [1.0, 2.0]}
    assert config.differences(config.build(before), before) == []
    changes = {
        "dataset_name": ("a", "b:0.4"),
        "dataset_weights": (),
        "shuffle_rows": True,
    }
    found = [config.differences(config.build({**before, name: value}), before) for name, value in changes.items()]
    assert found == [
        ["--dataset_name: checkpoint has a b:0.5, this run has a b:0.4"],
        ["--dataset_weights: checkpoint has 1.0 2.0, this run has (none)"],
        ["--shuffle_rows: checkpoint has False, this run has True"],
    ]


@pytest.mark.parametrize(
    "values",
    [{"eval_percentage": 5.0}, {"eval_dataset": "rows.jsonl", "eval_config": "en"}, {"sample_prompts": "prompts.txt"}],
)
def test_eval_steps_needs_something_to_evaluate(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match="--eval_steps 10: there is nothing to evaluate; add --eval_percentage"):
        config.build({**VALUES, "eval_steps": 10})
    assert config.build({**VALUES, "eval_steps": 10, **values}).evaluation.eval_steps == 10


def test_eval_config_needs_a_data_set() -> None:
    with pytest.raises(UserError, match="--eval_config en: there is no --eval_dataset"):
        config.build({**VALUES, "eval_config": "en"})
