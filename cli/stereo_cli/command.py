"""A command from a function: settings become options, errors become one line and an exit code."""

import errno
import functools
import inspect
import os
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import Field
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from stereo_cli import terminal
from stereo_cli.config_file import read_config
from stereo_cli.terminal import BAD_INPUT, FAILED, FAULT, INCOMPLETE, INTERRUPTED, fail
from stereoclinic.calls.settings import OUTPUT, PANELS, Option, Settings, checked
from stereoclinic.io.text import printable
from stereoclinic.runtime import ranks

__all__ = ["BAD_INPUT", "FAILED", "INCOMPLETE", "Config", "Json", "Run", "Shown", "command"]


class Json(Settings):
    """How a result is printed."""

    as_json: Annotated[
        bool,
        Field(description="Print JSON instead of tables."),
        Option(OUTPUT, flags=("--json",)),
    ] = False


class Shown(Json):
    """What is printed of a result, and of the work before it."""

    quiet: Annotated[
        bool, Field(description="Show no progress."), Option(OUTPUT, advanced=True, flags=("--quiet", "-q"))
    ] = False


class Config(Settings):
    """Options from a file."""

    config: Annotated[
        Path | None,
        Field(description="YAML file of options; flags on the command line win."),
        Option(OUTPUT, advanced=True),
    ] = None


class Run(Shown, Config):
    """What every command has that runs a model."""

    dry_run: Annotated[bool, Field(description="Print what would run, and its cost."), Option(OUTPUT)] = False


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A typer command of a function: every parameter that is a settings class becomes that class's options.

    Other parameters are typer's own. The function gets settings that were checked.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    expanded: dict[str, type[Settings]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if isinstance(kind, type) and issubclass(kind, Settings):
            expanded[name] = kind
            parameters += [_parameter(each, field) for each, field in kind.model_fields.items()]
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    parameters.append(_keyword("help_all", _HELP_ALL, False))
    parameters.sort(key=_panel)

    @functools.wraps(function)
    def run(**given: Any) -> None:
        given.pop("help_all")
        for name, kind in expanded.items():
            taken = {each: given.pop(each) for each in kind.model_fields}
            fields = kind.model_fields
            given[name] = checked(kind, {each: v for each, v in taken.items() if v not in (None, fields[each].default)})
        function(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.advanced = frozenset(_advanced(expanded.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    del run.__wrapped__
    return guarded(run)


def _advanced(kinds: Iterable[type[Settings]]) -> Iterator[str]:
    """Names of the settings that --help leaves to --help-all."""
    for kind in kinds:
        for name, field in kind.model_fields.items():
            if any(isinstance(each, Option) and each.advanced for each in field.metadata):
                yield name


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The parameter that typer reads for a setting."""
    option = next((each for each in field.metadata if isinstance(each, Option)), Option())
    default = field.default
    kind: Any = field.annotation
    if option.texts or typing.get_origin(kind) in (tuple, list):
        inner = str if option.texts else typing.get_args(kind)[0]
        kind, default = list[inner] | None, None  # type: ignore[valid-type]
    unknown = default is None or default is False
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    info = typer.Option(
        *flags,
        help=field.description,
        rich_help_panel=option.panel,
        metavar=_form(kind) if option.metavar is None else option.metavar,
        show_default=option.default or not unknown,
        callback=read_config if name == "config" else None,
        is_eager=name == "config",
    )
    return _keyword(name, Annotated[kind, info], default)


def _panel(parameter: inspect.Parameter) -> int:
    """Panels come in this order; the unnamed one is first."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel in PANELS else -1


def _form(kind: Any) -> str | None:
    """What stands for a value in the help."""
    kinds = (kind, *typing.get_args(kind))
    forms = ((bool, ""), (int, "N"), (float, "X"), (Path, "PATH"), (str, "TEXT"))
    return next((form for of, form in forms if of in kinds), None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def hide_types(parameters: Iterable[Any], ctx: typer.Context) -> None:
    """Print no Python types, such as <bool>, in the help of arguments and of typer's own options."""
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: ""
        elif parameter.metavar is None and "<" in str(parameter.display_type_rich(ctx)):
            parameter.metavar = ""


class Command(TyperCommand):
    """A command whose --help is one list of the common options, and whose --help-all shows all of them in panels."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """What typer calls to print help."""
        hide_types(self.get_params(ctx), ctx)
        everything = bool(ctx.meta.get("help_all"))
        advanced: frozenset[str] = getattr(self.callback, "advanced", frozenset())
        for parameter in self.params:
            if not everything:
                parameter.hidden = parameter.name in advanced  # type: ignore[attr-defined]
                if parameter.param_type_name == "option":
                    parameter.rich_help_panel = None  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def _show_all(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta["help_all"] = True
        ctx.get_help()
        raise typer.Exit


_HELP_ALL = Annotated[
    bool,
    typer.Option("--help-all", help="Show every option and exit.", is_eager=True, callback=_show_all, metavar=""),
]

_NAMES = (errno.ENAMETOOLONG, errno.ELOOP)  # of a text that cannot be a file name
#: What a disk says that is full, over its quota, or not to be written to.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the toolkit's errors into one line and the documented exit code."""

    @functools.wraps(command)
    @terminal.lasting_streams()
    def run(*args: Any, **kwargs: Any) -> None:
        _be_quiet()
        from stereoclinic.errors import Incomplete, InputError, UncoveredOperation

        ranks.watch(ranks.is_rank_zero(), INCOMPLETE)
        try:
            command(*args, **kwargs)
        except (InputError, UncoveredOperation) as error:
            fail(str(error), BAD_INPUT)
        except Incomplete as error:
            fail(str(error), INCOMPLETE)
        except typer.Exit:
            raise
        except OSError as error:
            if error.errno in _NAMES:
                fail(f"{str(error.filename)[:60]}...: {error.strerror}; give a file, a folder or a name", BAD_INPUT)
            if error.errno not in _DISK:
                _fault()
            fail(
                f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room, or give another folder",
                BAD_INPUT,
            )
        except Exception as error:
            # Lightning's name for options that do not go together; importing it here would cost every command seconds.
            if (line := ranks.lost()) is not None:  # what the other ranks were waiting for went with it
                fail(line, INCOMPLETE)
            if type(error).__name__ != "MisconfigurationException":
                _fault()
            fail(str(error), BAD_INPUT)
        except KeyboardInterrupt:
            fail("interrupted", INTERRUPTED)

    return run


def _fault() -> NoReturn:
    """An internal error, with its traceback; its exit code is not that of --fail-above."""
    print(*map(printable, traceback.format_exc().rstrip("\n").split("\n")), sep="\n", file=sys.stderr)
    fail("internal error; please report it with the traceback above", FAULT)


def _be_quiet() -> None:
    """Libraries tell users about their own insides at start-up; none of that is about this run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|transformers|diffusers)\b.*")
