"""The one formatter of numbers, intervals and p-values, for tables, charts, the report and the verdict."""

from stereoclinic.evaluation.figures.values import p_value_of
from stereoclinic.statistics.intervals import Interval

MISSING = "-"


def number(value: float | None, form: str = ".2f") -> str:
    """A number in the given form, with a real minus sign; a dash where it is not known."""
    if value is None or value != value:
        return MISSING
    if form.endswith("g"):  # as many digits as asked for, also where the last is a zero
        form = f"{form[:-3]}.0f" if abs(value) >= 100 else f"{form[:-3]}#{form[-3:]}"
    text = format(value, form).removesuffix(".")
    if text[0] in "+-" and not text.strip("+-0.%"):  # zero after rounding has no sign
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}")


def bracket(value: Interval, form: str = ".2f") -> str:
    """The interval of a value, or nothing where it has none."""
    return f"[{number(value.low, form)}, {number(value.high, form)}]" if value.has_ends else ""


def spelt(value: Interval | None, form: str = ".2f") -> str:
    """A value with its interval."""
    return MISSING if value is None else f"{number(value.estimate, form)} {bracket(value, form)}".rstrip()


def p_value(p: float) -> str:
    """A p-value for a cell: "0.012", or the bound below which more digits mean nothing."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """A p-value for a sentence: "p = 0.012"."""
    return f"p {p_value(p)}" if p < 0.001 else f"p = {p_value(p)}"


def details(value: Interval, form: str = ".2f") -> list[str]:
    """What belongs below a value: its interval and its p-value, as far as there are any."""
    p = p_value_of(value)
    return [text for text in (bracket(value, form), "" if p is None else p_equals(p)) if text]
