"""Settings of `evaluate`, and of `stereo bench`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from stereoclinic.calls.reader_settings import OpenReaderSettings
from stereoclinic.calls.settings import (
    DEVICES,
    DRAWN,
    MODEL,
    OTHERS,
    OUTPUT,
    READ,
    DeviceSettings,
    LoggerSettings,
    ModelSettings,
    PromptSettings,
    group_shares,
    option,
)
from stereoclinic.evaluation.methods import BASELINES
from stereoclinic.evaluation.reader_kinds import KINDS


def _one_of(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"


class ReaderSettings(OpenReaderSettings):
    """How images are read and measured."""

    reader: str | None = option(
        None, f"Classifier of the images: {_one_of(KINDS)}.", metavar="NAME", default_text="portraits"
    )
    clip_score: str | None = option(
        None, "Also measure CLIPScore with this model: clip, a hub id or a folder.",
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
        "default", "Figures to compute and print: default, all, or names with commas, such as sdtv,kl.",
        READ, advanced=True, metavar="NAMES",
    )  # fmt: skip
    reference: str | None = option(
        None, "Shares to compare with: a CSV with columns label, group, share; or planted (training data of the"
        " embedded model).",
        READ, advanced=True, metavar="FILE",
    )  # fmt: skip
    confusion: Path | None = option(
        None, "Correct shares for errors of the reader: a CSV with columns group, read, count.",
        READ, advanced=True, metavar="FILE",
    )  # fmt: skip


class EvaluateSettings(LoggerSettings, DeviceSettings, ReaderSettings, PromptSettings, ModelSettings):
    """What is drawn, how it is read, and where it is kept."""

    images: int | None = option(None, "Number of images per neutral prompt.", ge=2, default_text="25")
    seed: int = option(5000, "First seed of the images.", ge=0)
    guidance: tuple[float, ...] = option((), "Guidance scale; may repeat.", metavar="X", default_text="the model's own")
    group_images: int = option(
        4, "Number of images per prompt that names a group; 0 skips these prompts.", DRAWN, ge=0, advanced=True
    )
    unrelated: str | None = option(
        None, "Also draw prompts unrelated to the axis, and measure how far they move: scenes, or a .txt, .csv, .jsonl"
        " or .parquet file.",
        DRAWN, advanced=True, metavar="SET|FILE",
    )  # fmt: skip
    unrelated_images: int = option(4, "Number of images per unrelated prompt.", DRAWN, ge=1, advanced=True)
    strength: float = option(1.0, "Strength of every mask, from 0 (no damping) to 1.", DRAWN, ge=0, le=1, advanced=True)
    shares: Annotated[tuple[dict[str, float], ...], BeforeValidator(group_shares)] = option(
        (), "Target share of images for each group, such as female=0.5,male=0.5; for allocating masks.",
        DRAWN, advanced=True, metavar="GROUP=SHARE,...", default_text="equal shares", texts=True,
    )  # fmt: skip
    protocol: str | None = option(
        None, "Published protocol, which sets axis, prompts, images, reader and figure: time, sdisc,"
        " sdisc-successful, iti-gen, or a .toml file.",
        DRAWN, advanced=True, metavar="NAME",
    )  # fmt: skip
    all_arms: bool = option(
        False, "Also draw the balanced oracle (no lean), and the untreated model on other seeds.", DRAWN, advanced=True
    )
    baselines: tuple[str, ...] = option(
        (), f"Also measure another method: {_one_of(BASELINES)}; may repeat.",
        OTHERS, advanced=True, flags=("--baseline",), metavar="NAME",
    )  # fmt: skip
    baseline_seed: int = option(100, "First seed to make other methods on.", OTHERS, ge=0, advanced=True)
    baseline_seeds: int = option(4, "Number of seeds per prompt to make other methods on.", OTHERS, ge=1, advanced=True)
    force: bool = option(False, "Accept masks made for other weights if all layers fit.", MODEL, advanced=True)
    batch_size: int = option(
        50, "Number of images in a batch on each device; fewer if memory runs out.", DEVICES, ge=1, advanced=True
    )
    parts: Path | None = option(
        None, "Folder to keep images and other methods in, for later benches of this model.",
        OUTPUT, advanced=True, metavar="FOLDER", default_text="OUT/bench-parts, removed at the end",
    )  # fmt: skip
    relevance: Path | None = option(
        None, "Relevance file of the mask, for the lean curves in report.html.",
        OUTPUT, advanced=True, metavar="FILE", default_text="the file next to the first mask",
    )  # fmt: skip
