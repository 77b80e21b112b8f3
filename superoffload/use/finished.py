"""Find and load a finished model: a model folder, a hub id, a checkpoint, or the newest checkpoint of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from superoffload import config, config_file
from superoffload.checkpoint import manifest, rank_files
from superoffload.checkpoint.output_folder import CONFIG_FILE
from superoffload.checkpoint.rank_files import RankFiles
from superoffload.checkpoint.trust import NO_TRUST, Trust
from superoffload.config import Config, ModelSettings
from superoffload.errors import UserError
from superoffload.export import files, weights
from superoffload.log import logger
from superoffload.model import architecture, attention, load
from superoffload.model.flops import count_parameters
from superoffload.model.tokenizer import load_tokenizer
from superoffload.planning import machine
from superoffload.protocols import Model, Tokenizer

BYTES_PER_PARAMETER = 2  # bfloat16
DS_CONFIG: dict[str, Any] = {"bf16": {"enabled": True}}  # the dtype, as the package reads it


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a finished model is, before its weights are read.

    name: as the user gave it. model: its settings as a model; of a checkpoint, those of the model it started from.
    checkpoint: the files to read its weights from, None for a model folder or a hub id. run: the settings of the run
    that made it, None if they are not known. trust: what may run code.
    """

    name: str
    model: ModelSettings
    checkpoint: RankFiles | None = None
    run: Config | None = None
    trust: Trust = NO_TRUST

    @property
    def title(self) -> str:
        """Return what to call it: its name, and the step of a checkpoint."""
        step = self.checkpoint.progress.get("step") if self.checkpoint else None
        return f"{self.name} (step {step})" if step is not None else self.name


def find(name: str, revision: str | None = None, trust: Trust = NO_TRUST) -> Source:
    """Find a model and the settings of the run that made it; reads no weights.

    name: a model folder, a hub id, the folder of a checkpoint, or the output folder of a run, whose newest checkpoint
    is used. Raises `UserError` for anything else.
    """
    folder = Path(name).expanduser()
    path = str(folder) if folder.is_dir() else name
    plain = ModelSettings(model_name=path, revision=revision, trust_remote_code=trust.code)
    if not folder.is_dir():
        _check_not_local(name, folder)
        return Source(name=name, model=plain, trust=trust)
    if not _holds_checkpoint(folder):
        if (folder / CONFIG_FILE).is_file():
            raise UserError(f"{name}: this run has saved no checkpoint; runs with --save_checkpoint or --save_steps do")
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{name}: neither a model (no config.json) nor a checkpoint, nor the output folder of a run"
            )
        return Source(name=name, model=plain, run=_run_around(folder), trust=trust)
    checkpoint = rank_files.read(folder, trusted=trust.files)
    if not trust.files:
        files.check_links(checkpoint)
    run = config.build({"output_dir": "", **checkpoint.config}) if checkpoint.config.get("model_name") else None
    started_from = replace(run.model, trust_remote_code=trust.code) if run else plain
    return Source(name=name, model=started_from, checkpoint=checkpoint, run=run, trust=trust)


def _check_not_local(name: str, path: Path) -> None:
    """Raise `UserError` for a file, and for a checkpoint that a run's output folder does not have: no hub ids."""
    if path.is_file():
        raise UserError(f"{name}: is a file; give a model folder, a checkpoint, or the output folder of a run")
    if (path.parent / CONFIG_FILE).is_file():
        known = [found.name for found in manifest.complete_checkpoints(path.parent)]
        raise UserError(f"{name}: no such folder; the checkpoints of this run are {', '.join(known) or '(none)'}")


def _holds_checkpoint(folder: Path) -> bool:
    return (
        (folder / manifest.LATEST).exists()
        or manifest.read(folder) is not None
        or manifest.is_incomplete(folder)
        or any(folder.glob("*_model_states.pt"))
    )


def _run_around(folder: Path) -> Config | None:
    """Return the settings of the run in whose output folder a model was exported, None if there is none."""
    settings = folder.resolve().parent / CONFIG_FILE
    if not (folder.resolve().name.startswith("model_step") and settings.is_file()):
        return None
    return config.build({"model_name": str(folder), "output_dir": "", **config_file.read(str(settings))})


def tokenizer_of(source: Source) -> Tokenizer:
    """Load the tokenizer; that of a checkpoint is in the output folder, or else that of the original model."""
    with _named(source):
        if source.checkpoint and any(source.checkpoint.output_dir.glob("tokenizer*")):
            return load_tokenizer(str(source.checkpoint.output_dir), None, source.trust.code)
        return load_tokenizer(*source.model.origin)


def load_model(source: Source, device: torch.device, *, packs: bool = False) -> Model:
    """Load the model in bfloat16 onto a device, whole in this process.

    The weights of a checkpoint are read one tensor at a time, and rounded as the run had rounded them. packs: choose
    the attention kernel for packed rows, as a run does. Raises `UserError`, also if the memory does not suffice.
    """
    with _named(source):
        if source.checkpoint:
            skeleton = files.empty_model(source.checkpoint, source.trust.code)
        else:
            settings = load.load_config(*source.model.origin)
            skeleton = architecture.empty_model(settings, source.trust.code)
        size = count_parameters(skeleton) * BYTES_PER_PARAMETER
        _check_memory(source, size, device)
        kernel = attention.choose(source.model, skeleton.config, DS_CONFIG, packs)
        if source.checkpoint:
            model = _from_checkpoint(source.checkpoint, skeleton, source.trust.code, kernel)
        else:
            model = load.load_unsharded(source.model, settings, skeleton, kernel)
    logger.info("Loaded %s: %.2f GB", source.title, size / 1e9)
    return model.to(device)  # type: ignore[attr-defined, no-any-return]


def _check_memory(source: Source, size: int, device: torch.device) -> None:
    """Raise `UserError` if the weights alone need more than there is, in host memory or on the device."""
    available = {"host": machine.look(devices=()).host_available_bytes}
    if device.type == "cuda":
        available["device"] = machine.current_device().free_bytes
    for place, free in available.items():
        if size > free:
            advice = "; use --device cpu" if place == "device" else ""
            needs = f"its weights need {size / 1e9:.1f} GB and the {place} has {free / 1e9:.1f} GB free"
            raise UserError(f"{source.name}: {needs}{advice}")


@torch.no_grad()
def _from_checkpoint(checkpoint: RankFiles, skeleton: Model, trust_code: bool, kernel: str | None) -> Model:
    """Build the model and copy the checkpoint's weights into it, one tensor at a time."""
    names = weights.wanted(skeleton, checkpoint, torch.bfloat16)
    model = architecture.blank_model(skeleton.config, trust_code, kernel)
    places = model.state_dict()
    for name in names:
        places[name].copy_(rank_files.gather(checkpoint.tensors[name], places[name].dtype))
    if (checkpoint.output_dir / files.GENERATION_CONFIG).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.output_dir)
    return model


@contextmanager
def _named(source: Source) -> Iterator[None]:
    """Name the model in an error as the user gave it: here it is no value of `--model_name`."""
    try:
        yield
    except UserError as error:
        text = str(error)
        found = text.partition(": ")[2] if text.startswith("--model_name") else ""
        if not found:
            raise
        raise UserError(f"{source.name}: {found}") from error
