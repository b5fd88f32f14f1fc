"""Numbers as a reader meets them."""

from stereoclinic.evaluation.figures.registry import Value

MISSING = "-"


def number(value: float | None, form: str = ".2f") -> str:
    """A number in the given form, with a proper minus; large ones in plain digits, and a dash for what is not known."""
    if value is None:
        return MISSING
    if form.endswith("g"):  # as many digits as asked for, also where the last is a zero
        form = f"{form[:-3]}.0f" if abs(value) >= 100 else f"{form[:-3]}#{form[-3:]}"
    text = format(value, form).removesuffix(".")
    if text[0] in "+-" and not text.strip("+-0.%"):  # what rounding has left of it has no sign
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}")


def interval(value: Value, form: str = ".2f") -> str:
    """The bracket of a value, or nothing where it has none."""
    return f"[{number(value.low, form)}, {number(value.high, form)}]" if value.has_interval else ""


def spelt(value: Value, form: str = ".2f") -> str:
    """A value with its bracket."""
    return f"{number(value.estimate, form)} {interval(value, form)}".rstrip()


def p_value(p: float) -> str:
    """ "p = 0.012", or the bound below which no more digits mean anything."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
