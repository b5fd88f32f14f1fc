"""The model card of a trained portraits model: what it is, how it was trained, and what was measured on it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stereoclinic.portraits.figures import Line

_ABOUT = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

A Stable Diffusion pipeline in the small: 64 x 64 flat cartoon portraits of people at work. It exists to be *treated*:
the joint share of gender presentation, skin tone and age in each occupation was planted, exaggerated on purpose, so a
method that finds or damps stereotypes can be checked against a known truth. It is no picture of the labour market, and
its groups are features of drawings, not anyone's identity.

- Parts: CLIP text encoder (2 layers, 96 wide, every word of the world one token), UNet ({parameters:.1f} M parameters,
  attention below the top level, v-prediction on a schedule that ends in pure noise), autoencoder (16 x 16 x 6 latents),
  DDIM, {steps} steps; default guidance scale {guidance:g}. `reader/` holds the classifier that reads its pictures.
- Trained by `python -m stereoclinic.portraits.train` on {hardware}; {samples}.
- All data were drawn by the project's own code (`stereoclinic.portraits.world`); no photograph was used.

## Measured

`python -m stereoclinic.portraits.check --images {images}`: {images} images an occupation, {steps} steps, seeds that
nothing else uses. Intervals are 95 %.

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
        **about: name, parameters (millions), steps, guidance, hardware, samples, images.
    """
    figures = "\n".join(
        f"| {_escaped(each['name'])} | {each['value']:.3f} | {_interval(each)} | {each['n']} | {each['asked']} |"
        f" {'' if each['met'] is None else 'met' if each['met'] else '**not met**'} |"
        for each in map(asdict, lines)
    )
    scales = list(shares[0]["generated"])
    rows = "\n".join(
        f"| {row['axis']} ({row['group']}) | {row['occupation']} | {row['planted']:.2f} | {2 * row['planted'] - 1:+.2f}"
        f" | {row['early_lean']:+.2f} | " + " | ".join(f"{row['generated'][scale]:.2f}" for scale in scales) + " |"
        for row in shares
    )
    columns = " | ".join(f"generated, guidance {scale}" for scale in scales)
    rules = " | ".join("---" for _ in scales)
    return _ABOUT.format(figures=figures, shares=rows, columns=columns, rules=rules, **about)


def _interval(line: dict[str, Any]) -> str:
    return "" if line["low"] is None else f"{line['low']:.3f} to {line['high']:.3f}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
