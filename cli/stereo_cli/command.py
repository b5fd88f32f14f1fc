"""A command from a function: settings become options, errors become one line and an exit code."""

import errno
import functools
import inspect
import os
import sys
import traceback
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import annotated_types
import typer
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from stereo_cli import terminal
from stereo_cli.config_file import read_config
from stereo_cli.terminal import BAD_INPUT, FAILED, FAULT, INCOMPLETE, INTERRUPTED, fail
from stereoclinic.calls.settings import OUTPUT, Option, Settings, checked
from stereoclinic.io.text import printable
from stereoclinic.runtime import ranks

__all__ = ["BAD_INPUT", "FAILED", "INCOMPLETE", "Run", "Shown", "command"]


class Shown(Settings):
    """What is printed of a result."""

    as_json: Annotated[
        bool,
        Field(description="Print the result as JSON on stdout instead of tables."),
        Option(OUTPUT, flags=("--json",)),
    ] = False
    quiet: Annotated[bool, Field(description="Show no progress."), Option(OUTPUT, flags=("--quiet", "-q"))] = False


class Run(Shown):
    """What every command has that runs a model."""

    dry_run: Annotated[
        bool, Field(description="Check everything, say what would be done, and stop."), Option(OUTPUT)
    ] = False
    config: Annotated[
        Path | None,
        Field(description="YAML file of options; flags on the command line win."),
        Option(OUTPUT),
    ] = None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A typer command of a function: every parameter that is a settings class becomes that class's options.

    Other parameters are typer's own. The function gets settings that were checked.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    expanded: dict[str, type[Settings]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            expanded[name] = kind
            parameters += [_parameter(each, field) for each, field in kind.model_fields.items()]
        else:
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    parameters.append(_keyword("help_all", _HELP_ALL, False))

    @functools.wraps(function)
    def run(**given: Any) -> None:
        given.pop("help_all")
        for name, kind in expanded.items():
            taken = {each: given.pop(each) for each in kind.model_fields}
            given[name] = checked(kind, {each: value for each, value in taken.items() if value is not None})
        function(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return guarded(run)


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The parameter that typer reads for a setting."""
    option = next((each for each in field.metadata if isinstance(each, Option)), Option())
    kind, default = field.annotation, field.default
    if option.texts or typing.get_origin(kind) in (tuple, list):
        inner = str if option.texts else typing.get_args(kind)[0]
        kind, default = list[inner] | None, None  # type: ignore[valid-type]
    elif default is not None and isinstance(kind, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    bounds = {
        key: getattr(each, attribute)
        for each in field.metadata
        for of, attribute, key in ((annotated_types.Ge, "ge", "min"), (annotated_types.Le, "le", "max"))
        if isinstance(each, of)
    }
    unknown = default is None or default is False
    flags = option.flags or (f"--{name.replace('_', '-')}",)
    info = typer.Option(
        *flags,
        help=field.description,
        hidden=option.advanced,
        rich_help_panel=option.panel,
        metavar=option.metavar or _FORMS.get(kind),
        show_default=option.default or not unknown,
        callback=read_config if name == "config" else None,
        is_eager=name == "config",
        **bounds,  # type: ignore[arg-type]
    )
    return _keyword(name, Annotated[kind, info], default)


#: What stands for a value in the help.
_FORMS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _show_all(context: typer.Context, value: bool) -> None:
    if value:
        for parameter in context.command.params:
            parameter.hidden = parameter.name == "help_all"  # type: ignore[attr-defined]
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit


_HELP_ALL = Annotated[
    bool, typer.Option("--help-all", help="Show every option and exit.", is_eager=True, callback=_show_all)
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
