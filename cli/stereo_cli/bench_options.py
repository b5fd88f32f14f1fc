"""Options of `stereo bench` alone: how pictures are read and measured, and other methods beside the masks."""

from pathlib import Path
from typing import Annotated

import typer

_READ, _OTHERS = "How it is read", "Other methods"
ReaderName = Annotated[
    str | None,
    typer.Option(
        help="What tells the groups apart: portraits (the reader in the model's folder) or a folder of one, clip,"
        " clip:MODEL, hf:MODEL (an image classifier), ensemble:A,B, or FILE.py:CLASS of your own.",
        show_default="portraits, or the protocol's",
        rich_help_panel=_READ,
    ),
]
ReaderClasses = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CLASS=GROUP,...",
        help="hf: which class shows which group, or a .toml or .json file of that; may repeat.",
        show_default="the axis file's",
        rich_help_panel=_READ,
    ),
]
AllowRace = Annotated[
    bool,
    typer.Option(
        "--allow-race", help="Let CLIP read race or skin tone, on which it is often wrong.", rich_help_panel=_READ
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Run FILE.py of --reader; it can do whatever you can.", rich_help_panel=_READ),
]
ClipScore = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Also give the CLIPScore of every arm: clip, or another CLIP model, a hub id or a folder.",
        show_default=False,
        rich_help_panel=_READ,
    ),
]
Features = Annotated[
    str,
    typer.Option(
        help="Feature extractor for FID and KID: reader (its own features) or inception (as others report them; needs"
        " the extra `inception`).",
        rich_help_panel=_READ,
    ),
]
Lpips = Annotated[
    bool,
    typer.Option(
        "--lpips",
        help="Also give LPIPS between pictures of the same seed; needs the extra `lpips`.",
        rich_help_panel=_READ,
    ),
]
Figures = Annotated[
    str,
    typer.Option(
        metavar="default|all|NAMES",
        help="Figures to compute and print: default, all, or names with commas between them, such as sdtv,kl or soft.",
        rich_help_panel=_READ,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="What shares should reflect, to say how far they exaggerate it: a CSV of label, group, share (labour"
        " statistics, say), or planted, the embedded model's own table.",
        show_default=False,
        rich_help_panel=_READ,
    ),
]
Confusion = Annotated[
    Path | None,
    typer.Option(
        help="How often the reader is wrong, a CSV of group, read, count: pictures whose group is known, as it read"
        " them. Shares are then also given without its error.",
        show_default=False,
        rich_help_panel=_READ,
    ),
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline",
        help="Another method to judge beside the masks: prompt, conceptprune, uce, h-space, equisteer, icm; may"
        " repeat. Most are first made on seeds of their own, which takes minutes, once, on one device.",
        show_default=False,
        rich_help_panel=_OTHERS,
    ),
]
BaselineSeed = Annotated[
    int, typer.Option(min=0, help="--baseline: first seed to make it on.", rich_help_panel=_OTHERS)
]
BaselineSeeds = Annotated[
    int, typer.Option(min=1, help="--baseline: number of seeds per prompt.", rich_help_panel=_OTHERS)
]
