"""Settings of the public calls: each is declared once, for Python and for the command line.

A field's type, default, bounds and description are pydantic's. `Option` adds how it is given on the command line, where
it needs more than a flag of the field's name. Importing this costs no torch.

Settings that are given as texts, such as KEY=VALUE, and written as texts again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from stereoclinic.errors import InputError


def call_options(given: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Options of the pipeline's own call, from KEY=VALUE texts; a mapping stays as it is.

    A value is read as JSON where it is JSON, and as text otherwise.

    Raises:
        InputError: A text is not of the form KEY=VALUE, or a key is given twice.
    """
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    found: dict[str, Any] = {}
    for text in given:
        name, separator, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not separator or not name.isidentifier():
            raise InputError(f"--call {text!r}: expected KEY=VALUE, such as true_cfg_scale=4")
        if name in found:
            raise InputError(f"--call {text!r}: {name} is given twice")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(text: str) -> None:
    """NaN and Infinity are not JSON."""
    raise ValueError(text)


def call_texts(call: Mapping[str, Any]) -> list[str]:
    """Options of the pipeline's call as --call takes them."""
    return [
        f"{name}={value if isinstance(value, str) and _value(value) == value else json.dumps(value)}"
        for name, value in sorted(call.items())
    ]


def group_shares(given: Sequence[str | Mapping[str, float]] | Mapping[str, float] | None) -> list[dict[str, float]]:
    """Shares of groups, from GROUP=SHARE,GROUP=SHARE texts: one mapping for each axis; mappings stay as they are.

    Raises:
        InputError: A text is not of that form, or names a group twice.
    """
    found: list[dict[str, float]] = []
    for each in [given] if isinstance(given, Mapping) else given or []:
        if isinstance(each, Mapping):
            found.append(dict(each))
            continue
        shares: dict[str, float] = {}
        for part in each.split(","):
            group, _, value = part.partition("=")
            try:
                share = float(value)
            except ValueError:
                raise InputError(f"--shares {each!r}: expected GROUP=SHARE, such as female=0.5,male=0.5") from None
            if group.strip() in shares:
                raise InputError(f"--shares {each!r}: {group.strip()} is given twice")
            shares[group.strip()] = share
        found.append(shares)
    return found


MODEL, DEVICES, OUTPUT = "Model, prompts and sampler", "Devices", "Output"
RELEVANCE, CHOOSING, DOSE, DURATION = "Relevance", "Choosing neurons", "Dose", "Estimated time"
DRAWN, READ, OTHERS = "Images", "Reader and figures", "Other methods"
RESPONSES = "Model for --images"
#: Headings of the help, in their order; the unnamed one is first.
PANELS = (MODEL, DRAWN, READ, OTHERS, RELEVANCE, CHOOSING, DOSE, DURATION, RESPONSES, DEVICES, OUTPUT)

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True)
class Option:
    """How a setting is given on the command line.

    Args:
        panel: Heading that it stands under in the help; None for the first, unnamed one.
        advanced: Shown by --help-all alone.
        default: Words for a default that is worked out when the command runs, such as "the model's own".
        metavar: Form of its value.
        flags: Its flags, where they are not `--name`.
        texts: It is given as one or more texts, which the field's own validator reads.
    """

    panel: str | None = None
    advanced: bool = False
    default: str | None = None
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    texts: bool = False


def option(
    default: Any, description: str, panel: str | None = None, default_text: str | None = None, **how: Any
) -> Any:
    """A setting: its default, what it is, and how it is given on the command line.

    Args:
        default: Where it is not given.
        description: One imperative line that names the unit.
        panel: As of `Option`.
        default_text: `Option.default`.
        **how: Bounds `ge` and `le` as of pydantic's `Field`; the rest as of `Option`.
    """
    bounds = {name: how.pop(name) for name in ("ge", "le") if name in how}
    field = Field(default, description=description, **bounds)
    field.metadata.append(Option(panel, default=default_text, **how))
    return field


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


def checked(kind: type[S], given: dict[str, Any]) -> S:
    """Settings of plain values.

    Raises:
        InputError: One is of another form; the line names its flag.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := (first.get("ctx") or {}).get("error"), InputError):
            raise cause from None
        name = str(first["loc"][0]).replace("_", "-") if first["loc"] else "settings"
        raise InputError(f"--{name}: {first['msg'].removeprefix('Value error, ')}") from None


class WeightSettings(Settings):
    """How the pipeline is opened."""

    dtype: str = option("float32", "Precision of the weights: float32, bfloat16 or float16.", MODEL, advanced=True)
    variant: str | None = option(None, "Variant of the model's weight files, such as fp16.", MODEL, advanced=True)


class OpenSettings(WeightSettings):
    """How the pipeline is opened and called."""

    call: Annotated[dict[str, Any], BeforeValidator(call_options)] = option(
        {}, "Extra argument of the pipeline call, such as true_cfg_scale=4; may repeat.",
        MODEL, advanced=True, metavar="KEY=VALUE", texts=True,
    )  # fmt: skip
    height: int | None = option(
        None, "Height of the images, in pixels.", MODEL, ge=1, advanced=True, default_text="the pipeline's own"
    )
    width: int | None = option(
        None, "Width of the images, in pixels.", MODEL, ge=1, advanced=True, default_text="the pipeline's own"
    )


class ModelSettings(OpenSettings):
    """How the pipeline is opened and called, and in how many steps."""

    steps: int | None = option(
        None, "Number of sampler steps.", MODEL, ge=1, advanced=True, default_text="the model's own"
    )


class PromptSettings(Settings):
    """Which of the prompts are used."""

    limit: int | None = option(None, "Use only the first N prompts.", MODEL, ge=1, advanced=True)


class PlaceSettings(Settings):
    """What kind of device the work is done on."""

    accelerator: str = option("auto", "Type of device: cpu, cuda, mps or auto.", DEVICES, advanced=True)


class DeviceSettings(PlaceSettings):
    """Where the work is done."""

    devices: int = option(1, "Number of devices.", DEVICES, ge=1)
    num_nodes: int = option(1, "Number of machines.", DEVICES, ge=1, advanced=True)
    strategy: str = option(
        "auto", "Lightning strategy, such as ddp; auto is ddp on several devices.", DEVICES, advanced=True
    )

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


class LoggerSettings(Settings):
    """Where else results are logged."""

    logger: tuple[str, ...] = option(
        (), "Also log curves, figures and pictures to csv, tensorboard, wandb or mlflow (packages of their own but csv:"
        " pip install NAME), with files in FOLDER; may repeat.",
        OUTPUT, advanced=True, metavar="NAME[:FOLDER]", default_text="none; FOLDER: OUT/logs, or MASK.logs",
    )  # fmt: skip


class SiteSettings(Settings):
    """Which layers are watched."""

    sites: tuple[str, ...] = option(
        (), "Module path of layers whose neurons to use, in place of the built-in choice, such as"
        " 'blocks.*.proj_out'; may repeat.",
        MODEL, advanced=True, metavar="PATTERN",
    )  # fmt: skip
