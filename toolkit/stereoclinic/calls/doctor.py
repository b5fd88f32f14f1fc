"""`doctor`: say whether a model is supported, and what `locate`, `plan` and `evaluate` would cost on it."""

from typing import TYPE_CHECKING

from stereoclinic.calls.settings import DURATION, MODEL, ModelSettings, PromptSettings, SiteSettings, option
from stereoclinic.calls.work import Reporter

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline

    from stereoclinic.calls.diagnosis import Diagnosis
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis


class DoctorSettings(SiteSettings, PromptSettings, ModelSettings):
    """What is checked, and the workload that times are estimated for."""

    composite: str = option("epsilon-cp", "Relevance rules to check; `stereo locate --help-all` lists them.")
    faithfulness: bool = option(
        False, "Also rank all composites by how well they forecast what silencing neurons does."
    )
    seed: int = option(0, "Seed of the noise.", ge=0, advanced=True)
    batch_size: int = option(1, "Number of samples in the batch.", ge=1, advanced=True)
    guidance: float | None = option(None, "Guidance scale.", MODEL, ge=0, default_text="the model's own")
    seeds: int | None = option(
        None, "Estimate locate and plan for N seeds per prompt.", DURATION, ge=1, default_text="their own"
    )
    images: int | None = option(
        None, "Estimate bench for N images per neutral prompt.", DURATION, ge=2, default_text="its own"
    )
    accelerator: str = option("auto", "Type of device: cpu, cuda, mps or auto.", MODEL, advanced=True)


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
    network, or enters behind it (time, text, biases), must add up to the size of the prediction. With
    `DoctorSettings(faithfulness=True)` the composites are ranked too; how long that takes is said before.

    Args:
        model: `portraits`, a diffusers folder, a checkpoint, a hub id; or an open pipeline, which stays where it is.
        settings: Everything else; the defaults are those of the command.
        axis: Axis of bias, for the estimated time and the ranking.
        prompts: Neutral prompts, as `locate` takes them.
        reporter: Gets notes and progress.

    Raises:
        InputError: An argument is wrong or does not fit the model; the message says what to do.
    """
    from stereoclinic.calls.diagnosis import diagnose

    return diagnose(model, settings or DoctorSettings(), axis, prompts, reporter or Reporter())
