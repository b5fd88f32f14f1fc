"""The dose of a mask: found from leans, then confirmed by a few images."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stereoclinic.calls.settings import DOSE, Settings, option
from stereoclinic.calls.work import Reporter
from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.evaluation.arms import Protocol
    from stereoclinic.evaluation.readers import Reader
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.sns.mask import NeuronMask


class DoseSettings(Settings):
    """How far a mask is weakened."""

    dose: float | None = option(
        None, "Weaken the mask as far as the mean |lean - target| stays below this value on new seeds, such as 0.3.",
        DOSE, ge=0, advanced=True,
    )  # fmt: skip
    confirm: int | None = option(
        None, "With --dose: number of images per prompt, without and with the mask, to confirm the dose; 0 for none.",
        DOSE, ge=0, advanced=True, default_text="4, or 0 if the model has no reader",
    )  # fmt: skip

    def check_confirm(self) -> None:
        """Refuse a `confirm` that has nothing to confirm, or draws too few images for it."""
        if self.dose is None and self.confirm is not None:
            raise InputError("--confirm: give --dose BOUND, which the images confirm")
        if self.confirm == 1:
            raise InputError("--confirm 1: an interval needs at least 2 images per prompt; 0 draws none")

    def confirming(self, model: "str | Model | Any", axis: "Axis") -> "tuple[int, Reader | None]":
        """Number of images per prompt that confirm the dose, and their reader; asked for before any work is done.

        Raises:
            InputError: The model brings no reader, or one that does not know the axis.
        """
        from stereoclinic.calls.inputs import name_of, reader_folder
        from stereoclinic.evaluation.readers import PortraitsReader, group_columns
        from stereoclinic.pipelines import model_folder

        images = self.confirm
        if self.dose is None:
            return 0, None
        name = name_of(model)
        if images is None:
            folder = model_folder(name)
            images = 4 if folder is not None and (folder / "reader").is_dir() else 0
        if not images:
            return 0, None
        reader = PortraitsReader(reader_folder(name, "give --confirm 0 to dose by leans alone"))
        group_columns(reader, axis)
        return images, reader


def give_dose(
    mask: "NeuronMask",
    model: "Model",
    axis: "Axis",
    prompts: "Dataset",
    bound: float,
    confirmed_by: "tuple[int, Reader | None]",
    seeds: range,
    guidance: float,
    batch_size: int,
    device: str,
    force: bool,
    reporter: Reporter,
) -> "tuple[NeuronMask, dict[str, Any]]":
    """The mask at its dose, and what was found as plain data.

    Args:
        mask: The mask.
        model: The pipeline.
        axis: Of the lean.
        prompts: Neutral prompts.
        bound: Of mean |lean - target|.
        confirmed_by: Images per prompt that confirm the dose, and their reader.
        seeds: To dose on; the images that confirm have the seeds that follow.
        guidance: Scale that the mask will be used at.
        batch_size: Samples that are run together.
        device: Of the images.
        force: Accept a mask of other weights.
        reporter: Gets progress and warnings.

    Raises:
        InputError: No strength meets the bound, or the mask does not fit.
    """
    from stereoclinic.evaluation.arms import Protocol
    from stereoclinic.prompts.sets import with_seeds
    from stereoclinic.sns.dose import dosed, find_dose

    images, reader = confirmed_by
    steps = model.defaults.steps
    samples = with_seeds(prompts, seeds.start, len(seeds))
    with reporter.progress(7, "dosing") as advance:
        found = find_dose(
            model, axis, samples, mask, bound, steps, guidance, batch_size=batch_size, force=force,
            progress=lambda strength, left: advance(1, f"strength {strength:.2f} leaves {left:.2f}"),
        )  # fmt: skip
    made = dosed(mask, found, bound, samples)
    if reader is None:
        return made, {**vars(found), "confirmed": None}
    protocol = Protocol(axis, prompts, images, 0, seeds.stop, steps, guidance, batch_size)
    seen = _confirmed(made, model, reader, protocol, device, force, reporter)
    dose = {**made.metadata["dose"], "confirmed": seen, "seeds": [seeds.start, seeds.stop + images - 1]}
    made = replace(made, metadata={**made.metadata, "dose": dose})
    return made, {**vars(found), "confirmed": seen}


def _confirmed(
    mask: "NeuronMask",
    model: "Model",
    reader: "Reader",
    protocol: "Protocol",
    device: str,
    force: bool,
    reporter: Reporter,
) -> dict[str, Any]:
    """What images without and with the mask show, as plain data."""
    from stereoclinic.evaluation.confirm import confirm
    from stereoclinic.runtime.devices import hush_lightning

    hush_lightning()
    with reporter.progress(2 * protocol.images * len(protocol.prompts), "confirming") as advance:
        seen = confirm(
            model, reader, protocol, mask, lambda arm, count: advance(count, arm), reporter.warn, force,
            accelerator=device, devices=1,
        )  # fmt: skip
    return seen.plain()
