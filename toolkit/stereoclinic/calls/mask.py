"""Making a mask anew: choosing again from relevance, changing a mask, composing several, finding a dose."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stereoclinic.calls.choosing import ChoosingSettings
from stereoclinic.calls.dose import DoseSettings
from stereoclinic.calls.settings import CHOOSING, DEVICES, DOSE, MODEL, ModelSettings, PromptSettings, option
from stereoclinic.calls.work import Reporter
from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from stereoclinic.sns.mask import NeuronMask


class MaskSettings(DoseSettings, ChoosingSettings, PromptSettings, ModelSettings):
    """How a mask is made from relevance or from other masks, and dosed.

    Of a mask, `until` and `branch` stay as they are where none is given.
    """

    at_most: int | None = option(None, "Damp at most N neurons (--select plan).", CHOOSING, ge=1)
    z: float = option(
        2.0, "With --select top-k: rank neurons by mean relevance minus this many standard errors.",
        CHOOSING, advanced=True,
    )  # fmt: skip
    kinds: str | None = option(
        None, "Kinds of layer to choose from: ff, attention, conv, other; with a stream (image, text, joint) after a"
        " colon, as in ff:text.",
        CHOOSING, advanced=True, metavar="KIND,...", default_text="all",
    )  # fmt: skip
    per_bin: bool = option(
        False, "Choose neurons in each timestep bin, or once for all; a mask of --one-for-all --until 0 can be fused.",
        CHOOSING, advanced=True, flags=("--per-bin/--one-for-all",),
    )  # fmt: skip
    since: float | None = option(
        None, "Damp only from this timestep down to --until.",
        CHOOSING, ge=0, advanced=True, default_text="the noisiest", flags=("--from",),
    )  # fmt: skip
    strength: tuple[float, ...] = option(
        (), "Strength of the damping, from 0 (none) to 1 (unchanged); give it once, or once per mask.", metavar="X"
    )
    axis: str | None = option(
        None, "With --dose: axis of bias, a name or a TOML file.",
        DOSE, advanced=True, metavar="NAME", default_text="the file's",
    )  # fmt: skip
    seed: int | None = option(
        None, "With --dose: first seed.",
        DOSE, ge=0, advanced=True, default_text="the first that the mask was not made on",
    )  # fmt: skip
    seeds: int = option(2, "With --dose: number of seeds per prompt.", DOSE, ge=1, advanced=True)
    guidance: float | None = option(
        None, "With --dose: guidance scale to use the mask at.",
        MODEL, ge=0, advanced=True, default_text="the model's own",
    )  # fmt: skip
    batch_size: int = option(36, "With --dose: number of samples in a batch.", DEVICES, ge=1, advanced=True)
    accelerator: str = option("auto", "Type of device: cpu, cuda, mps or auto.", DEVICES, advanced=True)
    force: bool = option(False, "Accept masks made for other weights if all layers fit.", advanced=True)

    def choosing(self) -> list[str]:
        """The given flags that choose neurons; they do not apply to a finished mask."""
        names = ("select", "mu", "overshoot", "at_most", "top", "z", "mask_root", "kinds", "per_bin")
        return [f"--{name.replace('_', '-')}" for name in names if name in self.model_fields_set]


def made_mask(files: Sequence[Path], settings: MaskSettings, out: Path, reporter: Reporter) -> "tuple[NeuronMask, str]":
    """The mask that `stereo mask` makes of its files, before any dose, and how it was made in words.

    Args:
        files: One relevance file, or one or more masks.
        settings: How.
        out: Where it will be written.
        reporter: Gets notes.

    Raises:
        InputError: The files do not go together, or settings do not fit them.
    """
    from stereoclinic.calls.inputs import check_distinct
    from stereoclinic.io.tensors import kind_of

    check_distinct(list(files))
    kinds = {path: kind_of(path) for path in files}
    if other := [path for path, kind in kinds.items() if kind not in ("mask", "relevance")]:
        raise InputError(f"{other[0]} is a {kinds[other[0]]} file; expected a mask or relevance")
    located = [path for path, kind in kinds.items() if kind == "relevance"]
    if not located:
        if given := settings.choosing():
            raise InputError(
                f"{given[0]} chooses neurons, but {files[0]} is a finished mask; give the relevance that it was"
                " made from"
            )
        how = "changed from" if len(files) == 1 else "composed of"
        return _from_masks(files, settings), f"{how} {', '.join(map(str, files))}"
    if len(files) > 1:
        raise InputError(
            f"{located[0]} is a relevance file, given with other files; give it alone, or give only masks to compose"
        )
    if out.resolve() == files[0].resolve():
        raise InputError(f"--out {out} would overwrite the relevance; give another name")
    if len(settings.strength) > 1:
        raise InputError(f"--strength is given {len(settings.strength)} times for one mask; give it once")
    return _from_relevance(files[0], settings, reporter), f"chosen with --select {settings.select} from {files[0]}"


def _from_relevance(file: Path, settings: MaskSettings, reporter: Reporter) -> "NeuronMask":
    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.sns.linear import adjusted, choose

    kinds = settings.kinds and tuple(kind.strip() for kind in settings.kinds.split(","))
    selection = settings.selection(
        at_most=settings.at_most, z=settings.z, since=settings.since, kinds=kinds, per_bin=settings.per_bin
    )
    relevance = Relevance.load(file)
    neurons = sum(site.width for site in relevance.sites)
    with reporter.progress(1, f"choosing among {neurons} neurons by {selection.select}") as advance:
        mask = choose(relevance, selection)
        advance(1)
    return adjusted(mask, (settings.strength or (1.0,))[0])


def _from_masks(files: Sequence[Path], settings: MaskSettings) -> "NeuronMask":
    from stereoclinic.sns.compose import compose
    from stereoclinic.sns.linear import adjusted
    from stereoclinic.sns.mask import BRANCHES, NeuronMask

    strengths = settings.strength or (1.0,)
    if len(strengths) not in (1, len(files)):
        raise InputError(
            f"--strength is given {len(strengths)} times for {len(files)} masks; give it once, or for each"
        )
    if settings.branch is not None and settings.branch not in BRANCHES:
        raise InputError(f"--branch {settings.branch!r}: expected {' or '.join(BRANCHES)}")
    masks = [NeuronMask.load(path) for path in files]
    if len(masks) == 1:
        made = adjusted(masks[0], strengths[0])
    else:
        made = compose(masks, strengths * len(masks) if len(strengths) == 1 else strengths, settings.force)
    if settings.since is not None or settings.until is not None:
        first, last = made.bin_edges[0].item(), made.bin_edges[-1].item()
        window = (
            first if settings.since is None else settings.since,
            last if settings.until is None else settings.until,
        )
        made = adjusted(made, window=window)
    if settings.branch is None:
        return made
    return replace(made, branch="both" if settings.branch == "both" else "conditional")


def dosed_mask(
    mask: "NeuronMask", model: str, settings: MaskSettings, prompts: str, reporter: Reporter
) -> "tuple[NeuronMask, dict[str, Any]]":
    """The mask at the dose that `settings.dose` asks for, and what was found as plain data.

    Raises:
        InputError: The mask does not say its axis, or no strength meets the bound.
    """
    from stereoclinic.calls import inputs
    from stereoclinic.calls.dose import give_dose
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.runtime.devices import device_of
    from stereoclinic.sns.compat import check_fits

    axis = load_axis(settings.axis) if settings.axis else inputs.own_axis(mask)
    rows = inputs.neutral_prompts(prompts, settings.limit)
    if axis is None or settings.dose is None:
        raise InputError("--dose: the mask does not say what axis it was made for; give --axis")
    confirmed_by = settings.confirming(model, axis)
    device = device_of(settings.accelerator)
    opened = inputs.open_named(model, settings, reporter, device, mask.metadata)
    check_fits(mask, opened.network, settings.force)
    first = max((last + 1 for _, last in mask.made_on), default=0) if settings.seed is None else settings.seed
    return give_dose(
        mask, opened, axis, rows, settings.dose, confirmed_by, range(first, first + settings.seeds),
        opened.defaults.guidance if settings.guidance is None else settings.guidance, settings.batch_size, device,
        settings.force, reporter,
    )  # fmt: skip


def model_of(made: Mapping[str, Any], given: str | None = None) -> str:
    """The model that a file was made for, unless another is given."""
    return given or str(made.get("model", "portraits"))
