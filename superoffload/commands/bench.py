"""`superoffload bench`: what this machine reaches, and where the time of a step goes."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import click

from superoffload import cli, config
from superoffload.bench import grid
from superoffload.ds_config import REPOSITORY
from superoffload.errors import UserError
from superoffload.setting import settings_of

INTERRUPTED = 130


def _bench(**values: Any) -> int:
    """Measure configurations of a run side by side.

    Flags that take several values make a grid. Each configuration runs in a process of its own, through the same code
    as a run; they take turns of a few steps, so that a change in the machine's load affects all of them. Without
    --dataset_name, rows are random tokens as long as those of Alpaca; with --shape, or --layers and --hidden, weights
    are random too, and nothing is downloaded. Exit status 0: all were measured, 1: one failed.

    superoffload bench --shape llama-1b --mode superoffload zerooffload --layout packed padded --batch_size 1 4
    """
    from superoffload.bench import picture, subject

    if not (REPOSITORY / "finetune_zero3.py").is_file():
        raise UserError("superoffload bench: takes the steps of finetune_zero3.py, which is not installed; "
                        "run `pip install -e .` in a clone of the repository")  # fmt: skip
    chosen = subject.choose(values)
    cases = grid.cases({axis: values[axis] for axis in grid.AXES}, values["against"])
    before = _read(values["compare"]) if values["compare"] else None
    if values["out"] is not None:
        if values["picture"]:
            picture.check()
        _make_folder(values["out"])
    with TemporaryDirectory(prefix="superoffload_bench_") as folder:
        report = _measure(cases, chosen, values, Path(folder))
    return _show(report, before, values)


def _measure(cases: list[grid.Case], chosen: Any, values: dict[str, Any], folder: Path) -> dict[str, Any]:
    from superoffload.bench import fit, report, rounds, subject
    from superoffload.planning import machine

    here = machine.look()
    ranks = values["gpus"]
    if here.devices and ranks > len(here.devices):
        raise UserError(f"--gpus {ranks}: this machine has {len(here.devices)}")
    model = chosen.write(folder / "model", max(values["max_length"]))
    orders = subject.orders(cases, values, model, folder)
    plan = rounds.Plan(
        rounds=values["rounds"],
        steps=values["steps"],
        warmup_steps=values["warmup_steps"],
        ranks=ranks,
        alone="--alone"
        if values["alone"]
        else fit.reason_to_be_alone(orders, chosen.shape(model, values), ranks, here),
        folder=folder,
    )
    found = rounds.play(cases, orders, plan, lambda line: click.echo(line, err=True))
    for number, outcome in enumerate(found.outcomes.values(), start=1):
        log = folder / f"configuration_{number}.log"
        if values["out"] is not None and outcome.failure and log.exists():
            shutil.copy(log, values["out"])
    return report.make(cases, found, plan, chosen, values)


def _show(report: dict[str, Any], before: dict[str, Any] | None, values: dict[str, Any]) -> int:
    """Print the report and write it to --out; return the exit status."""
    from superoffload.bench import compare, picture, tables

    text = tables.markdown(report)
    if before is not None:
        lines = [f"* {line}" for line in compare.lines(before, report)]
        text += "\n".join(["", f"## Since {values['compare']}", "", *lines]) + "\n"
    click.echo(text, nl=False)
    out = values["out"]
    if out is not None:
        try:
            (out / "bench.md").write_text(text, encoding="utf-8")
            (out / "bench.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            if values["picture"]:
                picture.draw(report, out / "bench.png")
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror}); the report is above") from error
    if report["interrupted"]:
        return INTERRUPTED
    return 1 if any(one["failure"] for one in report["configurations"]) else 0


def _read(path: Path) -> dict[str, Any]:
    """Read the report of a benchmark before."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--compare {path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"--compare {path}: not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != 1:
        raise UserError(f"--compare {path}: not the bench.json of a benchmark")
    return found


def _make_folder(path: Path) -> None:
    """Make the folder of the report, and try a file in it: a benchmark takes minutes."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error


def _shared() -> list[click.Parameter]:
    """Derive the flags that all configurations share from the settings."""
    specs = [spec for group, names in grid.SHARED.items() for spec in settings_of(group) if spec.name in names]
    options = [cli.option(spec) for spec in specs]
    for option in options:
        option.required = False
        if option.name == "dataset_name":
            option.default, option.show_default = (), False
    return list(options)


def _axes() -> list[click.Parameter]:
    """Derive the flags of the grid, which take several values."""
    layouts = "Rows in packs, padded to the longest of a batch, or padded to --max_length."
    axes = [
        click.Option(["--mode"], type=click.Choice(grid.MODES), default=grid.MODES[:1], help="Mode."),
        click.Option(["--layout"], type=click.Choice(list(grid.LAYOUTS)), default="packed", help=layouts),
    ]
    specs = config.SPECS
    axes += [cli.option(specs[name]) for name in grid.SETTINGS]
    return [
        click.Option(
            option.opts,
            type=option.type,
            multiple=True,
            default=option.default if isinstance(option.default, tuple) else (option.default,),
            show_default=True,
            help=option.help,
        )
        for option in axes
    ]


def _options() -> list[click.Parameter]:
    """List all flags: what is measured, the grid, how it is measured, and what all configurations share."""
    number, folder = click.IntRange(min=1), cli.UserPath(path_type=Path, file_okay=False)
    by_hand = "Random weights in the shape of a Llama: --layers and --hidden, and what differs from the usual."
    against = "Alternatives to the first configuration: DeepSpeed's own SuperOffload, or padding to --max_length."
    return [
        click.Option(["--shape"], help="Random weights in the shape of a well-known model, e.g. llama-8b."),
        *(click.Option([f"--{name}"], type=number, help=by_hand) for name in grid.HAND),
        *_axes(),
        click.Option(["--gpus"], type=number, default=1, show_default=True, help="Ranks of each configuration."),
        click.Option(["--rounds"], type=number, default=5, show_default=True, help="Turns of each configuration."),
        click.Option(["--steps"], type=number, default=3, show_default=True, help="Measured steps of a turn."),
        click.Option(["--warmup_steps"], type=number, default=5, show_default=True, help="Steps before round 1."),
        click.Option(["--against"], type=click.Choice(list(grid.AGAINST)), multiple=True, help=against),
        click.Option(["--alone"], is_flag=True, help="Keep only one configuration in memory at a time."),
        click.Option(["--out"], type=folder, help="Write bench.md, bench.json and bench.png to this folder."),
        click.Option(["--picture/--no_picture"], default=True, help="With --out: draw bench.png; needs matplotlib."),
        click.Option(["--compare"], type=cli.UserPath(path_type=Path), help="A bench.json: say what changed since."),
        *_shared(),
    ]


command = cli.Command("bench", params=_options(), callback=_bench, help=_bench.__doc__)
