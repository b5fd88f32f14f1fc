"""Settings of `evaluate`, and of `stereo bench`."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from stereoclinic.calls.settings import (
    DEVICES,
    DRAWN,
    MODEL,
    OTHERS,
    OUTPUT,
    READ,
    DeviceSettings,
    ModelSettings,
    Option,
    PromptSettings,
    Settings,
)
from stereoclinic.calls.texts import group_shares


class ReaderSettings(Settings):
    """How images are read and measured."""

    reader: Annotated[
        str | None,
        Field(
            description="Reader: portraits (the model's own), a folder, clip, clip:MODEL, hf:MODEL, ensemble:A,B or"
            " FILE.py:CLASS."
        ),
        Option(metavar="NAME", default="portraits"),
    ] = None
    reader_classes: Annotated[
        tuple[str, ...],
        Field(description="hf: which class shows which group, or a .toml or .json file of that; may repeat."),
        Option(READ, advanced=True, metavar="CLASS=GROUP,...", default="the axis file's"),
    ] = ()
    allow_race: Annotated[
        bool,
        Field(description="Let CLIP read race or skin tone, on which it is often wrong."),
        Option(READ, advanced=True),
    ] = False
    allow_code: Annotated[
        bool,
        Field(description="Run FILE.py of --reader; it can do whatever you can."),
        Option(READ, advanced=True),
    ] = False
    clip_score: Annotated[
        str | None,
        Field(description="Also measure the CLIPScore: clip, or another CLIP model, a hub id or a folder."),
        Option(READ, advanced=True, metavar="MODEL"),
    ] = None
    features: Annotated[
        str,
        Field(
            description="Feature extractor for FID and KID: reader (its own features) or inception (needs the extra"
            " `inception`)."
        ),
        Option(READ, advanced=True),
    ] = "reader"
    lpips: Annotated[
        bool,
        Field(description="Also measure LPIPS between images of the same seed; needs the extra `lpips`."),
        Option(READ, advanced=True),
    ] = False
    reference: Annotated[
        str | None,
        Field(
            description="Reference shares that the model may exaggerate: a CSV of label, group, share, or planted (the"
            " embedded model's own)."
        ),
        Option(READ, advanced=True, metavar="FILE"),
    ] = None
    confusion: Annotated[
        Path | None,
        Field(
            description="The reader's errors, a CSV of group, read, count; shares are then also reported without them."
        ),
        Option(READ, advanced=True, metavar="FILE"),
    ] = None


class EvaluateSettings(DeviceSettings, ReaderSettings, PromptSettings, ModelSettings):
    """What is drawn, how it is read, and where it is kept."""

    images: Annotated[
        int | None,
        Field(ge=2, description="Number of images per neutral prompt."),
        Option(default="25"),
    ] = None
    seed: Annotated[int, Field(ge=0, description="First judged seed."), Option()] = 5000
    guidance: Annotated[
        tuple[float, ...],
        Field(description="Guidance scale; may repeat."),
        Option(metavar="X", default="the model's own"),
    ] = ()
    group_images: Annotated[
        int,
        Field(ge=0, description="Number of images per prompt that names a group; 0 leaves these prompts out."),
        Option(DRAWN, advanced=True),
    ] = 4
    unrelated: Annotated[
        str | None,
        Field(
            description="Also draw prompts that have nothing to do with the axis, and measure how far they drift:"
            " scenes, or a .txt, .csv, .jsonl or .parquet file."
        ),
        Option(DRAWN, advanced=True, metavar="SET|FILE"),
    ] = None
    unrelated_images: Annotated[
        int, Field(ge=1, description="Number of images per unrelated prompt."), Option(DRAWN, advanced=True)
    ] = 4
    strength: Annotated[
        float, Field(ge=0, le=1, description="Strength of every mask."), Option(DRAWN, advanced=True)
    ] = 1.0
    shares: Annotated[
        tuple[dict[str, float], ...],
        BeforeValidator(group_shares),
        Field(description="Allocating masks: share of the images for each group, such as female=0.5,male=0.5."),
        Option(DRAWN, advanced=True, metavar="GROUP=SHARE,...", default="equal shares", texts=True),
    ] = ()
    protocol: Annotated[
        str | None,
        Field(
            description="Published protocol: time, sdisc, sdisc-successful, iti-gen, or a .toml file. It sets axis,"
            " prompts, images, reader and figure."
        ),
        Option(DRAWN, advanced=True, metavar="NAME"),
    ] = None
    baselines: Annotated[
        tuple[str, ...],
        Field(
            description="Also judge another method: prompt, conceptprune, uce, h-space, equisteer or icm; may repeat."
        ),
        Option(OTHERS, advanced=True, flags=("--baseline",), metavar="NAME"),
    ] = ()
    baseline_seed: Annotated[
        int, Field(ge=0, description="First seed that other methods are made on."), Option(OTHERS, advanced=True)
    ] = 100
    baseline_seeds: Annotated[
        int,
        Field(ge=1, description="Number of seeds per prompt that other methods are made on."),
        Option(OTHERS, advanced=True),
    ] = 4
    force: Annotated[
        bool,
        Field(description="Accept masks that were made for other weights, if all sites fit."),
        Option(MODEL, advanced=True),
    ] = False
    batch_size: Annotated[
        int,
        Field(ge=1, description="Number of images drawn together on one device; fewer where memory runs out."),
        Option(DEVICES, advanced=True),
    ] = 50
    parts: Annotated[
        Path | None,
        Field(
            description="Folder that keeps what was drawn, and other methods as they were made, for every bench of this"
            " model."
        ),
        Option(OUTPUT, advanced=True, metavar="FOLDER", default="OUT/bench-parts, until the results are written"),
    ] = None
    relevance: Annotated[
        Path | None,
        Field(description="Relevance that the mask was chosen from, for the lean curves of report.html."),
        Option(OUTPUT, advanced=True, metavar="FILE", default="NAME.relevance.safetensors next to the first mask"),
    ] = None
    tensorboard: Annotated[
        Path | None,
        Field(description="Folder for TensorBoard, every figure as a scalar; needs the extra `tensorboard`."),
        Option(OUTPUT, advanced=True, metavar="FOLDER"),
    ] = None
