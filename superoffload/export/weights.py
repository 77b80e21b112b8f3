"""Export a checkpoint as a Hugging Face model folder: streamed from the rank files, complete or absent."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from superoffload.checkpoint import rank_files
from superoffload.checkpoint.manifest import require_intact, sync
from superoffload.checkpoint.rank_files import RankFiles
from superoffload.checkpoint.trust import NO_TRUST, Trust
from superoffload.errors import UserError
from superoffload.export import files
from superoffload.log import logger
from superoffload.protocols import Model

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
DEFAULT_DTYPE = "bfloat16"
DEFAULT_SHARD_SIZE = "5GB"
INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"^(.*?\.\d+)\.")
SMALL_FILES_BYTES = 64 * 2**20  # tokenizer and other small files, for the check of free space


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of the model that are converted together, e.g. fused experts that are split into single ones.

    `sources` holds them by their names in the model, `targets` by their names in the files; all on the meta device,
    with the shape and dtype of the export.
    """

    sources: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]


def export(
    source: Path,
    target: Path,
    dtype: str = DEFAULT_DTYPE,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    trust: Trust = NO_TRUST,
) -> None:
    """Write the checkpoint at `source`, an output folder or a checkpoint's own, as a model to the folder `target`.

    Reads the files of a complete checkpoint in one process, without collectives. Memory grows by less than twice the
    largest tensor in fp32 plus one shard. `target` appears once everything in it is verified, or not at all.
    Raises `UserError`.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: must be one of {', '.join(DTYPES)}")
    target = target.expanduser().resolve()
    _check_target(target)
    checkpoint = rank_files.read(source.expanduser(), trusted=trust.files)
    if not trust.files:
        files.check_links(checkpoint)
    require_intact(checkpoint.folder)
    model = files.empty_model(checkpoint, trust.code)
    groups = plan(model, wanted(model, checkpoint, DTYPES[dtype]))
    split = _split(groups, max_shard_size)
    _check_space(target, sum(tensor.nbytes for group in groups for tensor in group.targets.values()))

    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that was killed
        partial.mkdir(parents=True)
        _write_weights(partial, model, checkpoint, groups, split)
        files.write(partial, model, checkpoint, dtype)
        verify(partial, groups, split)
        _publish(partial, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("Exported %s to %s: %d file(s) of weights", checkpoint.folder, target, len(split.filename_to_tensors))


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{target}: exists and is not empty; choose another folder, or remove it")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; choose another name")


def _check_space(target: Path, size: int) -> None:
    """Raise `UserError` if the disk has no space for `size` bytes of weights."""
    existing = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size + SMALL_FILES_BYTES:
        raise UserError(
            f"{target}: needs {(size + SMALL_FILES_BYTES) / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
            "free some space, or choose a folder on another disk"
        )


def wanted(model: Model, checkpoint: RankFiles, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """List the tensors that the architecture saves, tied ones once, as meta tensors of the export's dtype.

    Weights get `dtype`, buffers keep theirs. Raises `UserError` if the checkpoint does not match the model.
    """
    left_out = {*(model.all_tied_weights_keys or {}), *(model._keys_to_ignore_on_save or ())}
    architecture = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    mismatch = f"{checkpoint.folder}: does not match {type(model).__name__}:"
    for name in checkpoint.tensors:
        if name not in architecture:
            raise UserError(f"{mismatch} it has an unknown {name}")
    result = {}
    for name, tensor in architecture.items():
        if name in left_out:
            continue
        if name not in checkpoint.tensors:
            raise UserError(f"{mismatch} it lacks {name}")
        found = checkpoint.tensors[name]
        if found.shape != tensor.shape or not tensor.numel():
            raise UserError(f"{mismatch} {name} has the shape {tuple(found.shape)}, not {tuple(tensor.shape)}")
        result[name] = tensor.to(found.dtype if name in buffers else dtype)
    return result


def plan(model: Model, wanted: dict[str, torch.Tensor]) -> list[Group]:
    """Split the tensors into the smallest groups that transformers can convert to the form used on the hub.

    transformers fuses some weights when it loads a model (the experts of a sparse block become one tensor) and splits
    them when it saves. Nearly always a tensor can be converted on its own; if not, a group is a layer or, at worst, the
    whole model.
    """
    whole = _saved_form(model, wanted)
    for parts in ([{name: tensor} for name, tensor in wanted.items()], _layers(wanted)):
        try:
            groups = [Group(part, _saved_form(model, part)) for part in parts]
        except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, TypeError):
            continue  # a conversion in transformers that needs more than this part
        made = [(name, tensor.shape) for group in groups for name, tensor in group.targets.items()]
        if sorted(made) == sorted((name, tensor.shape) for name, tensor in whole.items()):
            return groups
    return [Group(wanted, whole)]


def _saved_form(model: Model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert meta tensors to the form used on the hub, each with a storage of its own."""
    saved = revert_weight_conversion(model, dict(tensors))
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in saved.items()}


def _layers(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = LAYER.match(name)
        layers.setdefault(match.group(1) if match else name, {})[name] = tensor
    return list(layers.values())


def _split(groups: list[Group], max_shard_size: int | str) -> StateDictSplit:
    """Distribute the tensors over files of at most `max_shard_size`, e.g. `5GB` or a number of bytes."""
    targets = {name: tensor for group in groups for name, tensor in group.targets.items()}
    try:
        size = int(max_shard_size) if str(max_shard_size).isdigit() else max_shard_size
        if size == 0:
            raise ValueError("a shard cannot be empty")
        return split_torch_state_dict_into_shards(targets, max_shard_size=size)
    except ValueError as error:
        raise UserError(f"--max_shard_size {max_shard_size}: not a size such as 5GB or 500MB") from error


def _write_weights(
    folder: Path, model: Model, checkpoint: RankFiles, groups: list[Group], split: StateDictSplit
) -> None:
    """Write shard by shard, and an index if there are several."""
    group_of = {name: group for group in groups for name in group.targets}
    shards = split.filename_to_tensors
    for number, (file, names) in enumerate(shards.items(), 1):
        shard: dict[str, torch.Tensor] = {}
        made: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in made:
                made.clear()
                made = _make(model, checkpoint, group_of[name])
            shard[name] = _on_its_own(made.pop(name))
        made.clear()  # the rest of the group belongs to the next file and is converted again there
        save_file(shard, folder / file, metadata={"format": "pt"})
        logger.info("Wrote %s (%d of %d)", file, number, len(shards))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _on_its_own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor that keeps no larger one in memory."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor.contiguous()


def _make(model: Model, checkpoint: RankFiles, group: Group) -> dict[str, torch.Tensor]:
    """Gather the tensors of a group and convert them to the form used on the hub."""
    gathered = {
        name: rank_files.gather(checkpoint.tensors[name], planned.dtype) for name, planned in group.sources.items()
    }
    with torch.no_grad():
        return dict(revert_weight_conversion(model, gathered))


def verify(folder: Path, groups: list[Group], split: StateDictSplit) -> None:
    """Read the files back: each tensor exactly once, with the right shape and dtype, without NaN or Inf.

    Raises `UserError` for the first tensor that fails.
    """
    targets = {name: tensor for group in groups for name, tensor in group.targets.items()}
    for file, names in split.filename_to_tensors.items():
        with safe_open(folder / file, framework="pt") as written:
            if set(written.keys()) != set(names):
                raise UserError(f"{file}: lacks tensors that were written to it; check the disk")
            for name in names:
                _verify_tensor(name, written.get_tensor(name), targets[name])
    if split.is_sharded:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        places = {name: file for file, names in split.filename_to_tensors.items() for name in names}
        total = sum(tensor.nbytes for tensor in targets.values())
        if index["weight_map"] != places or set(places) != set(targets) or index["metadata"]["total_size"] != total:
            raise UserError(f"{INDEX}: does not list the tensors that were written; check the disk")


def _verify_tensor(name: str, tensor: torch.Tensor, planned: torch.Tensor) -> None:
    if tensor.shape != planned.shape or tensor.dtype != planned.dtype or not tensor.numel():
        raise UserError(f"{name}: read back as {tuple(tensor.shape)} {tensor.dtype}; check the disk")
    if tensor.is_floating_point():
        low, high = torch.aminmax(tensor)  # both are NaN if one value is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            advice = "its values are too large for float16: use bfloat16" if tensor.dtype == torch.float16 else ""
            raise UserError(f"{name}: has NaN or Inf; {advice or 'training diverged: export an older checkpoint'}")


def _publish(folder: Path, target: Path) -> None:
    """Sync everything to disk, then rename the folder atomically."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
    folder.replace(target)
    sync(target.parent)
