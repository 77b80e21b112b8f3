"""The files of an export besides its weights: configuration, generation settings, tokenizer, model card."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers.dynamic_module_utils import custom_object_save

from superoffload import hub
from superoffload.checkpoint.rank_files import RankFiles
from superoffload.checkpoint.trust import TRUST
from superoffload.data import mixture
from superoffload.errors import UserError
from superoffload.export import picture
from superoffload.model import architecture, load
from superoffload.model.tokenizer import load_tokenizer
from superoffload.protocols import Model
from superoffload.setting import several, shown

CONFIG = "config.json"
CURVE = "loss.png"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
             "*.tiktoken", "chat_template*", "additional_chat_templates")  # fmt: skip
SETTINGS = (
    "revision", "dataset_name", "dataset_weights", "dataset_percentage", "max_length", "train_on_prompt", "lr",
    "lr_scheduler", "warmup", "weight_decay", "max_grad_norm", "batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "seed", "loss",
)  # fmt: skip
OPTIONS = ("min_lr_ratio", "label_smoothing", "neftune_alpha", "freeze")  # off if 0 or empty


def empty_model(checkpoint: RankFiles, trust_remote_code: bool = False) -> Model:
    """Build the model of a checkpoint on the meta device, where weights take no memory.

    Uses the configuration in the output folder, or else that of the model the run started from. Weights are exported as
    they were trained, so the quantization of the original no longer applies. Raises `UserError` if neither can be read.
    """
    return architecture.empty_model(_config(checkpoint, trust_remote_code), trust_remote_code)


def _config(checkpoint: RankFiles, trust_remote_code: bool) -> Any:
    if (checkpoint.output_dir / CONFIG).is_file():
        return load.load_config(str(checkpoint.output_dir), None, trust_remote_code)
    name = checkpoint.config.get("model_name")
    if not name:
        raise UserError(f"{checkpoint.output_dir}: has no config.json; copy the original model's there")
    try:
        return load.load_config(name, checkpoint.config.get("revision"), trust_remote_code)
    except UserError as error:
        raise UserError(
            f"{checkpoint.output_dir}: has no config.json, and the original cannot be read ({error})"
        ) from error


def check_links(checkpoint: RankFiles) -> None:
    """Raise `UserError` if a file that an export copies is a link out of the output folder, to what may be private."""
    folder = checkpoint.output_dir.resolve()
    for pattern in (CONFIG, GENERATION_CONFIG, *TOKENIZER):
        for top in checkpoint.output_dir.glob(pattern):
            for path in (top, *top.rglob("*")):
                if not path.resolve().is_relative_to(folder):
                    raise UserError(f"{path}: a link that leads out of the output folder; {TRUST} follows it")


def write(folder: Path, model: Model, checkpoint: RankFiles, dtype: str) -> None:
    """Write everything but the weights to `folder`."""
    config = model.config
    config.architectures = [type(model).__name__]
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        if part is not None:
            part.dtype = dtype
    config.save_pretrained(folder)
    if getattr(model, "_auto_class", None) is not None:
        custom_object_save(model, folder, config=config)  # the code that the model brings along
    _write_generation_config(folder, model, checkpoint)
    _write_tokenizer(folder, checkpoint)
    curves = [losses(checkpoint.output_dir, checkpoint.progress.get("step"), name) for name in ("loss", "eval_loss")]
    has_curve = picture.draw(folder / CURVE, *curves)
    (folder / "README.md").write_text(card(checkpoint, dtype, has_curve), encoding="utf-8")


def _write_generation_config(folder: Path, model: Model, checkpoint: RankFiles) -> None:
    kept = checkpoint.output_dir / GENERATION_CONFIG
    if kept.is_file():
        shutil.copyfile(kept, folder / GENERATION_CONFIG)
        return
    try:
        settings = transformers.GenerationConfig.from_pretrained(
            str(checkpoint.config.get("model_name")), revision=checkpoint.config.get("revision") or "main"
        )
    except (OSError, ValueError):
        settings = model.generation_config
    if settings is not None:
        settings.to_json_file(folder / GENERATION_CONFIG)


def _write_tokenizer(folder: Path, checkpoint: RankFiles) -> None:
    """Copy the tokenizer's files; use the original model's tokenizer if the output folder has none."""
    found = {path for pattern in TOKENIZER for path in checkpoint.output_dir.glob(pattern)}
    if any(path.name.startswith("tokenizer") for path in found):
        for path in sorted(found):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
            else:
                shutil.copyfile(path, folder / path.name)
    elif checkpoint.config.get("model_name"):
        load_tokenizer(checkpoint.config["model_name"], checkpoint.config.get("revision")).save_pretrained(folder)
    else:
        raise UserError(f"{checkpoint.output_dir}: has no tokenizer; copy the original model's files there")


def card(checkpoint: RankFiles, dtype: str, has_curve: bool = False) -> str:
    """Return the model card: base model and its licence, data, settings, losses, and their curve if there is one."""
    config, progress = checkpoint.config, checkpoint.progress
    name = str(config.get("model_name", ""))
    data = [mixture.name_of(text).partition("@")[0] for text in several(config.get("dataset_name") or ())]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    head += [f"base_model: {name}"] if _on_the_hub(name) else []
    head += [f"license: {licence}"] if (licence := _licence(name)) else []
    on_the_hub = list(filter(_on_the_hub, data))
    head += ["datasets:", *(f"- {source}" for source in on_the_hub)] if on_the_hub else []
    loss = reached_loss(checkpoint.output_dir, progress.get("step"))
    known = ", ".join(filter(None, (Path(source).name for source in data))) or "unknown data"
    title = f"{Path(name).name or 'a model'}, fine-tuned (all weights) on {known}"
    lines = [*head, "---", "", f"# {title}", ""]
    lines += [f"Trained with DeepSpeed ZeRO-3 with the optimizer on the host. The weights are in {dtype}.", ""]
    lines += ["| | |", "| --- | --- |"]
    rows: dict[str, Any] = {
        "base model": name,
        "revision": config.get("revision"),
        **{key: config.get(key) for key in SETTINGS},
        "decay": config.get("decay") if config.get("lr_scheduler") == "wsd" else None,
        **{key: config.get(key) or None for key in OPTIONS},
    }
    rows |= {"steps": progress.get("step"), "tokens trained on": progress.get("tokens") or None}
    rows["training loss"] = None if loss is None else f"{loss:.4f}"
    evaluations = losses(checkpoint.output_dir, progress.get("step"), "eval_loss")
    rows["loss on held-out rows"] = f"{evaluations[-1][1]:.4f} (step {evaluations[-1][0]})" if evaluations else None
    for key, value in rows.items():
        if value not in (None, "", [], ()):
            text = shown(tuple(value)) if isinstance(value, list | tuple) else str(value)
            escaped = text.replace("|", r"\|")
            lines.append(f"| {key} | {escaped} |")
    lines += ["", f"![training loss, and that on held-out rows, over the steps]({CURVE})"] if has_curve else []
    return "\n".join(lines) + "\n"


def _licence(model_name: str) -> str | None:
    """Return the licence that the card of a base model in a folder names; that of one on the hub is on its page."""
    readme = Path(model_name).expanduser() / "README.md"
    found = hub.metadata(readme).get("license") if model_name and readme.is_file() else None
    return found if isinstance(found, str) else None


def _on_the_hub(name: str) -> bool:
    return name.count("/") == 1 and not hub.looks_like_path(name) and not Path(name).exists()


def reached_loss(output_dir: Path, step: int | None) -> float | None:
    """Return the last loss logged up to `step`, or else the final loss of a run that ended there; None if unknown."""
    logged = losses(output_dir, step, "loss")
    loss = logged[-1][1] if logged else None
    for summary in _lines(output_dir / "summary.json"):
        if loss is None and summary.get("global_step", summary.get("steps")) == step:
            loss = summary.get("final_loss")
    return loss


def losses(output_dir: Path, step: int | None, name: str) -> list[tuple[int, float]]:
    """Return the steps up to `step` at which a loss was logged, and the loss: `loss` or `eval_loss`."""
    return [
        (line["step"], line[name])
        for line in _lines(output_dir / "metrics.jsonl")
        if step is not None and line.get("step", step + 1) <= step and isinstance(line.get(name), float)
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a file of JSON, one per file or per line, but for what cannot be read."""
    found = []
    with suppress(OSError, UnicodeDecodeError):
        text = path.read_text(encoding="utf-8")
        for part in [text] if path.suffix == ".json" else text.splitlines():
            with suppress(ValueError):  # the last line of a run that was killed
                found.append(json.loads(part))
    return [item for item in found if isinstance(item, dict)]
