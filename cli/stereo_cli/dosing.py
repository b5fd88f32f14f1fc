"""What `stereo plan --dose` and `stereo mask --dose` share: the dose from leans, then a few images to confirm it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stereo_cli import common
from stereo_cli.progress import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset

    from stereoclinic.evaluation.readers import Reader
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.sns.mask import NeuronMask

Bound = Annotated[
    float | None,
    typer.Option(
        "--dose",
        min=0,
        help="Weaken the mask to the smallest strength that keeps mean |lean - target| under this, on further seeds.",
        show_default=False,
    ),
]
Confirm = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="--dose: then draw this many images per prompt, on further seeds, without and with the mask; 0 for none.",
        show_default="4, where the model brings a reader",
    ),
]


@dataclass(frozen=True)
class Dosing:
    """How a mask is dosed.

    Args:
        bound: Of mean |lean - target|.
        first: First seed to dose on; those that confirm follow the last of them.
        seeds: Seeds a prompt to dose on.
        images: Images a prompt that confirm; 0 for none.
        reader: What reads them; None for none.
        steps: Of the scheduler.
        guidance: As it will be used.
        batch_size: Samples through the model together.
    """

    bound: float
    first: int
    seeds: int
    images: int
    reader: "Reader | None"
    steps: int
    guidance: float
    batch_size: int


def check_confirm(dose: float | None, images: int | None) -> None:
    """Raises InputError where --confirm has nothing to confirm, or draws too few images for it."""
    from stereoclinic.errors import InputError

    if dose is None and images is not None:
        raise InputError("--confirm: give --dose BOUND, which is what images confirm")
    if images == 1:
        raise InputError("--confirm 1: an interval needs 2 images a prompt or more; 0 draws none")


def confirmed_by(images: int | None, model: str, axis: "Axis") -> "tuple[int, Reader | None]":
    """How many images a prompt will confirm a dose, and their reader; to be asked before any work is done.

    Args:
        images: As given; None for 4 where the model brings a reader.
        model: Brings it.
        axis: To be read.

    Raises:
        InputError: The model brings no reader, or one that does not know the axis.
    """
    from stereoclinic.evaluation.readers import PortraitsReader, group_columns
    from stereoclinic.pipelines import model_folder

    if images is None:
        folder = model_folder(model)
        images = 4 if folder is not None and (folder / "reader").is_dir() else 0
    if not images:
        return 0, None
    reader = PortraitsReader(common.reader_folder(model, "give --confirm 0 to dose by leans alone"))
    group_columns(reader, axis)
    return images, reader


def give_dose(
    mask: "NeuronMask",
    model: "Model",
    axis: "Axis",
    rows: "Dataset",
    how: Dosing,
    device: str,
    force: bool,
    quiet: bool,
) -> tuple["NeuronMask", dict[str, Any]]:
    """The mask at its dose, and what is to be said of it as plain data."""
    from stereoclinic.evaluation.arms import Protocol
    from stereoclinic.evaluation.confirm import confirm
    from stereoclinic.prompts.sets import with_seeds
    from stereoclinic.sns.dose import dosed, find_dose

    images = how.images
    samples = with_seeds(rows, how.first, how.seeds)
    with progress_bar(7, "dosing", quiet) as advance:
        found = find_dose(
            model, axis, samples, mask, how.bound, how.steps, how.guidance, batch_size=how.batch_size, force=force,
            progress=lambda strength, left: advance(1, f"strength {strength:.2f} leaves {left:.2f}"),
        )  # fmt: skip
    made = dosed(mask, found, how.bound, samples)
    said: dict[str, Any] = {**vars(found), "confirmed": None}
    if how.reader is not None:
        common.hush_lightning()
        further = how.first + how.seeds
        protocol = Protocol(axis, rows, images, 0, further, how.steps, how.guidance, how.batch_size)
        with progress_bar(2 * images * len(rows), "confirming", quiet) as advance:
            seen = confirm(
                model, how.reader, protocol, made, lambda arm, count: advance(count, arm), common.warn, force,
                accelerator=device, devices=1,
            )  # fmt: skip
        said["confirmed"] = seen.plain()
        dose = {**made.metadata["dose"], "confirmed": seen.plain(), "seeds": [how.first, further + images - 1]}
        made = replace(made, metadata={**made.metadata, "dose": dose})
    return made, said


def say_dose(bound: float, said: dict[str, Any]) -> None:
    tried = ", ".join(f"{strength:.2f}: {left:.2f}" for strength, left in said["tried"])
    common.say(
        f"dose: strength {said['strength']:.2f} leaves mean |lean - target| {said['left']:.3f} (bound {bound:g});"
        f" tried {tried}"
    )
    if (seen := said["confirmed"]) is not None:
        before, after, floor = seen["before"], seen["after"], seen["floor"]
        common.say(
            f"confirmed on {seen['images']} images a prompt, seeds {seen['seeds'][0]} to {seen['seeds'][1]}: parity gap"
            f" {before['estimate']:.2f} -> {after['estimate']:.2f} [{after['low']:.2f}, {after['high']:.2f}]; a fair"
            f" model shows {floor['mean']:.2f}, below {floor['upper']:.2f}"
        )
