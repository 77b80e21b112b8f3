"""The command line: click options derived from `config.py`, and argv -> Config.

Imports neither torch nor DeepSpeed, so that `--help` and usage errors return immediately.
"""

import atexit
import os
import re
import signal
import string
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field
from typing import Any, NoReturn

import click

from superoffload import config, config_file, launcher
from superoffload.errors import Interrupted, UserError, nearest
from superoffload.paths import path_of
from superoffload.run_log import run_log
from superoffload.setting import AUTO, CountOrAuto, NumberOrAuto, allowed, settings_of, whole_number

SILENT_RANK_PATIENCE_S = 5.0


class WholeNumber(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.4
    """An integer; scientific notation such as `4e8`, as in DeepSpeed's files, is accepted."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the value as an int; fail if it is not a whole number."""
        try:
            return whole_number(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a whole number.", param, ctx)


class OrAuto(click.ParamType):  # type: ignore[type-arg]
    """A number that `read` reads from a text, or `auto`."""

    def __init__(self, kind: str, noun: str, read: Callable[[str], float]) -> None:
        self.name = f"{kind}|{AUTO}"
        self._noun, self._read = noun, read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """Return the value as a number unless it is `auto`; fail if it is neither."""
        try:
            return AUTO if value == AUTO else self._read(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither {self._noun} nor {AUTO}.", param, ctx)


class Choice(click.Choice):  # type: ignore[type-arg]
    """One of some words; an error names the nearest. `alone`: true and false stand for it and for the first."""

    def __init__(self, words: Sequence[str], alone: str | None = None) -> None:
        super().__init__(words)
        self.alone = alone

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the word; fail for any other."""
        switched = config_file.SWITCH.get(str(value).lower()) if self.alone else None
        if switched is not None:
            value = self.alone if switched else next(iter(self.choices))
        return super().convert(value, param, ctx)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Return what is wrong with a word that is none of them."""
        message = super().get_invalid_choice_message(value, ctx).rstrip(".")
        return message + (nearest(value, self.choices) or ".")


class Switch(click.Option):
    """A switch that is off by default; `--no_NAME`, which undoes the value of a file, is left out of the help."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the entry of the help."""
        secondary, self.secondary_opts = self.secondary_opts, []
        record = super().get_help_record(ctx)
        self.secondary_opts = secondary
        return record


class FormerSwitch(Switch):
    """A choice that was a switch once: the flag alone means one of its values, and `--no_NAME` the first."""

    def __init__(self, *declarations: Any, **options: Any) -> None:
        super().__init__(*declarations, **options)
        self.secondary_opts = [f"--no_{self.name}"]

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Add both forms."""
        super().add_to_parser(parser, ctx)
        first = next(iter(self.type.choices))  # type: ignore[attr-defined]  # of a Choice
        parser.add_option(self, self.secondary_opts, self.name, action="store_const", const=first)


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size in bytes with its unit: 80GiB, 80GB, or 80g, which means GiB as in other programs."""

    name = "size"
    pattern = re.compile(r"([0-9]+\.?[0-9]*) ?([kmgt])(i?b)?", re.IGNORECASE)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes; fail without a unit."""
        found = self.pattern.fullmatch(str(value).strip())
        if not found or not float(found[1]):
            self.fail(f"{value!r} is not a size; write it with its unit, e.g. 80GiB or 80GB.", param, ctx)
        number, unit, suffix = found.groups()
        base = 1000 if (suffix or "").lower() == "b" else 1024
        return int(float(number) * base ** ("kmgt".index(unit.lower()) + 1))


class PathText(click.ParamType):  # type: ignore[type-arg]
    """A path, or what may be one, such as a hub id: a text, which `path_of` has looked at.

    `expand` is whether `~` is replaced; not in what a checkpoint is compared with.
    """

    name = "text"

    def __init__(self, expand: bool = True) -> None:
        self._expand = expand

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the text. Raises `UserError` as `path_of` does."""
        path = path_of(value, param.opts[0] if isinstance(param, click.Option) else "")
        return str(path) if self._expand and value.startswith("~") else str(value)


class UserPath(click.Path):
    """A path, which `path_of` has looked at."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path. Raises `UserError` as `path_of` does."""
        path = path_of(str(value), param.opts[0] if isinstance(param, click.Option) else "")
        return super().convert(path, param, ctx)


class Command(click.Command):
    """A command of which some flags take several values: `--wandb_tags a b`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat such a flag before each of its values, which is the form that click knows."""
        several = {
            flag
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for flag in option.opts
        }
        return super().parse_args(ctx, args if ctx.resilient_parsing else _spread(args, several))


class GroupedCommand(Command):
    """A command whose help groups the options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group of settings."""
        records = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        for group in config.GROUPS.values():
            rows = [records.pop(spec.name) for spec in settings_of(group)]
            with formatter.section((group.__doc__ or "").rstrip(".")):
                formatter.write_dl([row for row in rows if row])
        with formatter.section("Other"):
            formatter.write_dl([row for row in records.values() if row])


def option(spec: Field[Any]) -> click.Option:
    """Build the click option of a setting."""
    kinds: dict[Any, Any] = {
        int: WholeNumber(), float: float, bool: bool, tuple[float, ...]: float,
        NumberOrAuto: OrAuto("float", "a number", float),
        CountOrAuto: OrAuto("integer", "a whole number", whole_number),
    }  # fmt: skip
    alone = spec.metadata.get("alone")
    text = PathText(expand="shapes_run" not in spec.metadata) if "path" in spec.metadata else str
    kind = Choice(spec.metadata["choices"], alone) if "choices" in spec.metadata else kinds.get(spec.type, text)
    limits = "" if "choices" in spec.metadata else allowed(spec)
    required = spec.default is MISSING
    default: dict[str, Any] = {} if required else {"default": spec.default}  # click counts default=None as a default
    if alone is not None:
        default["flag_value"] = alone
    made = FormerSwitch if alone is not None else Switch if spec.default is False else click.Option
    return made(
        [f"--{spec.name}/--no_{spec.name}" if spec.type is bool else f"--{spec.name}"],
        type=kind,
        is_flag=True if spec.type is bool else None if alone is None else False,  # False: a value may be missing
        multiple="several" in spec.metadata,
        required=required,
        show_default=not (spec.default is None or spec.default is False or spec.default == ()),
        help=spec.metadata["help"] + (f" ({limits})" if limits else ""),
        **default,
    )


def config_option() -> click.Option:
    """Build `--config`: the settings of a file take the place of the defaults, before other flags are read."""

    def read(context: click.Context, _: click.Parameter, path: str | None) -> None:
        if path is not None:
            context.default_map = config_file.read(path)

    return click.Option(
        ["--config"],
        is_eager=True,
        expose_value=False,
        callback=read,
        type=PathText(),
        metavar="FILE",
        help="Read settings from a YAML file, such as the config.yaml of another run; flags win.",
    )


def explicit(values: Iterable[str]) -> frozenset[str]:
    """Return which of the settings were given, as flags or in a file."""
    context = click.get_current_context()
    given = {click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.DEFAULT_MAP}
    return frozenset(name for name in values if context.get_parameter_source(name) in given)


def is_flag(word: str) -> bool:
    """Return whether a word of the command line is a flag, and not a value such as a negative number."""
    return word.startswith("-") and word[1:2] in {"-", *string.ascii_letters}


def _spread(argv: Sequence[str], several: set[str]) -> list[str]:
    """Repeat a flag that takes several values: `--wandb_tags a b` becomes `--wandb_tags a --wandb_tags b`.

    If such a flag is given twice, the values of its last occurrence count, as for every other flag. Raises `UserError`
    if it has no value.
    """
    result: list[str] = []
    given: dict[str, list[str]] = {}
    open_flag = ""
    for word in argv:
        flag, equals, value = word.partition("=")
        if is_flag(word):
            open_flag = flag if flag in several else ""
        if not open_flag:
            result.append(word)
        elif is_flag(word):
            given[open_flag] = [value] if equals else []
        else:
            given[open_flag].append(word)
    for flag, values in given.items():
        if not values:
            raise UserError(f"{flag}: no value is given; give one or more, separated by spaces")
        result += [word for value in values for word in (flag, value)]
    return result


def command(action: Callable[[config.Config], Any]) -> click.Command:
    """Build the click command that parses its arguments into a Config and calls `action` with it."""

    def callback(**values: Any) -> Any:
        return action(config.build(values, explicit(values)))

    options: list[click.Parameter] = [option(spec) for spec in config.SPECS.values()]
    return GroupedCommand(
        "finetune_zero3.py",
        params=[config_option(), *options],
        callback=callback,
        help="Fine-tune a language model with DeepSpeed ZeRO-3 and host offload.",
        context_settings={"max_content_width": 110},
    )


def parse(argv: Sequence[str]) -> config.Config:
    """Turn the arguments after the script's name into a Config.

    Raises `UserError` for unknown or missing flags and for values outside their limits. `--help` prints the help
    and raises `SystemExit(0)`.
    """
    try:
        result = command(lambda parsed: parsed).main(args=list(argv), standalone_mode=False)
    except click.ClickException as error:
        raise UserError(" ".join(error.format_message().split())) from error
    if not isinstance(result, config.Config):
        raise SystemExit(result or 0)
    return result


def run(main: Callable[[config.Config], int]) -> NoReturn:
    """Call `main` with the settings on the command line, and end the process with the status that it returns.

    A `UserError` is one line and its own status, usually 2, any other error a traceback and status 1.
    """
    try:
        launcher.adopt_scheduler()
        status = main(parse(sys.argv[1:]))
    except UserError as error:
        status = report(error)
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001 - as the interpreter does, but see `leave`
        if _is_interrupt(error):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher forwards what the terminal has sent already
            status = report(Interrupted("stopped by Ctrl-C, before the first step or after the last"))
        else:
            traceback.print_exc()
            run_log.add(traceback.format_exc())
            status = 1
    leave(status)


def _is_interrupt(error: BaseException | None) -> bool:
    """Return whether an error is Ctrl-C, or followed from it, as one of a pool that was closing down."""
    return error is not None and (isinstance(error, KeyboardInterrupt) or _is_interrupt(error.__context__))


def report(error: UserError) -> int:
    """Print `Error: ...` on stderr; return the exit status, that of the error.

    Usually every rank raises the same error, and rank 0 reports it for all. The other ranks wait for the launcher to
    terminate them; they report the error themselves only if that does not happen, that is, if rank 0 had no error.
    """
    rank = int(os.environ.get("RANK", "0"))
    prefix = f"[rank {rank}] " if rank else ""
    if rank:
        time.sleep(SILENT_RANK_PATIENCE_S)
    sys.stderr.write(f"{prefix}Error: {error}\n")
    run_log.add(f"Error: {error}")
    return error.status


def leave(status: int) -> NoReturn:
    """Run the exit handlers and end the process, without the interpreter's finalization.

    The threads of torch's gloo backend outlive their process group. If one of them releases a Python object during
    finalization, the process aborts with SIGABRT, occasionally, and also after a successful run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
