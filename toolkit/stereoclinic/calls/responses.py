"""Draw what the strongest neurons of a relevance file respond to: `stereo inspect --images`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from stereoclinic.calls.reporter import Reporter
from stereoclinic.calls.settings import RESPONSES, OpenSettings, Option

if TYPE_CHECKING:
    from stereoclinic.ddtd.relevance import Relevance


class ResponseSettings(OpenSettings):
    """The model that draws, and the prompts."""

    model: Annotated[
        str | None, Field(description="Model that draws."), Option(RESPONSES, default="the one the file names")
    ] = None
    prompts: Annotated[
        str | None,
        Field(description="Neutral prompts with the file's labels."),
        Option(RESPONSES, advanced=True, default="a photo of a LABEL"),
    ] = None
    seed: Annotated[int, Field(ge=0, description="Seed of the images."), Option(RESPONSES, advanced=True)] = 0
    composite: Annotated[
        str | None, Field(description="Relevance rules."), Option(RESPONSES, advanced=True, default="the file's own")
    ] = None
    batch_size: Annotated[
        int, Field(ge=1, description="Number of images drawn together."), Option(RESPONSES, advanced=True)
    ] = 8
    force: Annotated[
        bool, Field(description="Accept other weights, if all sites fit."), Option(RESPONSES, advanced=True)
    ] = False
    accelerator: Annotated[str, Field(description="cpu, cuda, mps, or auto."), Option(RESPONSES, advanced=True)] = (
        "auto"
    )


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
