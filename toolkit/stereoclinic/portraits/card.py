"""The model card of a trained portraits model: what it is, how it was trained, and its figures with their bounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stereoclinic.statistics.intervals import Interval, wilson_interval


@dataclass(frozen=True)
class Line:
    """One figure and its bound; `met` is None if there is no bound."""

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

    @property
    def row(self) -> str:
        """A row of the card's table."""
        name = self.name.replace("|", "\\|")
        interval = "" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"
        met = "" if self.met is None else "met" if self.met else "**not met**"
        return f"| {name} | {self.value:.3f} | {interval} | {self.n} | {self.asked} | {met} |"


def at_least(name: str, value: float, n: int, bound: float) -> Line:
    """A figure that should be at least `bound`."""
    return Line(name, value, n, asked=f">= {bound}", met=value >= bound)


def at_most(name: str, value: float, n: int, bound: float) -> Line:
    """A figure that should be at most `bound`."""
    return Line(name, value, n, asked=f"<= {bound}", met=value <= bound)


def with_interval(name: str, interval: Interval, n: int, asked: str = "", met: bool | None = None) -> Line:
    """A figure with its interval."""
    return Line(name, interval.estimate, n, interval.low, interval.high, asked, met)


def share(name: str, hits: Tensor, bound: float) -> Line:
    """A share of images with its Wilson interval, which should be at least `bound`."""
    interval = wilson_interval(float(hits.sum()), hits.numel())
    return with_interval(name, interval, hits.numel(), f">= {bound}", interval.estimate >= bound)


_ABOUT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

{family} in the small: 64 x 64 flat cartoon portraits of people at work. It exists to be *treated*:
the joint share of gender presentation, skin tone and age in each occupation was planted, exaggerated on purpose, so a
method that finds or damps stereotypes can be checked against a known truth. It is no picture of the labour market, and
its groups are features of drawings, not anyone's identity.

- Parts: CLIP text encoder ({layers} layers, 96 wide, every word of the world one token), {denoiser} of
  {parameters:.1f} M parameters ({details}), autoencoder (16 x 16 x 6 latents).
  `reader/` holds the classifier that reads its pictures.
- Defaults: {steps} steps, guidance scale {guidance:g}{call}.
- Trained by `python -m stereoclinic.portraits.train --denoiser {kind}` on {hardware}; {samples}.
- All data were drawn by the project's own code (`stereoclinic.portraits.world`); no photograph was used.

## Measured

`python -m stereoclinic.portraits.check --model {name} --images {images}`: {images} images an occupation, {steps} steps,
seeds from {first_seed} on, which nothing else uses. Intervals are 95 %.

| figure | value | interval | n | asked | |
| --- | --- | --- | --- | --- | --- |
{figures}

## Planted against generated shares

Share of the first group of each axis. The lean is the mean over the first third of the steps; the planted tilt is
2 p - 1.

| axis | occupation | planted | planted tilt | early lean | {columns} |
| --- | --- | --- | --- | --- | {rules} |
{shares}
"""


def card(lines: Sequence[Line], shares: Sequence[dict[str, Any]], **about: object) -> str:
    """Markdown of the card.

    Args:
        lines: The figures of `check`.
        shares: Its table of planted and generated shares.
        **about: name, what `Denoiser.about` says, parameters (millions), steps, guidance, call, kind of
            denoiser, hardware, samples, images, first_seed.
    """
    figures = "\n".join(line.row for line in lines)
    scales = list(shares[0]["generated"])
    rows = "\n".join(
        f"| {row['axis']} ({row['group']}) | {row['occupation']} | {row['planted']:.2f} | {2 * row['planted'] - 1:+.2f}"
        f" | {row['early_lean']:+.2f} | " + " | ".join(f"{row['generated'][scale]:.2f}" for scale in scales) + " |"
        for row in shares
    )
    columns = " | ".join(f"generated, guidance {scale}" for scale in scales)
    rules = " | ".join("---" for _ in scales)
    return _ABOUT.format(figures=figures, shares=rows, columns=columns, rules=rules, **about)
