"""Dependencies flow one way: which module may import which, and where heavy libraries may be imported.

Imports in functions and for type checking count too. A module is named by its path in the package, e.g. `data.loader`
or `data.__init__`.
"""

import ast
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

pytestmark = pytest.mark.unit

PACKAGE = REPOSITORY / "superoffload"
Row = Sequence[set[str]]
"""A row lists rooms, sets of modules and folders, none of which imports another."""

# From bottom to top: a module may import its own room and the rows listed before it.
ROWS: list[Row] = [
    [{"offload"}],
    [
        {
            "__init__",
            "api",
            "errors",
            "protocols",
            "setting",
            "config",
            "config_file",
            "cli",
            "ds_config",
            "ds_schema",
            "log",
            "run_log",
            "hub",
            "launcher",
            "paths",
            "distributed",
        }
    ],
    [{"data"}],
    [{"model"}, {"checkpoint"}],
    [{"export"}],
    [{"training"}, {"tiny"}],
    [{"planning"}, {"reporting"}],
    [{"use"}],
    [{"finetune_zero3"}],
    [{"bench"}],
    [{"commands"}],
]
# SuperOffload is a package of its own: it imports nothing from its parent, and has an order of its own.
OFFLOAD_ROWS: list[Row] = [
    [{"__init__"}, {"shared"}, {"settings"}, {"operators"}],
    [{"worker"}, {"trainer"}],
    [{"zero3"}],
    [{"install"}],
]
# The modules and folders that import a library; no others may.
LIBRARIES: dict[str, set[str]] = {
    "datasets": {"data.cache", "data.folders", "data.sources"},
    "deepspeed": {
        "distributed",
        "model.attention", "model.kernels", "model.leaf_modules", "model.recomputation", "model.tiled_mlp",
        "model.vocabulary",
        "checkpoint.convert", "checkpoint.rank_files", "checkpoint.save", "checkpoint.trust",
        "training.engine",
        "bench.alternatives",
        "planning.checks.measure",
        "offload.install", "offload.zero3",
    },
    "huggingface_hub": {"hub", "model.architecture", "model.tokenizer", "export.push", "export.weights"},
    "liger_kernel": {"model.kernels"},
    "matplotlib": {"export.picture", "planning.picture", "bench.picture", "reporting.comparison"},
    "mlflow": {"training.trackers.mlflow"},
    "pyarrow": {"data.files", "data.sources"},
    "rich": {"reporting.live", "reporting.panel", "reporting.picture", "reporting.runs_table"},
    "safetensors": {"model.weights", "export.push", "export.weights"},
    "tokenizers": {"tiny"},
    "torch": {
        "distributed", "protocols",
        "data.collate",
        "model.architecture", "model.attention", "model.buffers", "model.flash_cpu", "model.head", "model.isolation",
        "model.kernels", "model.leaf_modules", "model.load", "model.loss_kernel", "model.neftune",
        "model.recomputation", "model.sequence_parallel", "model.tiled_mlp", "model.vocabulary", "model.weights",
        "checkpoint.rank_files", "checkpoint.resume", "checkpoint.trust",
        "export.weights",
        "training.engine", "training.evaluation", "training.metrics", "training.source_losses", "training.step",
        "training.trackers.tensorboard",
        "tiny",
        "bench.ruler",
        "planning.checks.link", "planning.checks.measure", "planning.checks.software",
        "planning.environment", "planning.exhaustion", "planning.machine",
        "use.device", "use.finished", "use.held_out", "use.speaker",
        "offload.install", "offload.operators", "offload.shared.state", "offload.trainer.binding",
        "offload.trainer.first_touch", "offload.trainer.pinning", "offload.worker", "offload.zero3",
    },
    "trackio": {"training.trackers.trackio"},
    "transformers": {
        "distributed",  # enable_full_determinism
        "log",  # its progress bars
        "data.template",  # what renders chat templates
        "model.architecture", "model.attention", "model.load", "model.quantization", "model.tokenizer", "model.weights",
        "checkpoint.save",
        "export.files", "export.weights",
        "use.finished", "use.speaker",
        "tiny",
    },
    "wandb": {"training.trackers.wandb"},
    "yaml": {"config_file", "hub"},
}  # fmt: skip


FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES["finetune_zero3"] = REPOSITORY / "finetune_zero3.py"


def imports_of(path: Path) -> tuple[set[str], set[str]]:
    """Return the dotted names of a file's absolute imports and of its relative ones, the latter in full as well."""
    absolute: set[str] = set()
    relative: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            absolute |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = path.parents[node.level - 1].relative_to(REPOSITORY).parts if node.level else ()
            module = ".".join(filter(None, [*folder, node.module]))
            (relative if node.level else absolute).update(f"{module}.{alias.name}" for alias in node.names)
    return absolute, relative


ABSOLUTE = {name: imports_of(path)[0] for name, path in FILES.items()}
RELATIVE = {name: imports_of(path)[1] for name, path in FILES.items()}


def found_in(imported: str) -> str | None:
    """Return the module of the project that an imported name is found in, None if it belongs to a library."""
    root, _, name = imported.partition(".")
    if root != "superoffload":
        return root if root in FILES else None
    while name and name not in FILES and f"{name}.__init__" not in FILES:
        name = name.rpartition(".")[0]
    return name if name in FILES else f"{name}.__init__".lstrip(".")


GRAPH = {name: set(filter(None, map(found_in, ABSOLUTE[name] | RELATIVE[name]))) for name in FILES}


def holds(entry: str, name: str) -> bool:
    """Return whether a module is an entry of a table or lies in that folder."""
    return name == entry or name.startswith(f"{entry}.")


def complaints(modules: Mapping[str, set[str]], rows: Sequence[Row]) -> list[str]:
    """List what is wrong with the imports between modules and with the table; `modules` maps each to its imports."""
    entries = [(height, room, entry) for height, row in enumerate(rows) for room in row for entry in sorted(room)]
    place = {name: (height, room) for height, room, entry in entries for name in modules if holds(entry, name)}
    result = [f"{entry} names nothing" for *_, entry in entries if not any(holds(entry, name) for name in modules)]
    result += [f"{name} is in no row" for name in modules if name not in place]
    for name in modules.keys() & place.keys():
        height, room = place[name]
        for other in modules[name] & place.keys():
            other_height, other_room = place[other]
            if other_room is not room and other_height >= height:
                result.append(f"{name} imports {other}")
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        result.append("cycle of " + ", ".join(sorted(set(error.args[1]))))
    return result


def test_a_module_imports_from_its_room_and_lower_rows_only() -> None:
    assert complaints(GRAPH, ROWS) == []


def test_the_offload_package_has_an_order_of_its_own() -> None:
    own = {name: imported for name, imported in GRAPH.items() if holds("offload", name)}
    rows = [[{f"offload.{entry}" for entry in room} for room in row] for row in OFFLOAD_ROWS]
    assert complaints(own, rows) == []


def test_the_offload_package_imports_itself_by_relative_imports_and_nothing_else_does() -> None:
    assert {name.split(".")[0] for name in FILES if RELATIVE[name]} == {"offload"}
    assert [name for name in FILES if holds("offload", name) and any(map(found_in, ABSOLUTE[name]))] == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_where_the_table_says(library: str) -> None:
    importers = {name for name in FILES if any(holds(library, full) for full in ABSOLUTE[name])}
    entries = LIBRARIES[library]
    assert [name for name in importers if not any(holds(entry, name) for entry in entries)] == [], "not in the table"
    assert [entry for entry in entries if not any(holds(entry, name) for name in importers)] == [], "no such import"


GOOD: dict[str, set[str]] = {"a": set(), "b.x": {"a"}, "b.y": {"b.x"}, "c": {"a"}, "d": {"b.y", "c"}}
GOOD_ROWS: list[Row] = [[{"a"}], [{"b"}, {"c"}], [{"d"}]]


@pytest.mark.parametrize(
    ("changes", "more_rows", "expected"),
    [
        ({}, [], []),
        ({"e": set()}, [], ["e is in no row"]),
        ({}, [[{"e"}]], ["e names nothing"]),
        ({"a": {"d"}, "d": set()}, [], ["a imports d"]),
        ({"c": {"b.x"}}, [], ["c imports b.x"]),
        ({"b.x": {"b.y"}}, [], ["cycle of b.x, b.y"]),
    ],
    ids=["good", "no row", "names nothing", "upward", "sideways", "cycle"],
)
def test_each_kind_of_mistake_is_found(changes: dict[str, set[str]], more_rows: list[Row], expected: list[str]) -> None:
    assert complaints({**GOOD, **changes}, [*GOOD_ROWS, *more_rows]) == expected
