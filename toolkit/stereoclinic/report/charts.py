"""Charts of the report as inline SVG: pure functions from numbers to markup.

Widths are in percent and heights in pixels, so that a chart fills its column on a phone as in print without stretched
strokes or text. Marks differ in shape as well as in colour, and lines in their dashes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from stereoclinic.evaluation.wording import number, spelt
from stereoclinic.statistics.intervals import Interval

#: Outlines of the marks, round (0, 0): the untreated model's first, then one a mask.
SHAPES = (
    '<circle r="4"/>',
    '<circle r="5"/>',
    '<path d="M-4.5-4.5h9v9h-9z"/>',
    '<path d="M-5.5 4.5L0-5.5 5.5 4.5z"/>',
    '<path d="M0-6L6 0 0 6-6 0z"/>',
)
_LINE, _PAD = 15, 3.0  # pixels between marks; percent kept free at either end
_DASHES = ("none", "5 3", "1.5 3", "8 3 2 3")


@dataclass(frozen=True)
class Band:
    """The shaded range of a chart: sampling noise."""

    low: float
    high: float


def mark(kind: int) -> Markup:
    """One mark, for a legend."""
    return Markup('<svg class="glyph" width="16" height="14" aria-hidden="true">{}</svg>').format(
        _shape(kind, Markup("50%"), 7)
    )


def interval_rows(values: Sequence[Interval], target: float, band: Band | None = None) -> Markup:
    """Shares with their intervals, one below the other, from 0 to 1.

    Args:
        values: Untreated first, then the masks in their order.
        target: Target share, a dashed line.
        band: What sampling noise would show of a fair model.
    """
    height = _LINE * len(values) + 7
    parts = []
    if band is not None:
        low, high = max(band.low, 0.0), min(band.high, 1.0)
        width = _across(high) - _across(low)
        parts.append(
            Markup('<rect class="chance" x="{:.2f}%" width="{:.2f}%" y="0" height="{}"/>').format(
                _across(low), width, height
            )
        )
    parts += [_upright("grid", at, height) for at in (0, 0.25, 0.5, 0.75, 1)]
    parts.append(_upright("target", target, height))
    for i, value in enumerate(values):
        y = _LINE * i + 11
        if value.has_ends:
            parts.append(
                Markup('<line class="m{}" x1="{:.2f}%" x2="{:.2f}%" y1="{}" y2="{}"/>').format(
                    _kind(i), _across(value.low), _across(value.high), y, y
                )
            )
        parts.append(_shape(i, Markup("{:.2f}%").format(_across(value.estimate)), y))
    spoken = ", then ".join(spelt(value) for value in values)
    return _svg("rows", height, f"{spoken}; target {number(target)}", parts)


def share_scale() -> Markup:
    """The scale over `interval_rows`."""
    parts = [
        Markup('<text x="{:.2f}%" y="11" text-anchor="middle">{}</text>').format(_across(at), text)
        for at, text in ((0, "0"), (0.5, ".5"), (1, "1"))
    ]
    return _svg("scale", 14, "from 0 to 1", parts)


def bar(value: float, top: float) -> Markup:
    """A bar from 0; one that reaches `top` fills the width."""
    width = 100 * min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
    part = Markup('<rect class="bar" x="0" y="2" width="{:.2f}%" height="10"/>').format(width)
    return _svg("bars", 14, number(value, ".3g"), [part])


@dataclass(frozen=True)
class Curve:
    """Values along a trajectory, with one standard error either way; None where nothing was measured."""

    name: str
    values: Sequence[float | None]
    errors: Sequence[float | None]


def curves(lines: Sequence[Curve], steps: Sequence[float], reach: float) -> Markup:
    """Lines over timesteps, noise at the left and the image at the right, with a band of one standard error.

    Args:
        lines: All over the same timesteps.
        steps: Timesteps, in falling order.
        reach: The chart runs from -reach to reach.
    """
    first, last = (steps[0], steps[-1]) if steps else (1.0, 0.0)
    span = (first - last) or 1.0
    middle = 0.5 if first == last else 0.0

    def point(step: float, value: float) -> str:
        return f"{100 * ((first - step) / span + middle):.2f},{30 - 28 * min(max(value / reach, -1), 1):.2f}"

    parts = [Markup('<path class="zero" d="M0 30H100"/><path class="frame" d="M0 2H100M0 58H100"/>')]
    for i, line in enumerate(lines):
        for run in _runs(line, steps):
            above = [point(step, value + error) for step, value, error in run]
            below = [point(step, value - error) for step, value, error in reversed(run)]
            parts.append(Markup('<polygon class="error" points="{}"/>').format(" ".join(above + below)))
            at = [point(step, value) for step, value, _ in run]
            parts.append(
                Markup('<polyline class="lean" stroke-dasharray="{}" points="{}"/>').format(
                    dash(i), " ".join(at if len(at) > 1 else at * 2)
                )
            )
    spoken = "; ".join(
        f"{line.name}: " + ", ".join(number(value, "+.2f") for value in line.values if value is not None)
        for line in lines
    )
    return Markup(
        '<svg class="curve" viewBox="0 0 100 60" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(spoken, Markup("").join(parts))


def dash(line: int) -> str:
    """Dashes of a line of `curves`, as SVG writes them."""
    return _DASHES[line % len(_DASHES)]


def _runs(line: Curve, steps: Sequence[float]) -> list[list[tuple[float, float, float]]]:
    """Stretches of a curve that were measured: (step, value, error)."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for step, value, error in zip(steps, line.values, line.errors, strict=True):
        if value is None or not math.isfinite(value):
            runs.append([])
        else:
            runs[-1].append((step, value, error or 0.0))
    return [run for run in runs if run]


def _across(share: float) -> float:
    return _PAD + (100 - 2 * _PAD) * min(max(share, 0.0), 1.0)


def _kind(i: int) -> int:
    """The first shape is the untreated model's; the others repeat where there are more masks than shapes."""
    return i if i < len(SHAPES) else 1 + (i - 1) % (len(SHAPES) - 1)


def _shape(i: int, x: Markup, y: int) -> Markup:
    # Nested, because a path takes no percentages and the position of an svg element does.
    return Markup('<svg class="m{}" x="{}" y="{}" overflow="visible">{}</svg>').format(
        _kind(i), x, y, Markup(SHAPES[_kind(i)])
    )


def _upright(kind: str, share: float, height: int) -> Markup:
    x = _across(share)
    return Markup('<line class="{}" x1="{:.2f}%" x2="{:.2f}%" y1="0" y2="{}"/>').format(kind, x, x, height)


def _svg(kind: str, height: int, spoken: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="{}" width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        kind, height, spoken, Markup("").join(parts)
    )
