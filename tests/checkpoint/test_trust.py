"""Checkpoints from strangers: no code of theirs runs on resume, conversion or export."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from superoffload import config
from superoffload.checkpoint import manifest, rank_files, resume, trust
from superoffload.checkpoint.convert import convert
from superoffload.errors import UserError
from tests.helpers.runs import make_checkpoint

NAME = "zero_pp_rank_0_mp_rank_00_model_states.pt"


class Marker:
    """Creates a folder when it is unpickled without limits."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Make a checkpoint whose file would create the folder `marker`; manifest and checksums fit."""
    folder = make_checkpoint(tmp_path / "out", 3, 1.0)
    torch.save({"dp_world_size": 1, "module": Marker(tmp_path / "marker")}, folder / NAME)
    describe(folder)
    return folder


def describe(folder: Path) -> None:
    described = json.loads((folder / "manifest.json").read_text())
    described["files"] = {NAME: manifest.describe(folder / NAME)}
    (folder / "manifest.json").write_text(json.dumps(described))


def resume_from(folder: Path, **values: Any) -> resume.Source | None:
    asked = config.build({"model_name": "m", "output_dir": str(folder.parent), "resume": "auto", **values})
    return resume.first_intact(asked, resume.find(asked))


WAYS: dict[str, Callable[[Path], object]] = {
    "resume": resume_from,
    "convert": lambda folder: convert(folder, folder.parent / "new", 1),
    "export": rank_files.read,
    "load": lambda folder: trust.load(folder / NAME),
}


@pytest.mark.parametrize("way", WAYS)
def test_code_in_a_checkpoint_does_not_run(way: str, strange: Path, tmp_path: Path, one_rank: None) -> None:
    with pytest.raises(UserError, match=rf"^{strange / NAME}: holds posix.mkdir, which no .* add --trust_checkpoint$"):
        WAYS[way](strange)
    assert not (tmp_path / "marker").exists()
    trust.load(strange / NAME, trusted=True)
    assert (tmp_path / "marker").exists()  # it would have run


def test_a_trusted_checkpoint_is_used(strange: Path, one_rank: None) -> None:
    assert resume_from(strange, trust_checkpoint=True) is not None


def test_deepspeed_loads_without_limits_only_if_it_is_trusted(strange: Path, tmp_path: Path) -> None:
    engine: Any = SimpleNamespace(checkpoint_engine=SimpleNamespace(name="torch"))
    inner = engine.checkpoint_engine
    with trust.loading(engine, trusted=False), pytest.raises(UserError):
        engine.checkpoint_engine.load(str(strange / NAME), map_location="cpu")
    assert not (tmp_path / "marker").exists()
    with trust.loading(engine, trusted=True):
        engine.checkpoint_engine.load(str(strange / NAME), map_location="cpu")
        assert engine.checkpoint_engine.name == "torch"
    assert (tmp_path / "marker").exists()
    assert engine.checkpoint_engine is inner


@pytest.mark.unit
def test_what_checkpoints_hold_is_allowed(tmp_path: Path) -> None:
    state = {
        "weights": torch.arange(3.0), "shape": torch.Size([3]), "scaler": LossScaler(2.0),
        "dynamic": DynamicLossScaler(2**16, 2.0, 1000, 1, 2), "stage": ZeroStageEnum.weights,
        "numpy": np.random.default_rng(0).bit_generator.state, "legacy": np.random.get_state(),
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    loaded = trust.load(tmp_path / "x.pt")
    assert torch.equal(loaded["weights"], state["weights"])
    assert (loaded["scaler"].cur_scale, loaded["stage"]) == (2.0, ZeroStageEnum.weights)
    assert loaded["numpy"] == state["numpy"] and (loaded["legacy"][1] == state["legacy"][1]).all()


class ByGetattr:
    """Is pickled as an attribute of something."""

    def __init__(self, kind: Any, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> Any:
        return getattr, (self.kind, self.name)


@pytest.mark.unit
def test_getattr_reads_the_zero_stage_and_nothing_else(tmp_path: Path) -> None:
    """Python 3.11.2, that of Debian 12, pickles members of enumerations so."""
    torch.save({"stage": ByGetattr(ZeroStageEnum, "weights")}, tmp_path / "x.pt")
    assert trust.load(tmp_path / "x.pt") == {"stage": ZeroStageEnum.weights}
    for kind, name in ((ZeroStageEnum, "__class__"), (ZeroStageEnum, "__init_subclass__"), (LossScaler, "__init__")):
        torch.save({"stage": ByGetattr(kind, name)}, tmp_path / "y.pt")
        with pytest.raises(UserError, match="y.pt: "):
            trust.load(tmp_path / "y.pt")


@pytest.mark.unit
def test_names_and_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "out", 3, 1.0)
    torch.save({}, tmp_path / "elsewhere.pt")
    (folder / NAME).unlink()
    (folder / NAME).symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match="a link that leads out of the checkpoint; --trust_checkpoint follows it"):
        trust.check(folder, [folder / NAME], trusted=False)
    trust.check(folder, [folder / NAME], trusted=True)
    for name in ("../elsewhere.pt", str(tmp_path / "elsewhere.pt")):
        described = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**described, "files": {name: {}}}))
        with pytest.raises(UserError, match="names '.*', which lies outside the checkpoint; do not use it"):
            manifest.read(folder)
    for tag in ("../other", "/tmp", "a/b", ".."):
        (folder.parent / "latest").write_text(tag)
        with pytest.raises(UserError, match="which lies outside the folder; do not use it"):
            rank_files.locate(folder.parent)


def test_files_that_a_manifest_leaves_out_do_not_run_either(tmp_path: Path, one_rank: None) -> None:
    """DeepSpeed itself loads what lies in the folder of a checkpoint for any number of ranks."""
    folder = make_checkpoint(tmp_path / "out", 3, 1.0)
    described = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**described, "universal": True, "files": {}}))
    (folder / NAME).unlink()
    (folder / "zero").mkdir()
    assert resume_from(folder) is not None
    torch.save(Marker(tmp_path / "marker"), folder / "zero" / "optimizer_state.pt")
    with pytest.raises(UserError, match=r"zero/optimizer_state.pt: holds posix.mkdir"):
        resume_from(folder)
    (folder / "zero" / "optimizer_state.pt").unlink()
    (folder / "zero" / "weight").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"zero/weight: a link that leads out of the checkpoint"):
        resume_from(folder)
    assert resume_from(folder, trust_checkpoint=True) is not None
    assert not (tmp_path / "marker").exists()


@pytest.mark.unit
def test_a_tensor_larger_than_its_file(tmp_path: Path) -> None:
    whole = torch.zeros(4)
    claimed = torch._utils._rebuild_tensor_v2

    class Liar:
        def __reduce__(self) -> Any:
            return claimed, (whole.untyped_storage(), 0, (2**40,), (1,), False, {})

    torch.save({"x": Liar()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: cannot be read"):
        trust.load(tmp_path / "x.pt")
