"""Settings of `evaluate`, and of `stereo bench`."""

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from stereoclinic.calls.settings import (
    DEVICES,
    DRAWN,
    MODEL,
    OTHERS,
    OUTPUT,
    READ,
    DeviceSettings,
    ModelSettings,
    PromptSettings,
    Settings,
    group_shares,
    option,
)


class ReaderSettings(Settings):
    """How images are read and measured."""

    reader: str | None = option(
        None, "Reader: portraits (the model's own), a folder, clip, clip:MODEL, hf:MODEL, ensemble:A,B or"
        " FILE.py:CLASS.",
        metavar="NAME", default_text="portraits",
    )  # fmt: skip
    reader_classes: tuple[str, ...] = option(
        (), "hf: which class shows which group, or a .toml or .json file of that; may repeat.",
        READ, advanced=True, metavar="CLASS=GROUP,...", default_text="the axis file's",
    )  # fmt: skip
    allow_race: bool = option(
        False, "Let CLIP read race or skin tone, on which it is often wrong.", READ, advanced=True
    )
    allow_code: bool = option(False, "Run FILE.py of --reader; it can do whatever you can.", READ, advanced=True)
    clip_score: str | None = option(
        None, "Also measure the CLIPScore: clip, or another CLIP model, a hub id or a folder.",
        READ, advanced=True, metavar="MODEL",
    )  # fmt: skip
    features: str = option(
        "reader", "Feature extractor for FID and KID: reader (its own features) or inception (needs the extra"
        " `inception`).",
        READ, advanced=True,
    )  # fmt: skip
    lpips: bool = option(
        False, "Also measure LPIPS between images of the same seed; needs the extra `lpips`.", READ, advanced=True
    )
    figures: str = option(
        "default", "Figures to compute and print: default, all, or names separated by commas, such as sdtv,kl or soft.",
        READ, advanced=True, metavar="NAMES",
    )  # fmt: skip
    reference: str | None = option(
        None, "Reference shares that the model may exaggerate: a CSV of label, group, share, or planted (the embedded"
        " model's own).",
        READ, advanced=True, metavar="FILE",
    )  # fmt: skip
    confusion: Path | None = option(
        None, "The reader's errors, a CSV of group, read, count; shares are then also reported without them.",
        READ, advanced=True, metavar="FILE",
    )  # fmt: skip


class EvaluateSettings(DeviceSettings, ReaderSettings, PromptSettings, ModelSettings):
    """What is drawn, how it is read, and where it is kept."""

    images: int | None = option(None, "Number of images per neutral prompt.", ge=2, default_text="25")
    seed: int = option(5000, "First judged seed.", ge=0)
    guidance: tuple[float, ...] = option((), "Guidance scale; may repeat.", metavar="X", default_text="the model's own")
    group_images: int = option(
        4, "Number of images per prompt that names a group; 0 leaves these prompts out.", DRAWN, ge=0, advanced=True
    )
    unrelated: str | None = option(
        None, "Also draw prompts that have nothing to do with the axis, and measure how far they drift: scenes, or a"
        " .txt, .csv, .jsonl or .parquet file.",
        DRAWN, advanced=True, metavar="SET|FILE",
    )  # fmt: skip
    unrelated_images: int = option(4, "Number of images per unrelated prompt.", DRAWN, ge=1, advanced=True)
    strength: float = option(1.0, "Strength of every mask.", DRAWN, ge=0, le=1, advanced=True)
    shares: Annotated[tuple[dict[str, float], ...], BeforeValidator(group_shares)] = option(
        (), "Allocating masks: share of the images for each group, such as female=0.5,male=0.5.",
        DRAWN, advanced=True, metavar="GROUP=SHARE,...", default_text="equal shares", texts=True,
    )  # fmt: skip
    protocol: str | None = option(
        None, "Published protocol: time, sdisc, sdisc-successful, iti-gen, or a .toml file. It sets axis, prompts,"
        " images, reader and figure.",
        DRAWN, advanced=True, metavar="NAME",
    )  # fmt: skip
    baselines: tuple[str, ...] = option(
        (), "Also judge another method: prompt, conceptprune, uce, h-space, equisteer or icm; may repeat.",
        OTHERS, advanced=True, flags=("--baseline",), metavar="NAME",
    )  # fmt: skip
    baseline_seed: int = option(100, "First seed that other methods are made on.", OTHERS, ge=0, advanced=True)
    baseline_seeds: int = option(
        4, "Number of seeds per prompt that other methods are made on.", OTHERS, ge=1, advanced=True
    )
    force: bool = option(
        False, "Accept masks that were made for other weights, if all sites fit.", MODEL, advanced=True
    )
    batch_size: int = option(
        50, "Number of images drawn together on one device; fewer where memory runs out.", DEVICES, ge=1, advanced=True
    )
    parts: Path | None = option(
        None, "Folder that keeps what was drawn, and other methods as they were made, for every bench of this model.",
        OUTPUT, advanced=True, metavar="FOLDER", default_text="OUT/bench-parts, until the results are written",
    )  # fmt: skip
    relevance: Path | None = option(
        None, "Relevance that the mask was chosen from, for the lean curves of report.html.",
        OUTPUT, advanced=True, metavar="FILE", default_text="NAME.relevance.safetensors next to the first mask",
    )  # fmt: skip
    tensorboard: Path | None = option(
        None, "Folder for TensorBoard, every figure as a scalar; needs the extra `tensorboard`.",
        OUTPUT, advanced=True, metavar="FOLDER",
    )  # fmt: skip
