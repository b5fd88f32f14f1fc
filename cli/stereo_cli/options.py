"""Options that several commands share, and how they are written again for the next command."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from stereo_cli.terminal import say
from stereoclinic.calls.settings import MODEL, ModelSettings, OpenSettings, WeightSettings, call_texts

S = TypeVar("S", bound=WeightSettings)

_MODEL = "Model: portraits, portraits-flow, a folder, a checkpoint, or a hub id."
Model = Annotated[str, typer.Option(help=_MODEL, metavar="NAME")]
ModelOfFile = Annotated[str | None, typer.Option(help=_MODEL, metavar="NAME", show_default="the file's, or portraits")]
_AXIS = "Axis: gender, skin, age or TOML file."
AxisName = Annotated[str, typer.Option("--axis", help=_AXIS, metavar="NAME")]
AxisOfFile = Annotated[
    str | None, typer.Option("--axis", help=_AXIS, metavar="NAME", show_default="the file's, or gender")
]
Prompts = Annotated[
    str,
    typer.Option(
        help="Neutral prompts: portraits, winobias, winobias-successful, winobias-train, protocol:NAME, a file or hub"
        " data.",
        metavar="NAME",
        rich_help_panel=MODEL,
    ),
]

#: Defaults of `stereo bench`.
_BENCH = {"model": "portraits", "dtype": "float32", "prompts": "portraits"}


def as_made(settings: S, made: Mapping[str, Any], model: str | None) -> S:
    """Settings with a file's own call options; also with its dtype and variant, unless a model is named.

    Raises:
        InputError: Height or width is given alone, or the file's options are not a table.
    """
    from stereoclinic.calls.inputs import call_of
    from stereoclinic.pipelines.opening import DTYPES

    update: dict[str, Any] = {}
    if isinstance(settings, OpenSettings):
        update = {"call": call_of(settings, made), "height": None, "width": None}
    if model is not None:
        return settings.model_copy(update=update)
    dtype, variant = made.get("dtype"), made.get("variant")
    if "dtype" not in settings.model_fields_set and dtype in DTYPES:
        update["dtype"] = str(dtype)
    if settings.variant is None and isinstance(variant, str):
        update["variant"] = variant
    return settings.model_copy(update=update)


def words_of(call: Mapping[str, Any], **given: str | float | None) -> list[str]:
    """Options of the next command, without those that are its defaults."""
    asked = {name: value for name, value in given.items() if value not in (None, _BENCH.get(name))}
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    return words + [word for each in call_texts(call) for word in ("--call", each)]


def say_next(mask: Path, settings: ModelSettings, model: str, **given: str | float | None) -> None:
    """Print the command that judges a mask."""
    from stereoclinic.calls.inputs import call_of

    words = words_of(call_of(settings), model=model, dtype=settings.dtype, variant=settings.variant, **given)
    say(f"next: {shlex.join(['stereo', 'bench', '--mask', str(mask), *words])}")


def say_dose(bound: float, found: Mapping[str, Any]) -> None:
    """Print how a dose was found, and what the images showed."""
    tried = ", ".join(f"{strength:.2f}: {left:.2f}" for strength, left in found["tried"])
    say(
        f"dose: strength {found['strength']:.2f} leaves mean |lean - target| {found['left']:.3f} (bound {bound:g});"
        f" tried {tried}"
    )
    if (seen := found["confirmed"]) is not None:
        before, after, noise = seen["before"], seen["after"], seen["floor"]
        say(
            f"confirmed on {seen['images']} images per prompt, seeds {seen['seeds'][0]} to {seen['seeds'][1]}:"
            f" parity gap {before['estimate']:.2f} -> {after['estimate']:.2f} [{after['low']:.2f}, {after['high']:.2f}]"
            f"; sampling noise of a fair model {noise['mean']:.2f}, below {noise['upper']:.2f}"
        )
