"""`doctor`: say whether a model is supported, and what `locate`, `plan` and `evaluate` would cost on it."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stereoclinic.calls.reporter import Reporter
from stereoclinic.calls.settings import DURATION, MODEL, ModelSettings, Option, PromptSettings, SiteSettings

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline

    from stereoclinic.calls.diagnosis import Diagnosis
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis


class DoctorSettings(SiteSettings, PromptSettings, ModelSettings):
    """What is checked, and the workload that times are estimated for."""

    composite: Annotated[str, Field(description="Relevance rules to check, see locate."), Option()] = "epsilon-cp"
    seed: Annotated[int, Field(ge=0, description="Seed of the noise."), Option(advanced=True)] = 0
    batch_size: Annotated[int, Field(ge=1, description="Number of samples in the pass."), Option(advanced=True)] = 1
    guidance: Annotated[
        float | None, Field(ge=0, description="Guidance scale."), Option(MODEL, default="the model's own")
    ] = None
    seeds: Annotated[int, Field(ge=1, description="Number of seeds per prompt of locate."), Option(DURATION)] = 16
    images: Annotated[
        int, Field(ge=1, description="Number of images per neutral prompt of a bench."), Option(DURATION)
    ] = 25
    accelerator: Annotated[str, Field(description="cpu, cuda, mps, or auto."), Option(MODEL, advanced=True)] = "auto"


def doctor(
    model: "str | Model | DiffusionPipeline" = "portraits",
    settings: DoctorSettings | None = None,
    *,
    axis: "str | Axis" = "gender",
    prompts: "str | Dataset" = "portraits",
    reporter: Reporter | None = None,
) -> "Diagnosis":
    """Say whether a model is supported: its denoiser and neurons, how it is called, rules, conservation, memory, time.

    One prediction, for noise at the noisiest timestep, is decomposed. The relevance that crosses a cut through the
    network, or enters behind it (time, text, biases), must add up to the size of the prediction.

    Args:
        model: `portraits`, a diffusers folder, a checkpoint, a hub id; or an open pipeline, which stays where it is.
        settings: Everything else; the defaults are those of the command.
        axis: Axis of bias, for the estimated time.
        prompts: Neutral prompts, as `locate` takes them.
        reporter: Gets notes.

    Raises:
        InputError: An argument is wrong or does not fit the model; the message says what to do.
    """
    from stereoclinic.calls.diagnosis import diagnose

    return diagnose(model, settings or DoctorSettings(), axis, prompts, reporter or Reporter())
