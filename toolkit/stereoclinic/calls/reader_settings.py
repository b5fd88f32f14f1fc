"""Settings of readers: how one is opened, and of `check_reader` and `stereo reader check`."""

from stereoclinic.calls.settings import DEVICES, READ, PlaceSettings, Settings, option


class OpenReaderSettings(Settings):
    """How a reader is opened."""

    reader_classes: tuple[str, ...] = option(
        (), "For a reader hf:MODEL: group that each of its classes shows, or a .toml or .json file; may repeat.",
        READ, advanced=True, metavar="CLASS=GROUP,...", default_text="the axis file's",
    )  # fmt: skip
    allow_race: bool = option(False, "Let CLIP read race or skin tone; it is often wrong.", READ, advanced=True)
    allow_code: bool = option(False, "Run the code of a reader FILE.py:CLASS, with your rights.", READ, advanced=True)


class CheckReaderSettings(PlaceSettings, OpenReaderSettings):
    """How labelled pictures are read."""

    column: str | None = option(
        None, "Column of labels in metadata.csv or metadata.jsonl.",
        metavar="NAME", default_text="the axis's name, or label",
    )  # fmt: skip
    batch_size: int = option(50, "Number of pictures that are read together.", DEVICES, ge=1, advanced=True)
