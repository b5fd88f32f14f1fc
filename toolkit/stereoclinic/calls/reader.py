"""`check_reader`: how often a reader is right on labelled pictures. `stereo reader check` is this call."""

from collections.abc import Sequence
from pathlib import Path

from stereoclinic.calls import inputs
from stereoclinic.calls.reader_settings import CheckReaderSettings, OpenReaderSettings
from stereoclinic.calls.work import Reporter
from stereoclinic.evaluation.labelled import ReaderCheck, labelled_pictures, measure_reader
from stereoclinic.evaluation.readers import Reader, as_reader, group_columns, open_reader
from stereoclinic.prompts.axes import Axis, load_axis
from stereoclinic.runtime.devices import device_of


def check_reader(
    reader: str | Reader,
    folder: str | Path,
    axis: str | Axis = "gender",
    *,
    settings: CheckReaderSettings | None = None,
    reporter: Reporter | None = None,
) -> ReaderCheck:
    """Measure a reader on labelled pictures. This is `stereo reader check`.

    Args:
        reader: Its name, as `--reader` takes it, or your own. "portraits" is the one of the built-in model.
        folder: A folder for each label, or a metadata.csv or metadata.jsonl with `file_name` and a column of labels.
        axis: A name, a TOML file, or an axis.
        settings: Everything else; the defaults are those of the command.
        reporter: Gets notes and progress.

    Returns:
        Counts and figures; its `save` writes the file that `--confusion` takes.

    Raises:
        InputError: An argument is wrong, a picture cannot be read, or a group has no picture.
    """
    settings, reporter = settings or CheckReaderSettings(), reporter or Reporter()
    axis = axis if isinstance(axis, Axis) else load_axis(axis)
    pictures, left_out = labelled_pictures(folder, axis, settings.column)
    device = device_of(settings.accelerator)
    opened = named_reader(reader, settings, "portraits", [axis], device) if isinstance(reader, str) else reader
    group_columns(opened, axis)
    if left_out:
        labels = ", ".join(f"{label} ({count})" for label, count in sorted(left_out.items()))
        reporter.note(f"left out, for their labels show no group of axis {axis.name}: {labels}")
    with reporter.progress(len(pictures), f"reading {axis.name}") as advance:
        return measure_reader(as_reader(opened), axis, pictures, left_out, settings.batch_size, advance)


def named_reader(spec: str, settings: OpenReaderSettings, model: str, axes: Sequence[Axis], device: str) -> Reader:
    """The reader of a name.

    Args:
        spec: As `--reader` takes it.
        settings: How it is opened.
        model: The pipeline whose reader "portraits" is.
        axes: What it is to read; the first it must know.
        device: Where it runs, by torch's name.

    Raises:
        InputError: It cannot be opened, or cannot tell the first axis's groups apart.
    """
    own = None
    if "portraits" in [part.strip() for part in spec.removeprefix("ensemble:").split(",")]:
        advice = "give --reader clip, hf:MODEL, or the FOLDER of one that stereoclinic.portraits.train wrote"
        own = inputs.reader_folder(model, f"{advice} for its images")
    return open_reader(spec, axes, own, settings.reader_classes, settings.allow_race, settings.allow_code, device)
