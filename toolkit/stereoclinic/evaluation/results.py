"""Results of a comparison, as a typed model: what results.json holds, and its JSON schema.

The figures of an arm are those of the registry, so that the schema follows from it. Fields that are not named here are
kept as they are: results may hold further figures.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from stereoclinic.errors import InputError
from stereoclinic.evaluation.arms import ALLOCATION, OTHER, SCHEMA, UNTREATED
from stereoclinic.evaluation.figures.registry import (
    AMPLIFICATION,
    FIGURES,
    GROUPED,
    NEUTRAL,
    UNRELATED,
    Figure,
    Unit,
)
from stereoclinic.evaluation.verdict import verdicts
from stereoclinic.io.files import plain, write_text
from stereoclinic.io.reading import read_json
from stereoclinic.statistics.intervals import Interval, PairedDifference

Share = Annotated[float, Field(ge=0, le=1)]
Gap = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Loose(BaseModel):
    """A part of results; it keeps fields that it does not name."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Noise(Loose):
    """What chance shows with as many images, of a fair model or of no change: the mean, and what 95 % stay below."""

    mean: Gap
    upper: Gap


class ShareInterval(Loose):
    """A share with its 95 % interval."""

    estimate: Share | None
    low: Share | None
    high: Share | None


@cache
def _value_type(unit: Unit, kind: type) -> Any:
    """The type of a figure's value in results.json; null stands for what is not defined."""

    def snapped(value: Any) -> Any:
        """A value that rounding has moved past a bound may stay there."""
        near = [end for end in (unit.low, unit.high) if isinstance(value, float) and end is not None]
        return next((end for end in near if abs(value - end) < 1e-9), value)

    number = Annotated[float, Field(ge=unit.low, le=unit.high), BeforeValidator(snapped)] | None
    if not issubclass(kind, Interval):
        return number
    further: dict[str, Any] = {"p_value": (Share, ...)} if kind is PairedDifference else {}
    form = create_model(
        f"{'Change' if further else 'Interval'} ({unit.name})", __base__=Loose, __doc__="With its 95 % interval.",
        estimate=(number, ...), low=(number, ...), high=(number, ...), **further,
    )  # fmt: skip
    return form | None


def _type_of(figure: Figure) -> Any:
    value = _value_type(figure.unit, figure.kind)
    return dict[str, value] if figure.is_family else value  # type: ignore[valid-type]


class Figures(Loose):
    """The registered figures of one arm."""

    prompts_kind: ClassVar[str] = NEUTRAL

    @classmethod
    def figures(cls) -> dict[str, Figure]:
        """The figures of these prompts by their key in results."""
        prefix = f"{cls.prompts_kind}."
        found = {figure.name: figure for figure in FIGURES.values() if cls.prompts_kind in figure.on}
        keys = {name.removeprefix(prefix).removesuffix("."): figure for name, figure in found.items()}
        return {key: figure for key, figure in keys.items() if key}

    @model_validator(mode="after")
    def _check(self) -> "Figures":
        figures = self.figures()
        for key, value in (self.model_extra or {}).items():
            if key in figures:
                _adapter(_type_of(figures[key])).validate_python(value, strict=True)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema).setdefault("properties", {})
        for key, figure in cls.figures().items():
            described = {"title": figure.title.replace("{}", "..."), "description": figure.meaning}
            properties[key] = handler(_adapter(_type_of(figure)).core_schema) | described
        return schema


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


class Prompt(Loose):
    """One prompt of one arm."""

    label: str
    prompt: str
    shares: dict[str, ShareInterval]
    parity_gap: Share
    soft_shares: dict[str, ShareInterval] = {}
    soft_parity_gap: Share = 0


class Varied(Figures):
    """The gaps from shares that are counted in another way."""

    @classmethod
    def figures(cls) -> dict[str, Figure]:
        return {name: figure for name, figure in FIGURES.items() if figure.variants}


class Arm(Figures):
    """Neutral prompts by one arm."""

    prompts: Annotated[list[Prompt], Field(min_length=1)]
    soft: Varied | None = None
    pooled: Varied | None = None
    pooled_soft: Varied | None = None


class GroupPrompts(Figures):
    """Prompts that name a group, by one arm: how often it was obeyed, for all and by group."""

    prompts_kind = GROUPED


class UnrelatedArm(Figures):
    """Prompts that have nothing to do with the axis, by one arm."""

    prompts_kind = UNRELATED


class Amplification(Figures):
    """How far one arm exaggerates a reference, over the prompts that the reference has."""

    prompts_kind = AMPLIFICATION
    labels: Annotated[list[str], Field(min_length=1)]


def _requires(*names: str) -> Any:
    """Requires these arms, in validation and in the schema."""

    def check(arms: dict[str, Any]) -> dict[str, Any]:
        if missing := [name for name in names if name not in arms]:
            raise ValueError(f"arm {missing[0]!r} is missing")
        return arms

    return [AfterValidator(check), Field(json_schema_extra={"required": list(names)})]


_EVERY = _requires(UNTREATED, ALLOCATION)
_UNRELATED = _requires(UNTREATED, OTHER)


class Cost(Loose):
    """What another method needs, and what making it took: samples through the denoiser forward and backward."""

    needs: str
    source: str
    seconds: Gap
    images: Count
    forward: Count
    backward: Count


class Published(Loose):
    """The figure of the published evaluation that the run followed."""

    name: str
    figure: str
    arms: Annotated[dict[str, Gap], *_EVERY]
    noise_floor: Noise


class Unrelated(Loose):
    """Prompts that have nothing to do with the axis. The gate leaves `left_alone` of them alone."""

    prompts: Annotated[list[str], Field(min_length=1)]
    left_alone: Count
    images_per_prompt: Positive
    seeds: Annotated[list[Count], Field(min_length=2, max_length=2)]
    arms: Annotated[dict[str, UnrelatedArm], *_UNRELATED]


class ExperimentResults(Loose):
    """All arms at one guidance scale. Further keys: `intersections`, `gate`, `features`, `left_out`."""

    axis: str
    groups: Annotated[list[str], Field(min_length=2)]
    target_shares: Annotated[list[Share], Field(min_length=2)]
    labels: Annotated[list[str], Field(min_length=1)]
    images_per_prompt: Annotated[int, Field(ge=2)]
    seeds: Annotated[list[Count], Field(min_length=2, max_length=2)]
    steps: Positive
    guidance: Gap
    masks: list[str]
    noise_floor: dict[str, Noise]
    noise_floor_one_prompt: Noise
    arms: Annotated[dict[str, Arm], *_EVERY]
    group_prompts: dict[str, GroupPrompts]
    unrelated: Unrelated | None = None
    baselines: dict[str, Cost] | None = None
    amplification: Annotated[dict[str, Amplification], *_EVERY] | None = None
    corrected_shares: (
        Annotated[dict[str, Annotated[list[dict[str, ShareInterval]], Field(min_length=1)]], *_EVERY] | None
    ) = None
    published: Published | None = None


class MaskRecord(Loose):
    """A judged mask: its file, and its own metadata."""

    file: str | None


class Provenance(Loose):
    """Where the figures come from."""

    masks: dict[str, MaskRecord] = {}
    reader_limits: list[str] = []
    reader_errors: list[str] = []


class Results(Loose):
    """What `stereo bench` found: a results.json.

    Examples:
        results = Results.load("stereo-bench")
        print(results.verdict)
    """

    schema_version: Literal[2] = Field(alias="schema")
    provenance: Provenance
    experiments: Annotated[list[ExperimentResults], Field(min_length=1)]

    @classmethod
    def of(cls, experiments: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> "Results":
        """Results from plain data: those of each experiment (one for each guidance scale), and where they come from."""
        return cls.model_validate(
            plain({"schema": SCHEMA, "provenance": dict(provenance), "experiments": list(experiments)})
        )

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read a results.json, or the one in a folder.

        Raises:
            InputError: It cannot be read, was not written by `stereo bench`, or is of another schema.
        """
        path = Path(path)
        path = path / "results.json" if path.is_dir() else path
        data = read_json(path, "results")
        if not isinstance(data, dict) or not data.get("experiments") or "schema" not in data:
            raise InputError(f"{path} holds no experiments; expected a results.json of stereo bench")
        if data["schema"] != SCHEMA or isinstance(data["schema"], bool):
            raise InputError(f"{path} has schema {data['schema']!r:.40}; this stereoclinic reads {SCHEMA}: bench again")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{path} is damaged: {place:.100}: {first['msg']:.200}; bench again") from error

    def save(self, path: str | Path) -> None:
        """Write a results.json.

        Raises:
            InputError: It cannot be written there.
        """
        write_text(path, json.dumps(self.data, indent=2, allow_nan=False))

    @property
    def data(self) -> dict[str, Any]:
        """The same as plain data."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    @property
    def verdict(self) -> str:
        """What the figures come to, in words: one line for each guidance scale and mask."""
        found = [
            (experiment["guidance"], each.sentence)
            for experiment in self.data["experiments"]
            for each in verdicts(experiment)
        ]
        several = len(self.experiments) > 1
        return "\n".join(f"Guidance {scale:g}: {text}" if several else text for scale, text in found)
