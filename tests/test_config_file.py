"""A file of settings: how it is read, what is refused, what a run writes, and its schema."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from superoffload import cli, config, config_file, ds_config
from superoffload.checkpoint import output_folder
from superoffload.errors import UserError
from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.unit

REQUIRED = "model_name: m\noutput_dir: out\n"
JSON: dict[str, Any] = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


@pytest.fixture
def parsed(tmp_path: Path) -> Any:
    """Parse the text of a file, and flags."""

    def parse(text: str | bytes, *flags: str) -> config.Config:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return cli.parse(["--config", str(path), *flags])

    return parse


def test_groups_and_flat_names_and_flags_that_win(parsed: Any) -> None:
    text = REQUIRED + "lr: 2e-5\ndata:\n  max_length: 512\n  packing: false\ntraining:\noutput:\n  log_interval: 7\n"
    found = parsed(text, "--max_length", "64", "--output_dir", "other")
    assert (found.model.model_name, found.output.output_dir, found.training.lr) == ("m", "other", 2e-5)
    assert (found.data.max_length, found.data.packing, found.output.log_interval) == (64, False, 7)
    assert found.explicit == {"model_name", "output_dir", "lr", "max_length", "packing", "log_interval"}


def test_a_flag_can_undo_each_switch(parsed: Any) -> None:
    text = REQUIRED + "checkpoint: {save_checkpoint: true}\npacking: false\ndataset_name: [a, b]\n"
    found = parsed(text, "--no_save_checkpoint", "--packing", "--dataset_name", "c")
    assert (found.checkpoint.save_checkpoint, found.data.packing, found.data.dataset_name) == (False, True, ("c",))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lr: 1e-5", 1e-5),  # a text in YAML 1.1
        ("lr: '0.001'", 1e-3),
        ("sub_group_size: 4e8", 400_000_000),
        ("seed: 010", 10),  # 8 in YAML 1.1
        ("offload_ratio: auto", "auto"),
        ("tiled_mlp: auto", "auto"),
        ("tiled_mlp: 4", 4),
        ("deepspeed_config: ~/ds.json", str(Path.home() / "ds.json")),
        ("dataset_name: [~/a, b]", (str(Path.home() / "a"), "b")),
        (r"freeze: 'layers\.[0-7]\.'", (r"layers\.[0-7]\.",)),
        ("offload_ratio: .5", 0.5),
        ("packing: no", False),
        ("packing: OFF", False),
        ("save_checkpoint: yes", True),
        ("activation_checkpointing: true", "full"),  # a switch once
        ("activation_checkpointing: off", "none"),
        ("activation_checkpointing: none", "none"),
        ("activation_checkpointing: offload", "offload"),
        ("revision: no", "no"),  # false in YAML 1.1
        ("revision: 2024-01-01", "2024-01-01"),  # a date
        ("revision: 12e5678", "12e5678"),  # a number
        ("revision: 1_000", "1_000"),
        ("revision: 'null'", "null"),
        ("revision: null", None),
        ("revision:", None),
        ("wandb_tags: on", ("on",)),
        ("wandb_tags: [1, 'a b', yes]", ("1", "a b", "yes")),
        ("wandb_tags: []", ()),
        ("wandb_tags:", ()),
        ("dataset_name: 12:30", ("12:30",)),  # 750 in YAML 1.1
        ("dataset_weights: [1, 2e-1]", (1.0, 0.2)),
    ],
)
def test_values_are_read_by_the_type_of_their_setting(line: str, expected: Any, parsed: Any) -> None:
    more = "dataset_name: [a, b]\n" if "weights" in line else ""
    assert config.flat(parsed(REQUIRED + more + line))[line.split(":")[0]] == expected


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\ufeff", "null\n", "data:\n"])
def test_an_empty_file_has_no_settings(text: str, parsed: Any) -> None:
    assert parsed(text, "--model_name", "m", "--output_dir", "o").explicit == {"model_name", "output_dir"}


def test_json_is_yaml(parsed: Any) -> None:
    text = json.dumps({"model_name": "m", "output_dir": "o", "training": {"lr": 2e-7, "batch_size": 3}}, indent=1)
    assert parsed(text).training.batch_size == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_lenght: 8", "line 1: max_lenght: there is no such setting; did you mean max_length?"),
        ("data:\n  max-length: 8", "line 2: max-length: there is no such setting; did you mean max_length?"),
        ("training_:\n  lr: 1", "line 2: training_: there is no such setting; did you mean training?"),
        ("qqqq: 8", "line 1: qqqq: there is no such setting"),
        ("data:\n  lr: 1e-5", "line 2: data.lr: belongs to the group training; move it there"),
        ("data: 5", "line 1: data: is a group of settings; write them under it, indented"),
        ("local_rank: 0", "line 1: local_rank: the launcher sets it; remove it"),
        ("config: other.yaml", "line 1: config: there is no such setting"),
        ("lr: 1e-5\nlr: 2e-5", "line 2: lr: is given twice, first in line 1; remove one"),
        ("lr: 1e-5\ntraining: {lr: 2e-5}", "line 2: lr: is given twice, first in line 1; remove one"),
        ("data: {packing: no}\ndata: {seed: 1}", "line 2: data: is given twice, first in line 1; remove one"),
        ("lr: 20", "line 1: lr 20.0: must be 0 < value <= 10"),
        ("lr: nan", "line 1: lr nan: must be 0 < value <= 10"),
        ("lr: .nan", "line 1: lr .nan: must be a number"),
        ("lr: fast", "line 1: lr fast: must be a number"),
        ("lr: [1]", "line 1: lr: must be a number"),
        ("lr:", "line 1: lr: no value is given; give one, or remove the line"),
        ("offload_ratio: most", "line 1: offload_ratio most: must be a number or auto"),
        ("batch_size: 1.5", "line 1: batch_size 1.5: must be a whole number"),
        ("batch_size: 1e400", "line 1: batch_size 1e400: must be a whole number"),
        ("seed: 0x10", "line 1: seed 0x10: must be a whole number"),
        ("packing: 1", "line 1: packing 1: must be true or false"),
        ("activation_checkpointing: ofload", "must be one of none, full, offload; did you mean offload?"),
        ("lr_scheduler: cosin", "did you mean cosine?"),
        ("log_level: info", "did you mean INFO?"),
        ("model_name: {a: b}", "line 1: model_name: must be one text"),
        ("dataset_name: []", "line 1: dataset_name: no value is given"),
        ("dataset_name: [[a]]", "line 1: dataset_name: must be one text"),
        ("revision: !include x", "line 1: revision: the tag !include has no meaning here; remove it"),
        ("revision: !!python/object/apply:os.system [ls]", "revision: the tag tag:yaml.org,2002:python/object/apply:"),
        ("data:\n\tlr: 1", "'\\t' that cannot start any token; indent with spaces"),
        ('freeze: "layers\\.0"', "line 1: is not YAML: found unknown escape character '.'; use single quotes"),
        ("lr: [1", "is not YAML: "),
        ("a: b: c", "line 1: is not YAML: mapping values are not allowed here"),
        ("lr: 1\n---\nlr: 2", "is not YAML: "),
        ("- lr", "line 1: holds no settings; write one per line, as in lr: 2e-5"),
        ("lr", "line 1: holds no settings; write one per line"),
        ("? [a]\n: b", "line 1: a key must be the name of a setting"),
        ("<<: {lr: 1}", "line 1: <<: there is no such setting"),
        ("[" * 5000, "is n"),
        (b"lr: \xff\xfe", "is not UTF-8 text"),
        ("lr: \x00", "is not YAML: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_the_file(text: str | bytes, words: str, parsed: Any) -> None:
    with pytest.raises(UserError) as raised:
        parsed(text, "--model_name", "m", "--output_dir", "o")
    assert str(raised.value).startswith("--config ") and "run.yaml" in str(raised.value)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"^--config no.yaml: cannot be read \(No such file or directory\)$"):
        cli.parse(["--config", "no.yaml"])


def test_a_file_need_not_give_what_flags_give(parsed: Any) -> None:
    with pytest.raises(UserError, match="'--output_dir'"):
        parsed("model_name: m\n")


CHANGED = [
    "--dataset_name", "a.jsonl:0.5", "no", "--dataset_weights", "1", "2e-7", "--lr", "1e-7", "--no_packing",
    "--save_checkpoint", "--export", "--revision", "1e5", "--wandb_run_name", "null", "--wandb_tags", "on", "ü: #x",
    "--offload_ratio", "auto", "--columns", "prompt=a b,completion=c", "--freeze", r"layers\.[0-7]\.", "--seed", "0",
]  # fmt: skip


def test_what_a_run_writes_is_read_back_as_it_was(parsed: Any) -> None:
    asked = cli.parse(["--model_name", "m", "--output_dir", "~", *CHANGED, "--local_rank=0"])
    text = config_file.write(asked)
    again = config.flat(parsed(text))
    assert again == {**config.flat(asked), "local_rank": -1}
    assert set(yaml.safe_load(text)) == set(config.GROUPS)


def test_a_run_writes_its_settings_on_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config.build({"model_name": "m", "output_dir": str(tmp_path)})
    monkeypatch.setattr("superoffload.distributed.is_rank_0", lambda: False)
    output_folder.write_settings(asked)
    assert not (tmp_path / "config.yaml").exists()
    monkeypatch.setattr("superoffload.distributed.is_rank_0", lambda: True)
    output_folder.write_settings(asked)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == config_file.write(asked)


FROM_JSON: dict[str, Any] = {
    **JSON,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 2,
    "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
    "optimizer": {"params": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 3e-4}},
    "zero_optimization": {**JSON["zero_optimization"], "sub_group_size": 0, "offload_param": {"device": "cpu"}},
}


@pytest.mark.parametrize("flags", [[], ["--batch_size", "8"], ["--warmup", "0.5", "--max_grad_norm", "2"]])
@pytest.mark.parametrize("found", [JSON, FROM_JSON], ids=["flags", "json"])
def test_a_repeated_run_resolves_to_the_same_settings(
    found: dict[str, Any], flags: list[str], parsed: Any, tmp_path: Path
) -> None:
    """What the DeepSpeed JSON decided is in the file, and does not contradict the JSON."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(found))
    first = cli.parse(["--model_name", "m", "--output_dir", "o", "--deepspeed_config", str(path), *flags])
    merged = ds_config.merge_flags(ds_config.read_ds_config(first), first, 2)
    again = parsed(config_file.write(merged.config))
    repeated = ds_config.merge_flags(ds_config.read_ds_config(again), again, 2)
    assert config.flat(repeated.config) == config.flat(merged.config)
    assert repeated.ds_config == merged.ds_config
    assert config_file.write(repeated.config) == config_file.write(merged.config)
    if found is FROM_JSON:
        assert (merged.config.training.lr, merged.config.training.lr_scheduler) == (3e-4, "linear")


def test_a_value_of_the_file_that_contradicts_the_json_is_an_error(parsed: Any, tmp_path: Path) -> None:
    """Also if it is the default: the JSON must not replace what somebody wrote."""
    (tmp_path / "ds.json").write_text(json.dumps(FROM_JSON))
    found = parsed(REQUIRED + f"lr: 1e-5\ndeepspeed_config: {tmp_path / 'ds.json'}\n")
    with pytest.raises(UserError, match=r"^--lr 1e-05 contradicts optimizer.params.lr 0.0003 in "):
        ds_config.merge_flags(ds_config.read_ds_config(found), found, 2)


def test_the_default_json_is_found_from_any_folder(
    parsed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config.build({"model_name": "m", "output_dir": "o"})
    monkeypatch.chdir(tmp_path)
    assert ds_config.read_ds_config(parsed(config_file.write(asked)))["zero_optimization"]["stage"] == 3
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "superoffload.json").write_text(json.dumps(FROM_JSON))
    own = cli.parse(["--model_name", "m", "--output_dir", "o", "--deepspeed_config", "configs/superoffload.json"])
    text = config_file.write(own)
    monkeypatch.chdir(REPOSITORY)
    assert ds_config.read_ds_config(parsed(text)) == FROM_JSON


def test_names_of_groups_and_settings_differ() -> None:
    assert not set(config.GROUPS) & set(config_file.settings())


def valid(value: Any, of: dict[str, Any]) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    return bool(jsonschema.Draft202012Validator(of).is_valid(value))


def test_the_schema_is_one_and_accepts_what_the_program_accepts() -> None:
    schema = json.loads(json.dumps(config_file.schema()))
    settings = {name for name in config.flat(config.build({"model_name": "m", "output_dir": "o"}))} - {"local_rank"}
    assert set(schema["$defs"]) == settings
    assert set(schema["properties"]) == settings | set(config.GROUPS)
    lr = schema["$defs"]["lr"]
    assert lr == {"description": "Peak learning rate.", "type": "number", "exclusiveMinimum": 0, "maximum": 10,
                  "default": 1e-5}  # fmt: skip
    assert schema["$defs"]["padding"]["enum"] == ["longest", "max_length"]
    assert schema["$defs"]["offload_ratio"]["anyOf"][1] == {"const": "auto"}
    assert "default" not in schema["$defs"]["model_name"]


def test_the_schema_in_a_validator() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(json.dumps(config_file.schema()))
    jsonschema.Draft202012Validator.check_schema(schema)
    for flags in ([], CHANGED):
        written = config_file.write(cli.parse(["--model_name", "m", "--output_dir", "o", *flags]))
        assert valid(yaml.safe_load(written), schema)
    for good in ({}, {"data": None}, {"lr": 1}, {"offload_ratio": "auto"}, {"dataset_name": "a"}, {"seed": 4e8},
                 {"activation_checkpointing": True}, {"activation_checkpointing": "offload"}):  # fmt: skip
        assert valid(good, schema), good
    wrong: list[Any] = [
        {"lr": 0}, {"lr": "1"}, {"max_lenght": 8}, {"data": {"lr": 1}}, {"dataset_name": []}, {"packing": 1},
        {"offload_ratio": "most"}, {"lr_scheduler": "zigzag"}, {"batch_size": 1.5}, {"local_rank": 0},
        {"activation_checkpointing": 1},
    ]  # fmt: skip
    for bad in wrong:
        assert not valid(bad, schema), bad
