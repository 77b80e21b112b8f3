"""What a benchmark measures: a model, or a shape with random weights; data, or documents of random tokens. Pure."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from superoffload import config
from superoffload.bench import documents
from superoffload.bench.grid import HAND, SHARED, Case, Order
from superoffload.ds_config import REPOSITORY
from superoffload.errors import UserError
from superoffload.planning.budget import shape
from superoffload.setting import shown

POSITIONS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model of a benchmark: its name, and its configuration if its weights are random, None if they are read."""

    name: str
    config: dict[str, Any] | None

    def write(self, folder: Path, longest: int) -> str:
        """Write the configuration, for rows of up to `longest` tokens; return what to load the model from."""
        if self.config is None:
            return self.name
        text = json.dumps({"max_position_embeddings": max(POSITIONS, longest), **self.config})
        folder.mkdir()
        (folder / "config.json").write_text(text, encoding="utf-8")
        return str(folder)

    def shape(self, model: str, values: Mapping[str, Any]) -> shape.Shape:
        """Return the shape; that of a model which is not well known is read from what `write` returned."""
        if self.config is not None and self.name in shape.built_in_names():
            return shape.built_in(self.name)
        return shape.load(model, values["revision"], values["trust_remote_code"])


def choose(values: Mapping[str, Any]) -> Subject:
    """Return the model that the flags name.

    Raises `UserError` if they name none or several, or data that there is no tokenizer for.
    """
    by_hand = {key: values[key] for key in HAND if values[key] is not None}
    given = [flag for flag in ("model_name", "shape") if values[flag]] + [f"{key}" for key in list(by_hand)[:1]]
    if len(given) != 1:
        both = " and ".join(f"--{flag}" for flag in given) or "--model_name"
        problem = "give only one model" if given else "no model is given"
        raise UserError(f"{both}: {problem}; use --model_name, --shape NAME, or --layers and --hidden")
    if not values["model_name"] and values["dataset_name"]:
        raise UserError(
            f"--dataset_name {shown(values['dataset_name'])}: its rows need a tokenizer, and --{given[0]} has "
            "none; use --model_name, or omit --dataset_name for rows of random tokens"
        )
    if values["model_name"]:
        return Subject(name=values["model_name"], config=None)
    if by_hand:
        return _by_hand(by_hand)
    if values["shape"] not in shape.built_in_names():
        known = ", ".join(found for found in shape.built_in_names() if "/" not in found)
        raise UserError(f"--shape {values['shape']}: not a known shape; use --layers and --hidden, or one of: {known}")
    return Subject(name=values["shape"], config=shape.config_of(values["shape"]))


def _by_hand(given: Mapping[str, int]) -> Subject:
    """Describe a Llama; what is not given is as usual for its width."""
    if "layers" not in given or "hidden" not in given:
        raise UserError(f"--{next(iter(given))}: a shape by hand needs at least --layers and --hidden")
    hidden = given["hidden"]
    heads = given.get("heads", max(1, hidden // 64))
    kv_heads = given.get("kv_heads", heads)
    if hidden % heads or heads % kv_heads:
        raise UserError(f"--heads {heads}: must divide --hidden {hidden}, and --kv_heads {kv_heads} must divide it")
    made = {
        "model_type": "llama",
        "num_hidden_layers": given["layers"],
        "hidden_size": hidden,
        "intermediate_size": given.get("intermediate", -(-8 * hidden // 3 // 128) * 128),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": given.get("vocabulary", 32000),
    }
    name = f"Llama of {given['layers']} layers, hidden {hidden}, vocabulary {made['vocab_size']}"
    return Subject(name=name, config=made)


def orders(cases: Sequence[Case], values: Mapping[str, Any], model: str, folder: Path) -> list[Order]:
    """Return what each worker sets up. `model` is where it is loaded from. Raises `UserError` for a value of a flag."""
    shared = {spec: values[spec] for names in SHARED.values() for spec in names if values[spec] not in (None, ())}
    steps = values["warmup_steps"] + values["rounds"] * (values["steps"] + 1)
    made = 0
    if not values["dataset_name"]:
        made = max(
            documents.enough(
                case.values["batch_size"] * case.values["gradient_accumulation_steps"] * values["gpus"],
                case.values["max_length"], steps, packed=case.values["layout"] == "packed",
            )
            for case in cases
        )  # fmt: skip
    found = []
    for case in cases:
        flags = {
            **shared,
            "model_name": model,
            **case.flags,
            "deepspeed_config": str(REPOSITORY / "configs" / case.ds_config),
            "output_dir": str(folder),
            "lr_scheduler": "constant",
            "log_level": "WARNING",
        }
        if case.values["mode"] == "zerooffload":  # keeps the whole optimizer on the host
            flags.pop("offload_ratio", None)
        config.build(flags)
        found.append(
            Order(flags=flags, mode=case.values["mode"], random_weights=model != values["model_name"], documents=made)
        )  # fmt: skip
    return found
