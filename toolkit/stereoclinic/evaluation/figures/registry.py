"""The registry of figures: what each is called and means, its unit, which way is better, and how it is computed.

A figure is a function with a decorator:

    @figure("occupation right", "Images that show the occupation of their prompt.", SHARE, "higher", shown=True)
    def occupation_right(case: Case) -> Interval | None:
        ...

Its results, tables, report page, JSON schema, `--fail-above` name, comparison and TensorBoard scalars follow from that.
The function's name is the key in results.json. It returns None where the figure does not apply (it is then left out)
and NaN where it applies but is not defined (null). One that returns a dict is a family, with a member for each key;
its key ends in a dot and its title holds `{}` for the member.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_type_hints

from stereoclinic.errors import InputError

Measure = TypeVar("Measure", bound=Callable[..., Any])

Better = Literal["lower", "higher", ""]
#: The table that a figure belongs to; figures of "head" are in no table.
Part = Literal["bias", "cost", "option", "reference", "published", "further", "head"]

#: What a figure is computed on. Results hold all but the first under these names, outside the arms.
NEUTRAL, GROUPED, UNRELATED = "neutral", "group_prompts", "unrelated"
AMPLIFICATION, PROTOCOL = "amplification", "published"

#: Other ways to count the shares behind a gap: name -> (in words, hard reads, prompts pooled).
VARIANTS = {
    "soft": ("soft reads", False, False),
    "pooled": ("prompts pooled", True, True),
    "pooled_soft": ("prompts pooled, soft reads", False, True),
}

NOISE = "_floor"  # a figure's key and this: the sampling noise of it
INTERVAL = "_interval"  # the key of a plain number and this: the same number with its interval


@dataclass(frozen=True)
class Unit:
    """What a figure is counted in.

    Args:
        name: In words.
        form: Number format, as `format` takes it; "+" in front for changes.
        low: The least value there can be, if any.
        high: The greatest, if any.
        symbol: As in headings; none for shares and other plain numbers.
    """

    name: str
    form: str = ".2g"
    low: float | None = None
    high: float | None = None
    symbol: str = ""


SHARE, SHARE_CHANGE = Unit("share", ".2f", 0, 1), Unit("change of a share", "+.2f", -1, 1)
GAP, PERCENT, SLOPE = Unit("gap", ".2f", 0), Unit("percent", ".0%"), Unit("slope", ".2f")
NATS, KAPPA, SIMILARITY = Unit("nats", ".2f", 0, symbol="nats"), Unit("kappa", ".2f", -1, 1), Unit("similarity", ".2f")
DISTANCE = Unit("distance")
TIMES_NOISE = Unit("times sampling noise", ".1f", 0, symbol="\N{MULTIPLICATION SIGN} noise")
SCORE, SCORE_CHANGE = Unit("score", ".1f", 0, 100), Unit("change of a score", "+.2f")
SECONDS, MEBIBYTES = Unit("seconds", ".1f", 0, symbol="s"), Unit("mebibytes", ".0f", 0, symbol="MiB")
IMAGES = Unit("images", ".0f", 0)


@dataclass(frozen=True)
class Figure:
    """What is known of a figure.

    Args:
        name: Its key in results; it ends in a dot for a family.
        title: Heading in tables.
        meaning: One sentence.
        unit: What it is counted in.
        better: Whether "lower" or "higher" is better; "" where neither is.
        part: The table that it belongs to, one of `Part`.
        shown: Whether the default tables show it.
        by_size: Whether its sampling noise depends on the number of images. Runs of different sizes cannot be
            compared by it.
        asked: Whether it is computed on request only.
        variants: Whether it is also computed for each of `VARIANTS`.
        noise: Its sampling noise: a number, or the arm whose value shows it.
        on: What it is computed on.
        kind: Type of its values: float, Interval or PairedDifference; of a family's members where it is one.
        measure: Computes it from a case; None where results bring it from elsewhere.
    """

    name: str
    title: str
    meaning: str = ""
    unit: Unit = DISTANCE
    better: Better = ""
    part: Part = "further"
    shown: bool = False
    by_size: bool = False
    asked: bool = False
    variants: bool = False
    noise: float | str | None = None
    on: tuple[str, ...] = (NEUTRAL,)
    kind: Any = float
    measure: Callable[[Any], Any] | None = None

    @property
    def sign(self) -> int:
        """1 where higher is better, -1 where lower is, 0 where neither is."""
        return {"lower": -1, "higher": 1}.get(self.better, 0)

    @property
    def heading(self) -> str:
        """The title with its unit."""
        return f"{self.title} ({self.unit.symbol})" if self.unit.symbol else self.title

    @property
    def is_family(self) -> bool:
        return self.name.endswith(".")


#: By name, in the order in which tables show them.
FIGURES: dict[str, Figure] = {}


def register(figure: Figure) -> Figure:
    """Add a figure whose values come from elsewhere, such as a published protocol."""
    FIGURES[figure.name] = figure
    return figure


def figure(
    title: str, unit: Unit, better: Better = "", *, part: Part = "cost", **settings: Any
) -> Callable[[Measure], Measure]:
    """Register a function as a figure; arguments as of `Figure`. Its docstring is the meaning."""

    def decorate(function: Measure) -> Measure:
        name = settings.pop("name", function.__name__)
        kind = get_type_hints(function)["return"]
        kinds = [each for each in getattr(kind, "__args__", (kind,)) if each is not type(None)]
        family = next((each for each in (kind, *kinds) if getattr(each, "__origin__", None) is dict), None)
        if family is not None:
            name, kinds = f"{name.removesuffix('.')}.", [family.__args__[1]]
        elif len(kinds) > 1:
            kinds = [each for each in kinds if each is not float]
        meaning = " ".join((function.__doc__ or "").split())
        register(Figure(name, title, meaning, unit, better, part, kind=kinds[0], measure=function, **settings))
        return function

    return decorate


def figure_of(key: str) -> Figure:
    """What is known of the figure with this key; an unknown one is named by its key."""
    if key in FIGURES:
        return FIGURES[key]
    family, dot, member = key.partition(".")
    if dot and family in VARIANTS and member in FIGURES:
        known = FIGURES[member]
        title = f"{known.title}, {VARIANTS[family][0]}"
        return replace(known, name=key, title=title, meaning="", part="further", shown=False, noise=None, asked=True)
    if family == UNRELATED and member in FIGURES:
        return replace(FIGURES[member], name=key, title=f"unrelated prompts: {FIGURES[member].title}", shown=False)
    if dot and (named := FIGURES.get(f"{family}.")):
        return replace(named, name=key, title=named.title.format(member.replace("_", " ")))
    spoken = key.replace("_", " ").replace(".", ", ")
    if any(each.part == "bias" and key.startswith(f"{name}_") for name, each in FIGURES.items()):
        return Figure(key, spoken, unit=GAP, part="bias", by_size=True)
    return Figure(key, spoken)


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys in the order of the registry, members of a family in its place; then variants, and unknown ones last."""
    order = {known: i for i, known in enumerate(FIGURES)}
    groups = [*VARIANTS, UNRELATED]

    def place(key: str) -> tuple[int, int]:
        family, _, member = key.partition(".")
        if family in groups and member in order:
            return 1 + groups.index(family), order[member]
        known = order.get(key, order.get(f"{family}."))
        return (0, known) if known is not None else (1 + len(groups), 0)

    return sorted(keys, key=place)


def is_known(name: str) -> bool:
    """Whether there is a figure of this name: one of the registry, a family's member, or a variant."""
    family, dot, member = name.partition(".")
    if name in FIGURES:
        return not name.endswith(".")
    if family in VARIANTS:
        return member in FIGURES and FIGURES[member].variants
    if family == UNRELATED:
        return member in FIGURES and UNRELATED in FIGURES[member].on
    return bool(dot and member) and f"{family}." in FIGURES


def requested(figures: str, *more: str) -> str:
    """The value of `Protocol.figures` that also computes further figures.

    Args:
        figures: "default", "all", or names with commas between them.
        more: Names of figures.

    Raises:
        InputError: A name is not known.
    """
    names = [name.strip().replace("-", "_") for name in figures.split(",")]
    if "all" in names:
        return "all"
    names = [name for name in dict.fromkeys([*names, *more]) if name not in ("", "default")]
    for name in names:
        if name not in VARIANTS and not is_known(name):
            raise InputError(f"no figure {name!r}; choose one of default, all, {', '.join(optional())}")
    return ",".join(names) or "default"


def optional() -> list[str]:
    """Names of the figures that are computed on request only."""
    return [*(name for name, figure in FIGURES.items() if figure.asked), *VARIANTS]


def selector(figures: str) -> Callable[[str], bool]:
    """Whether to compute a figure, by its key, under this value of `Protocol.figures`.

    Raises:
        InputError: A name is not known.
    """
    names = set(requested(figures).split(","))

    def wanted(key: str) -> bool:
        is_asked = figure_of(key).asked
        return not is_asked or "all" in names or key in names or ("." in key and key.partition(".")[0] in names)

    return wanted
