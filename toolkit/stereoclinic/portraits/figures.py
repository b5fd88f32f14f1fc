"""A figure beside what was asked of it, as `check` prints it and the model card keeps it."""

from dataclasses import dataclass

from torch import Tensor

from stereoclinic.evaluation.intervals.statistics import Interval, wilson_interval


@dataclass(frozen=True)
class Line:
    """One figure beside what was asked of it; `met` is None where nothing was."""

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    asked: str = ""
    met: bool | None = None

    def __str__(self) -> str:
        interval = f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else ""
        verdict = "" if self.met is None else "   met" if self.met else "   NOT MET"
        return f"{self.name:<58}{self.value:7.3f}{interval:<17} n={self.n:<6}{self.asked}{verdict}"


def at_least(name: str, value: float, n: int, bound: float) -> Line:
    return Line(name, value, n, asked=f">= {bound}", met=value >= bound)


def at_most(name: str, value: float, n: int, bound: float) -> Line:
    return Line(name, value, n, asked=f"<= {bound}", met=value <= bound)


def share(name: str, hits: Tensor, bound: float) -> Line:
    """A share of images with its Wilson interval, which should be at least `bound`."""
    interval = wilson_interval(float(hits.sum()), hits.numel())
    return Line(name, *numbers(interval, hits.numel()), f">= {bound}", interval.estimate >= bound)


def numbers(interval: Interval, n: int) -> tuple[float, int, float, float]:
    """Value, n and interval, as the first fields of a `Line`."""
    return interval.estimate, n, interval.low, interval.high
