"""Options that several commands have, and the panels that a command's help is laid out in.

What a first run needs stands in the unnamed panel, which comes first.
"""

from pathlib import Path
from typing import Annotated

import typer

from stereo_cli.common import BAD_INPUT, fail
from stereo_cli.config_file import read_config

MODEL, DEVICES, OUTPUT = "Model, prompts and sampler", "Devices", "Output"
CHOOSING = "Choosing from relevance"


def _whole_model(strategy: str) -> str:
    """Refuse before any work what a predict loop that draws would refuse after it."""
    if strategy.startswith("fsdp"):
        fail(
            f"--strategy {strategy}: only locate shares weights out; draw with ddp, and --dtype bfloat16 if need be",
            BAD_INPUT,
        )
    return strategy


Model = Annotated[
    str,
    typer.Option(
        help="`portraits`, a diffusers folder, a .safetensors or .ckpt checkpoint, or a hub id.", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    str, typer.Option(help="Precision of the model's weights: float32, bfloat16, float16.", rich_help_panel=MODEL)
]
Variant = Annotated[
    str | None,
    typer.Option(help="Variant of the model's weight files, such as fp16.", show_default=False, rich_help_panel=MODEL),
]
Call = Annotated[
    list[str] | None,
    typer.Option(
        "--call",
        metavar="KEY=VALUE",
        help="Option of the pipeline's own call, such as true_cfg_scale=4; may repeat.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Height = Annotated[
    int | None,
    typer.Option(
        min=1, help="Height of the pictures, in pixels.", show_default="the pipeline's own", rich_help_panel=MODEL
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        min=1, help="Width of the pictures, in pixels.", show_default="the pipeline's own", rich_help_panel=MODEL
    ),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        metavar="PATTERN",
        help="Module path of layers to watch in place of the built-in table, such as 'blocks.*.proj_out'; may repeat.",
        show_default=False,
        rich_help_panel=MODEL,
    ),
]
Mu = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="plan: the price of moving the prediction off the axis; a higher one damps less.",
        show_default="1.0",
        rich_help_panel=CHOOSING,
    ),
]
Overshoot = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="plan: overshoot, remove this fraction more than the measured lean; later steps restore part of it.",
        show_default="0.0",
        rich_help_panel=CHOOSING,
    ),
]
Top = Annotated[
    float | None,
    typer.Option(
        min=0, help="top-k: how many neurons (a share when below 1).", show_default="0.01", rich_help_panel=CHOOSING
    ),
]
AxisName = Annotated[str, typer.Option("--axis", help="Axis of bias: gender, skin, age, or your own TOML file.")]
Prompts = Annotated[
    str,
    typer.Option(
        help="Neutral prompts: `portraits`, `winobias`, `winobias-successful`, `winobias-train` (occupations that"
        " winobias does not judge), `protocol:NAME` (what bench --protocol NAME does not judge), a"
        " .txt/.csv/.jsonl/.parquet file or a hub data set (its column `prompt`, or `occupation`).",
        rich_help_panel=MODEL,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N prompts.", rich_help_panel=MODEL)]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Sampler steps.", show_default="the model's own", rich_help_panel=MODEL)
]
Shares = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GROUP=SHARE,...",
        help="Allocating masks: share of the images for each group, such as female=0.5,male=0.5; once per axis.",
        show_default="equal shares",
    ),
]
Devices = Annotated[int, typer.Option(min=1, help="Devices, or processes on a CPU.", rich_help_panel=DEVICES)]
NumNodes = Annotated[int, typer.Option(min=1, help="Machines.", rich_help_panel=DEVICES)]
Strategy = Annotated[
    str,
    typer.Option(
        help="Lightning's strategy; auto is ddp on more than one device.",
        callback=_whole_model,
        rich_help_panel=DEVICES,
    ),
]
SharingStrategy = Annotated[
    str,
    typer.Option(
        help="auto, ddp: each device holds the whole model; auto is ddp on more than one. fsdp: each holds a share of"
        " the denoiser's weights, which are gathered one block at a time: for a denoiser that does not fit one device.",
        rich_help_panel=DEVICES,
    ),
]
Accelerator = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.", rich_help_panel=DEVICES)]
Precision = Annotated[str, typer.Option(help="Lightning's name: 32-true, bf16-mixed, ...", rich_help_panel=DEVICES)]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Accept files made for other weights, such as those of a few-step sibling, if all sites fit."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout instead of tables.", rich_help_panel=OUTPUT)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.", rich_help_panel=OUTPUT)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, say what would be done, and stop.", rich_help_panel=OUTPUT)
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of options; flags on the command line win.",
        callback=read_config,
        is_eager=True,
        rich_help_panel=OUTPUT,
    ),
]


def shares_from(given: list[str] | None) -> list[dict[str, float]]:
    """What --shares says: one mapping of group to share for each time it is given.

    Raises:
        InputError: It is not of the form GROUP=SHARE,GROUP=SHARE.
    """
    from stereoclinic.errors import InputError

    found = []
    for text in given or []:
        shares: dict[str, float] = {}
        for part in text.split(","):
            group, _, value = part.partition("=")
            try:
                share = float(value)
            except ValueError:
                raise InputError(f"--shares {text!r}: expected GROUP=SHARE, such as female=0.5,male=0.5") from None
            if group.strip() in shares:
                raise InputError(f"--shares {text!r}: {group.strip()} is given twice")
            shares[group.strip()] = share
        found.append(shares)
    return found
