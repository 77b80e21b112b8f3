"""The files of a model's weights: found, described, and compared with the architecture before they are loaded."""

import pickle
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from superoffload.errors import UserError, first_line
from superoffload.log import hide_bars_of_transformers, logger
from superoffload.model.tokenizer import check_not_a_pointer
from superoffload.protocols import Model

# In the order in which transformers looks for them.
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
NAMED = 5  # tensors that a message names


def find(name: str, revision: str | None = None) -> list[Path]:
    """Return the files that hold a model's weights, downloaded if need be. Raises `UserError` if there are none."""
    options: dict[str, Any] = {"revision": revision} if revision else {}
    folder = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        for file in FILES:
            found = cached_file(folder, file, _raise_exceptions_for_missing_entries=False, **options)
            if found is None:
                continue
            if file.endswith(".json"):
                return [Path(path) for path in get_checkpoint_shard_files(folder, found, **options)[0]]
            return [Path(found)]
    except (OSError, ValueError) as error:
        raise UserError(f"--model_name {name}: {first_line(error)}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--model_name {name}: {file} lists no files of weights; download it again") from error
    raise UserError(f"--model_name {name}: has no weights (none of {', '.join(FILES)})")


def commit_of(files: list[Path]) -> str:
    """Return the commit that files in the hub's cache belong to, as ` at commit ...`; empty for other files."""
    found = re.search(r"/snapshots/([0-9a-f]{40})/", str(files[0]))
    return f" at commit {found[1]}" if found else ""


def describe(name: str, files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Read what the files say about their tensors; return these on the meta device.

    Raises `UserError` that names the first file that is missing, truncated, damaged, or only a pointer to the weights.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"--model_name {name}: {path.name} is missing; download the model again")
        check_not_a_pointer(name, path)
        try:
            tensors |= _in_safetensors(path) if path.suffix == ".safetensors" else _in_pickle(path)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"--model_name {name}: {path.name} is damaged, or holds more than tensors, which could run code; use "
                "weights in files *.safetensors"
            ) from error
        except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, TypeError) as error:
            raise UserError(
                f"--model_name {name}: {path.name} is damaged or truncated ({first_line(error)}); download it again"
            ) from error
    return tensors


def _in_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}


def _in_pickle(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, map_location="meta", weights_only=True))


def check(name: str, skeleton: Model, tensors: dict[str, torch.Tensor], init_missing: bool) -> None:
    """Compare a checkpoint's tensors with a model on the meta device, which is of no further use. Raises `UserError`.

    Tensors are renamed and converted as when they are loaded.
    """
    hide_bars_of_transformers()
    mapping = get_model_conversion_mapping(skeleton)
    settings = LoadStateDictConfig(weight_mapping=mapping, device_map={"": "meta"}, dtype=torch.bfloat16)
    found, _ = convert_and_load_state_dict_in_model(skeleton, tensors, settings)
    model: Any = skeleton
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(found)
    for tensor, reason in found.conversion_errors.items():
        raise UserError(f"--model_name {name}: {tensor} cannot be converted ({first_line(ValueError(reason))})")
    report(name, found.missing_keys, found.unexpected_keys, found.mismatched_keys, init_missing)


def report(
    name: str,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Collection[tuple[str, Any, Any]],
    init_missing: bool,
) -> None:
    """Raise `UserError` for tensors of another shape, and for missing ones unless `init_missing`; warn of others."""
    for tensor, in_file, in_model in sorted(mismatched):
        raise UserError(
            f"--model_name {name}: {tensor} has the shape {tuple(in_file)}, the configuration asks for "
            f"{tuple(in_model)}; use the config.json that belongs to these weights"
        )
    if missing and not init_missing:
        raise UserError(
            f"--model_name {name}: its weights lack {_some(missing)}; use a complete checkpoint, or --init_missing to "
            "train these from random values"
        )
    if missing:
        logger.warning("--init_missing: random values for %s", _some(missing))
    if unexpected:
        logger.warning("%s: its files hold tensors that this model does not have: %s", name, _some(unexpected))


def _some(names: Collection[str]) -> str:
    """Name up to `NAMED` tensors, and the number of the others."""
    shown = ", ".join(sorted(names)[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def check_finite(name: str, model: Model) -> None:
    """Raise `UserError` that names weights with an infinite value or NaN (collective); every rank looks at its part."""
    from superoffload import distributed  # only here: an export loads no DeepSpeed

    own = [
        key for key, parameter in model.named_parameters() if not _finite(getattr(parameter, "ds_tensor", parameter))
    ]
    bad = {key for found in distributed.all_gather_objects(own) for key in found}
    if bad:
        raise UserError(f"--model_name {name}: NaN or infinite values in {_some(bad)}; use intact weights")


def _finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    low, high = torch.aminmax(tensor.detach())  # both are NaN if one value is
    return bool(torch.isfinite(low) & torch.isfinite(high))
