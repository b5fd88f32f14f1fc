"""Confirmation of a dose by a few images, as the dose was found from leans."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from stereoclinic.evaluation.arms import UNTREATED, Protocol
from stereoclinic.evaluation.experiment import Arm, drawn
from stereoclinic.evaluation.methods.base import Mitigation, Suppressed
from stereoclinic.evaluation.readers import Reader
from stereoclinic.pipelines.model import Model
from stereoclinic.prompts.sets import with_seeds
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.statistics.gaps import gap_changes, gap_interval
from stereoclinic.statistics.intervals import Interval, NoiseFloor, PairedDifference, noise_floor
from stereoclinic.statistics.shares import parity_gap


@dataclass(frozen=True)
class Confirmation:
    """The mean parity gap of the same seeds without and with a mask."""

    before: Interval  # untreated, 95 %
    after: Interval  # treated
    change: PairedDifference  # after minus before
    floor: NoiseFloor  # of a fair generator, by chance
    images: int  # per prompt
    seeds: tuple[int, int]  # first and last

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def confirm(
    model: Model,
    reader: Reader,
    protocol: Protocol,
    mask: NeuronMask,
    progress: Callable[[str, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    force: bool = False,
    **trainer: Any,
) -> Confirmation:
    """Draw a protocol's neutral prompts without and with a mask.

    Args:
        model: The pipeline.
        reader: Reads the axis.
        protocol: Prompts, seeds, steps and scale; its group prompts are left out.
        mask: Made on other seeds.
        progress: Called with the arm's name and the number of images drawn.
        warn: Called with what does not stop the run.
        force: As in `suppress`.
        **trainer: Given to `lightning.Trainer`; one device, whatever a launcher started.

    Raises:
        InputError: The reader does not know the axis, or the mask does not fit.
    """
    rows = list(with_seeds(protocol.prompts, protocol.seed, protocol.images))
    shares = [dict(protocol.shares)] if protocol.shares else []
    treated = Suppressed("treated", model, mask, [protocol.axis], 1.0, shares, force)
    arms = [Arm(each.name, each, rows, protocol.images) for each in (Mitigation(UNTREATED), treated)]
    found = drawn(model, reader, protocol, arms, progress, None, warn, alone=True, **trainer)
    if found is None:
        raise RuntimeError("a run on one device has no other rank")
    before, after = (each.reads for each in found)
    images = before.shape[1]  # without seeds of which a picture shows nothing
    return Confirmation(
        gap_interval(before, parity_gap, protocol.target),
        gap_interval(after, parity_gap, protocol.target),
        gap_changes(before, after, {"parity_gap": parity_gap}, protocol.target)["parity_gap"],
        noise_floor(images, len(protocol.axis), len(protocol.prompts), parity_gap, target=protocol.target),
        images,
        (protocol.seed, protocol.seed + protocol.images - 1),
    )
