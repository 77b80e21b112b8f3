"""Holds the layering: who may import whom."""

import ast
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY

PACKAGE = REPOSITORY / "superoffload"
# Each module may import modules of the rows above its own.
LAYERS = [
    {"errors"},
    {"config", "log", "schedule", "flops"},
    {"cli", "ds_config", "hub", "ops"},
    {"distributed"},
    {"data.formats", "data.packing", "data.rows", "tokenizer"},
    {"data.chat", "data.sources"},
    {"data.encode"},
    {"attention", "data.cache", "data.collate", "loss"},
    {"data.statistics", "data.preview", "isolation"},
    {"data.loader"},
    {"model", "tracking", "metrics", "evaluation"},
    {"engine", "checkpoint", "requests", "rank_files"},
    {"resume", "convert", "export_files"},
    {"export"},
    {"run"},
    {"tiny"},
    {"commands"},
]
HEAVY = {
    "deepspeed": {"attention", "distributed", "model", "engine", "checkpoint", "convert", "rank_files"},
    "transformers": {
        "attention",
        "log",
        "model",
        "tokenizer",
        "tiny",
        "distributed",
        "checkpoint",
        "export",
        "export_files",
    },
    "datasets": {"data.sources", "data.cache"},
    "wandb": {"tracking"},
    "huggingface_hub": {"hub", "model", "tokenizer", "export"},
    "safetensors": {"export"},
    "torch": {
        "attention",
        "ops",
        "distributed",
        "data.collate",
        "isolation",
        "evaluation",
        "loss",
        "model",
        "metrics",
        "engine",
        "tiny",
        "checkpoint",
        "rank_files",
        "export",
        "export_files",
    },
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


PATHS = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
OFFLOAD = [path for path in PATHS if path.parent.name == "offload"]  # a package of its own, which could go upstream
MODULES = {module_name(path): path for path in PATHS if path not in OFFLOAD}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def layer(name: str) -> int:
    return next(place for place, names in enumerate(LAYERS) if name in names)


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) == {name for names in LAYERS for name in names if name in MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_lower_layers_only(name: str) -> None:
    own = {full.removeprefix("superoffload.") for full in imported(MODULES[name]) if full.startswith("superoffload.")}
    for other in own & set(MODULES):
        assert layer(other) < layer(name), f"{name} imports {other}"
    assert not any(full.startswith("finetune_zero3") for full in imported(MODULES[name]))


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_have_their_places(name: str) -> None:
    roots = {full.split(".")[0] for full in imported(MODULES[name])}
    for library, places in HEAVY.items():
        assert library not in roots or name in places, f"{name} imports {library}"


@pytest.mark.parametrize("path", OFFLOAD, ids=lambda path: path.stem)
def test_the_offload_package_imports_nothing_from_its_parent(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            assert not (node.level == 0 and str(node.module).startswith("superoffload"))
            heavy = node.level == 0 and str(node.module).split(".")[0] == "deepspeed"
            assert not heavy or path.stem in {"optimizer", "install", "contract", "partitions", "gradients", "outside"}
