"""Draw what the strongest neurons of a relevance file respond to: `stereo inspect --images`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stereoclinic.calls.settings import RESPONSES, OpenSettings, option
from stereoclinic.calls.work import Reporter

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance


class ResponseSettings(OpenSettings):
    """The model that draws, and the prompts."""

    model: str | None = option(None, "Model to draw the images with.", RESPONSES, default_text="the one the file names")
    prompts: str | None = option(
        None, "Prompts to draw; they need labels of the file.",
        RESPONSES, advanced=True, default_text="a photo of a LABEL",
    )  # fmt: skip
    seed: int = option(0, "Seed of the first image.", RESPONSES, ge=0, advanced=True)
    composite: str | None = option(
        None, "Relevance rules; `stereo locate --help-all` lists them.",
        RESPONSES, advanced=True, default_text="the file's own",
    )  # fmt: skip
    batch_size: int = option(8, "Number of images in a batch.", RESPONSES, ge=1, advanced=True)
    force: bool = option(False, "Accept other weights if all layers fit.", RESPONSES, advanced=True)
    accelerator: str = option("auto", "Type of device: cpu, cuda, mps or auto.", RESPONSES, advanced=True)


def draw_responses(
    relevance: "Relevance",
    file: Path,
    neurons: list[dict[str, Any]],
    folder: Path,
    settings: ResponseSettings,
    reporter: Reporter,
) -> Path:
    """Draw images of the prompts that neurons matter most in, with the neurons' relevance over them.

    Args:
        relevance: What was located.
        file: Its file.
        neurons: Rows of `report.located.relevance_summary`.
        folder: Where the sheet and the images are written.
        settings: The model that draws, and the prompts.
        reporter: Gets notes, warnings and progress.

    Returns:
        The sheet.

    Raises:
        InputError: The file does not name its model, nothing was measured, or the model does not fit.
    """
    from stereoclinic.calls.inputs import call_of, neutral_prompts
    from stereoclinic.calls.work import claimed
    from stereoclinic.errors import InputError
    from stereoclinic.pipelines import open_model
    from stereoclinic.prompts.sets import occupation_prompts
    from stereoclinic.report import responses
    from stereoclinic.runtime.devices import device_of
    from stereoclinic.sns.compat import check_fits

    call, name = call_of(settings, relevance.metadata), settings.model or relevance.metadata.get("model")
    responses.check_folder(folder)
    if not name:
        raise InputError(f"--images: {file} does not name its model; give --model")
    if not neurons:
        raise InputError(f"--images: nothing was measured in {file}")
    walk = responses.settings_of(relevance, settings.composite)
    prompts = neutral_prompts(settings.prompts, None) if settings.prompts else occupation_prompts(relevance.labels)
    rows = responses.samples(prompts, neurons, relevance.groups[0], settings.seed)
    with claimed(reporter, folder.resolve()):
        model = open_model(name, device_of(settings.accelerator), settings.dtype, settings.variant, call, reporter.note)
        check_fits(relevance, model.network, settings.force)
        with reporter.progress(len(rows) * len(walk.timesteps(model)), "drawing") as advance:
            found = responses.respond(
                model, relevance, neurons, rows, walk, settings.batch_size, warn=reporter.warn, progress=advance
            )
        about = {
            "relevance": str(file),
            "model": model.name,
            "call": model.call,
            "axis": relevance.metadata.get("axis"),
            **{name: getattr(walk, name) for name in ("composite", "root", "target", "steps", "every", "guidance")},
        }
        responses.write_responses(folder, found, relevance.groups, about)
    return folder / responses.SHEET
