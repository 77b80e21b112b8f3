"""A file of settings: YAML with the names of the flags, flat or nested by group; and its JSON schema for editors.

A value is read by the type of its setting, not by YAML's rules for plain words: `1e-5` is a number, and `no` is false
for a switch but a text for a name.
"""

import os
from dataclasses import MISSING, Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from superoffload import config
from superoffload.errors import UserError, first_line, nearest
from superoffload.setting import AUTO, OR_AUTO, accepts, allowed, from_switch, settings_of, shown, whole_number

if TYPE_CHECKING:
    from yaml import MappingNode, Node

LEFT_OUT = ("local_rank",)  # the launcher sets it, on each rank to another value
NOTHING = ("", "~", "null", "Null", "NULL")
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
YAML_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map",
                                                             "timestamp", "merge", "value"))  # fmt: skip
NAMES: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "one text"}
JSON_TYPES: dict[type, str] = {int: "integer", float: "number", bool: "boolean", str: "string"}


def settings() -> dict[str, tuple[str, Field[Any]]]:
    """Map the name of every setting that a file may hold to its group and its field."""
    return {
        spec.name: (name, spec)
        for name, group in config.GROUPS.items()
        for spec in settings_of(group)
        if spec.name not in LEFT_OUT
    }


def kind(spec: Field[Any]) -> type:
    """Return the type of one value of a setting: int, float, bool or str."""
    found = [part for part in get_args(spec.type) if part in NAMES]
    return found[0] if found else spec.type  # type: ignore[return-value]  # a type, since no string annotations are used


def read(path: str) -> dict[str, Any]:
    """Read a file of settings; return its values by the name of their flag.

    The default of `--deepspeed_config` counts as not given, since it is a file of this program, and not one of the
    working directory. Raises `UserError` for a file that cannot be read, for unknown and repeated keys, and for values
    of another type or outside their limits.
    """
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: is not UTF-8 text ({error.reason})") from error
    except RecursionError as error:
        raise UserError(f"--config {path}: is nested too deeply; it holds groups of settings, no more") from error
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}" if mark else ""
        advice = "; indent with spaces" if "\\t" in str(problem) else ""
        advice = "; use single quotes" if "escape character" in str(problem) else advice
        raise UserError(f"--config {path}{where}: is not YAML: {problem or first_line(error)}{advice}") from error
    values = {} if root is None or _is_nothing(root) else _Reader(path).read(root)
    if values.get("deepspeed_config") == settings()["deepspeed_config"][1].default:
        del values["deepspeed_config"]
    return values


class _Reader:
    """Reads the nodes of one file into values by name."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._settings = settings()
        self._lines: dict[str, int] = {}  # of each key that was read
        self._values: dict[str, Any] = {}

    def read(self, root: "Node") -> dict[str, Any]:
        """Return the values of the whole file."""
        import yaml

        if not isinstance(root, yaml.MappingNode):
            raise self._error(root, "holds no settings; write one per line, as in lr: 2e-5")
        for key, node in self._pairs(root):
            if key in config.GROUPS and isinstance(node, yaml.MappingNode):
                self._once(key, node)
                for name, inner in self._pairs(node):
                    self._setting(name, inner, key)
            elif key in config.GROUPS and not _is_nothing(node):
                raise self._error(node, f"{key}: is a group of settings; write them under it, indented")
            elif key not in config.GROUPS:
                self._setting(key, node)
        return self._values

    def _error(self, node: "Node", problem: str) -> UserError:
        return UserError(f"--config {self._path}, line {node.start_mark.line + 1}: {problem}")

    def _pairs(self, mapping: "MappingNode") -> list[tuple[str, "Node"]]:
        import yaml

        for key, _ in mapping.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self._error(key, "a key must be the name of a setting")
        return [(key.value, node) for key, node in mapping.value]

    def _once(self, key: str, node: "Node") -> None:
        if key in self._lines:
            raise self._error(node, f"{key}: is given twice, first in line {self._lines[key]}; remove one")
        self._lines[key] = node.start_mark.line + 1

    def _setting(self, name: str, node: "Node", group: str | None = None) -> None:
        own, spec = self._settings.get(name, (None, None))
        if spec is None:
            raise self._error(node, self._unknown(name, group))
        if group not in (None, own):
            raise self._error(node, f"{group}.{name}: belongs to the group {own}; move it there")
        self._once(name, node)
        value = self._value(spec, node)
        if not accepts(spec, value):
            problem = f"{name} {shown(value)}: must be {allowed(spec)}"
            raise self._error(node, problem + nearest(value, spec.metadata.get("choices", ())))
        if value is not None:
            self._values[name] = value

    def _unknown(self, name: str, group: str | None) -> str:
        if name in LEFT_OUT:
            return f"{name}: the launcher sets it; remove it"
        known = [*self._settings, *(config.GROUPS if group is None else ())]
        return f"{name}: there is no such setting{nearest(name.strip('-').replace('-', '_'), known)}"

    def _value(self, spec: Field[Any], node: "Node") -> Any:
        import yaml

        if "several" not in spec.metadata:
            return self._scalar(spec, node)
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [] if _is_nothing(node) else [node]
        if not nodes and spec.default != ():
            raise self._error(node, f"{spec.name}: no value is given; give one, or remove the line")
        return tuple(self._scalar(spec, item) for item in nodes)

    def _scalar(self, spec: Field[Any], node: "Node") -> Any:
        import yaml

        if node.tag not in YAML_TAGS:
            raise self._error(node, f"{spec.name}: the tag {node.tag} has no meaning here; remove it")
        wanted = kind(spec)
        if _is_nothing(node):
            if spec.default is None:
                return None
            raise self._error(node, f"{spec.name}: no value is given; give one, or remove the line")
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, f"{spec.name}: must be {NAMES[wanted]}")
        try:
            return _convert(spec, wanted, node.value)
        except (KeyError, ValueError) as error:
            or_auto = f" or {AUTO}" if spec.type in OR_AUTO else ""
            raise self._error(node, f"{spec.name} {node.value}: must be {NAMES[wanted]}{or_auto}") from error


def _is_nothing(node: "Node") -> bool:
    return getattr(node, "style", "") is None and node.value in NOTHING


def _convert(spec: Field[Any], wanted: type, text: str) -> Any:
    if spec.type in OR_AUTO and text == AUTO:
        return text
    if "alone" in spec.metadata:
        return from_switch(spec, SWITCH.get(text.lower(), text))
    if wanted is bool:
        return SWITCH[text.lower()]
    if wanted is str:
        return os.path.expanduser(text) if text.startswith("~/") else text  # as the shell does with a flag
    return whole_number(text) if wanted is int else wanted(text)


def write(settings_of_run: config.Config) -> str:
    """Return the text of a file with every setting of a run, nested by group; `read` returns the same values.

    Takes the settings after `ds_config.merge_flags`: given as flags, none contradicts the DeepSpeed JSON that they were
    merged with. A path to that JSON from the command line becomes absolute, to tell it from the default.
    """
    import yaml

    values = config.flat(settings_of_run)
    if "deepspeed_config" in settings_of_run.explicit:
        values["deepspeed_config"] = str(Path(values["deepspeed_config"]).resolve())
    nested: dict[str, dict[str, Any]] = {}
    for name, (group, _) in settings().items():
        value = values[name]
        nested.setdefault(group, {})[name] = list(value) if isinstance(value, tuple) else value
    head = "# Every setting of this run. --config with this file repeats it; flags beside it win.\n"
    return head + str(yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=1000))


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a file of settings, for editors."""
    known = settings()
    groups: dict[str, Any] = {}
    for name, (group, _) in known.items():
        title = (config.GROUPS[group].__doc__ or "").rstrip(".")
        found = groups.setdefault(group, {"title": title, "type": ["object", "null"], "properties": {},
                                          "additionalProperties": False})  # fmt: skip
        found["properties"][name] = {"$ref": f"#/$defs/{name}"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Settings of finetune_zero3.py",
        "type": "object",
        "properties": {**groups, **{name: {"$ref": f"#/$defs/{name}"} for name in known}},
        "additionalProperties": False,
        "$defs": {name: _described(spec) for name, (_, spec) in known.items()},
    }


def _described(spec: Field[Any]) -> dict[str, Any]:
    """Return the schema of one setting."""
    limits = spec.metadata
    keys = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}
    one: dict[str, Any] = {"type": JSON_TYPES[kind(spec)]}
    one |= {keys[name]: limit for name, limit in limits.items() if name in keys}
    one |= {"enum": list(limits["choices"])} if "choices" in limits else {}
    forms = [one]
    if "alone" in limits:
        forms.append({"type": "boolean"})
    if spec.type in OR_AUTO:
        forms.append({"const": AUTO})
    if "several" in limits:
        forms.append({"type": "array", "items": one, "minItems": 0 if spec.default == () else 1})
    if spec.default is None or spec.default == ():
        forms.append({"type": "null"})
    default = {} if spec.default is MISSING else {"default": spec.default}
    shape = one if len(forms) == 1 else {"anyOf": forms}
    return {"description": limits["help"], **shape, **default}
