"""`plan`: plan a mask step by step, along the damped trajectory."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stereoclinic.calls.dose import DoseSettings
from stereoclinic.calls.settings import (
    CHOOSING,
    DEVICES,
    DeviceSettings,
    ModelSettings,
    PromptSettings,
    SiteSettings,
    option,
)
from stereoclinic.calls.work import Reporter, claimed, keeps_progress, refuse_left_over
from stereoclinic.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from stereoclinic.ddtd.relevance import Relevance
    from stereoclinic.evaluation.readers import Reader
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.prompts.sets import Samples
    from stereoclinic.sns.mask import NeuronMask
    from stereoclinic.sns.stepwise import Stepwise


#: The fraction of the neurons that may be damped where relevance is known.
AMONG = 0.3


class PlanSettings(DeviceSettings, DoseSettings, SiteSettings, PromptSettings, ModelSettings):
    """How a plan is made."""

    allocate: bool = option(
        True, "One damping per group, or one for all.", flags=("--allocate/--balance",),
    )  # fmt: skip
    seed: int = option(0, "First seed to plan on.", ge=0, advanced=True)
    seeds: int = option(8, "Number of seeds per prompt.", ge=1)
    stay: tuple[str, ...] | None = option(
        None, "Axis to leave unchanged, a name or a TOML file; may repeat; 'none' for no axis.",
        CHOOSING, advanced=True, default_text="the other built-in axes", metavar="NAME", texts=True,
    )  # fmt: skip
    among: float | None = option(
        None, "Damp only this fraction of the neurons, those that a plan gains most from; below 1 it needs RELEVANCE.",
        CHOOSING, ge=0, advanced=True, default_text=f"{AMONG:g} with RELEVANCE, else 1",
    )  # fmt: skip
    mu: float = option(
        1.0, "Price of moving the prediction off the axis, 0 or more (tested: 0.03 to 1); a higher price damps less.",
        CHOOSING, ge=0, advanced=True,
    )  # fmt: skip
    keep: float = option(
        1.0, "Price of moving the prediction along the other axes or the prompt, 0 or more; a higher price damps less.",
        CHOOSING, ge=0, advanced=True,
    )  # fmt: skip
    overshoot: float = option(
        0.0, "Remove this fraction more than the measured lean; without guidance, try 0.25 with --seeds 32.",
        CHOOSING, ge=0, advanced=True,
    )  # fmt: skip
    root: str = option(
        "zero", "Value to damp toward: zero, or group (mean over prompts of the group to draw).",
        CHOOSING, advanced=True,
    )  # fmt: skip
    until: float = option(
        400.0, "Damp only from noise (timestep about 1000) down to this timestep; 0 damps at all steps.",
        CHOOSING, ge=0, advanced=True,
    )  # fmt: skip
    replans: int = option(
        3, "Number of plans for each step; each starts from the result of the plan before it.",
        CHOOSING, ge=1, advanced=True,
    )  # fmt: skip
    guidance: float | None = option(None, "Guidance scale to plan at.", ge=0, default_text="the model's own")
    check: int = option(
        2, "Number of new seeds per prompt to check the plan on; 0 for no check.",
        CHOOSING, ge=0, advanced=True,
    )  # fmt: skip
    batch_size: int = option(36, "Number of samples in a batch on each device.", DEVICES, ge=1, advanced=True)
    resume: bool = option(False, "Continue an interrupted plan.")
    force: bool = option(False, "Accept relevance made for other weights if all layers fit.", advanced=True)

    def searched(self, relevance: "Relevance | None") -> float:
        """The fraction of the neurons that may be damped; raises InputError where it cannot be."""
        among = self.among
        if among is None:
            return 1.0 if relevance is None else AMONG
        if not 0 < among <= 1:
            raise InputError(f"--among {among:g}: expected a share above 0 and up to 1")
        if among < 1 and relevance is None:
            raise InputError(
                "--among: give the relevance file that stereo locate wrote, such as gender.relevance.safetensors"
            )
        return among


class Planned(NamedTuple):
    """What `plan` makes.

    Attributes:
        mask: The mask.
        held_out: What it leaves of the lean on further seeds, as plain data; None where that was not asked for.
        dose: How its dose was found, as plain data; None where none was asked for.
    """

    mask: "NeuronMask"
    held_out: dict[str, Any] | None
    dose: dict[str, Any] | None


def plan(
    model: "str | Model | DiffusionPipeline" = "portraits",
    axis: "str | Path | Axis" = "gender",
    prompts: "str | Dataset" = "portraits",
    relevance: "Relevance | None" = None,
    settings: PlanSettings | None = None,
    *,
    out: str | Path | None = None,
    reporter: Reporter | None = None,
) -> "NeuronMask | None":
    """Plan a mask step by step. This is `stereo plan`.

    Args:
        model: `portraits`, a diffusers folder, a checkpoint, a hub id; or an open pipeline, which stays where it is.
        axis: Axis of bias: gender, skin, age, or a TOML file.
        prompts: Neutral prompts: the name of a set, a file, a hub data set, or rows as `load_prompts` returns them.
        relevance: What `locate` found, to plan among the neurons that a plan gains most from (`settings.among`).
        settings: Everything else; the defaults are those of the command.
        out: Write the mask here. An interrupted plan then keeps its progress next to it.
        reporter: Gets notes, warnings and progress.

    Returns:
        The mask; None on every rank but the first.

    Raises:
        InputError: An argument is wrong or does not fit the model, or every damping costs more than it gains.
    """
    reporter = reporter or Reporter()
    planned = prepare_plan(model, axis, prompts, relevance, settings, out, reporter).run(reporter)
    return None if planned is None else planned.mask


@dataclass(frozen=True)
class PlanJob:
    """What `plan` will do, checked and not yet begun."""

    model: "Model"
    axis: "Axis"
    samples: "Samples"
    settings: PlanSettings
    stepwise: "Stepwise"
    candidates: "Tensor | None"
    stay: "list[Axis]"
    confirmed_by: "tuple[int, Reader | None]"
    device: str
    steps: tuple[int, int]
    file: Path | None

    @property
    def unfinished(self) -> Path | None:
        """Where an interrupted plan keeps its progress."""
        return self.file and self.file.with_name(f"{self.file.stem}.unfinished.safetensors")

    @property
    def description(self) -> str:
        planned, total = self.steps
        seeds, prompts = self.settings.seeds, len(self.samples.prompts)
        return (
            f"plan {planned} of {total} steps on {len(self.samples)} samples ({prompts} prompts x {seeds} seeds) at"
            f" guidance {self.stepwise.guidance:g} on {self.settings.ranks} device(s)"
            + (f", and write {self.file}" if self.file else "")
        )

    def run(self, reporter: Reporter) -> Planned | None:
        """Plan, give the dose or check, and write; None on every rank but the first."""
        places = [place for place in (self.file, self.unfinished) if place is not None]
        with claimed(reporter, *places):
            mask = self._plan(reporter)
            if mask is None:
                return None
            if self.settings.dose is not None:
                return self._give_dose(mask, self.settings.dose, reporter)
        return Planned(mask, self._check(mask, reporter) if self.settings.check else None, None)

    def _plan(self, reporter: Reporter) -> "NeuronMask | None":
        from stereoclinic.runtime.devices import hush_lightning, strategy_for, threads_for
        from stereoclinic.sns.plan import plan_stepwise

        hush_lightning()
        settings, ranks = self.settings, self.settings.ranks
        passes = self.steps[0] * len(self.samples) * (len(self.axis) if settings.allocate else 1)
        with (
            keeps_progress(self.unfinished, reporter),
            threads_for(self.device, ranks),
            reporter.progress(passes, f"planning {self.axis.name}") as advance,
        ):
            mask = plan_stepwise(
                self.model, self.axis, self.samples, self.stepwise, settings.allocate, self.stay,
                self.candidates, progress=advance, warn=reporter.warn, unfinished=self.unfinished,
                accelerator=self.device, devices=settings.devices, num_nodes=settings.num_nodes,
                strategy=strategy_for(settings.strategy, ranks),
            )  # fmt: skip
            if mask is None:
                return None
            damps = bool((mask.factors != 1).any())
            if self.file is not None and damps:
                mask.save(self.file)  # planning took minutes: the mask is kept, whatever becomes of its dose
        if self.unfinished is not None:
            self.unfinished.unlink(missing_ok=True)
        if not damps:
            written = "" if self.file is None else f", and {self.file} is not written"
            raise InputError(f"every damping costs more than it gains{written}; give a lower --mu or --keep")
        return mask

    def _give_dose(self, mask: "NeuronMask", bound: float, reporter: Reporter) -> Planned:
        from stereoclinic.calls.dose import give_dose

        settings = self.settings
        first = settings.seed + settings.seeds
        try:
            mask, found = give_dose(
                mask, self.model, self.axis, self.samples.prompts, bound, self.confirmed_by,
                range(first, first + max(1, settings.seeds // 2)), self.stepwise.guidance, settings.batch_size,
                self.device, settings.force, reporter,
            )  # fmt: skip
        except InputError as error:
            kept = "" if self.file is None else f"; {self.file} holds the mask as it was planned"
            raise InputError(f"{error}{kept}") from error
        if self.file is not None:
            mask.save(self.file)
        return Planned(mask, None, found)

    def _check(self, mask: "NeuronMask", reporter: Reporter) -> dict[str, Any]:
        """How far the lean misses its target on further samples, and on those planned on, as plain data."""
        from stereoclinic.prompts.sets import with_seeds
        from stereoclinic.sns.dose import lean_left

        settings, stepwise = self.settings, self.stepwise
        further = with_seeds(self.samples.prompts, settings.seed + settings.seeds, settings.check)
        with reporter.progress(self.steps[0] * len(further), "checking on new seeds") as advance:
            left = lean_left(
                self.model, self.axis, further, mask, 1.0, stepwise.steps, stepwise.guidance,
                batch_size=stepwise.batch_size, force=settings.force, progress=advance,
            )  # fmt: skip
        bins = mask.metadata["selection"]["bins"]
        return {
            "samples": len(left),
            "seeds": further.about()["seeds"],
            "left": left.mean().item(),
            "standard_error": left.std().item() / len(left) ** 0.5 if len(left) > 1 else None,
            "planned": sum(each["lean_after"] for each in bins) / len(bins),
        }


def prepare_plan(
    model: "str | Model | DiffusionPipeline",
    axis: "str | Path | Axis",
    prompts: "str | Dataset",
    relevance: "Relevance | None",
    settings: PlanSettings | None,
    out: str | Path | None,
    reporter: Reporter,
) -> PlanJob:
    """Check everything that `plan` needs; arguments and errors as there."""
    from stereoclinic.calls import inputs
    from stereoclinic.pipelines.schedule import schedule_of
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.prompts.sets import with_seeds
    from stereoclinic.runtime.devices import device_of, place_of
    from stereoclinic.sns.compat import check_fits

    settings = settings or PlanSettings()
    settings.check_confirm()
    settings.searched(relevance)  # refused before the model is opened
    axis = load_axis(axis) if isinstance(axis, str | Path) else axis
    samples = with_seeds(inputs.neutral_prompts(prompts, settings.limit), settings.seed, settings.seeds)
    file = None if out is None else inputs.check_target(Path(out), "--out", (".pt", ".safetensors"))
    device = device_of(settings.accelerator)
    inputs.check_ranks(len(samples), settings.ranks)
    confirmed_by = settings.confirming(model, axis)
    made = {} if relevance is None else relevance.metadata
    opened = inputs.open_named(model, settings, reporter, place_of(device), made)
    if relevance is not None:
        check_fits(relevance, opened.network, settings.force)
    stepwise = stepwise_of(settings, opened, made)
    timesteps = schedule_of(opened, stepwise.steps, stepwise.guidance).timesteps
    steps = len(stepwise.treated(timesteps)), len(timesteps)
    if not steps[0]:
        raise InputError(f"--until {settings.until:g}: no step lies above it; timesteps run from {timesteps[0]:g}")
    inputs.check_length(reporter, opened, samples.prompts, axis, stepwise.guidance, stepwise.steps)
    inputs.note_named(reporter, samples.prompts, axis)
    candidates, stay = _candidates(relevance, settings), others_of(settings, axis)
    job = PlanJob(opened, axis, samples, settings, stepwise, candidates, stay, confirmed_by, device, steps, file)
    if file is not None and job.unfinished is not None:
        refuse_left_over(file, job.unfinished, settings.resume)
    return job


def stepwise_of(settings: PlanSettings, model: "Model", made: "dict[str, Any]") -> "Stepwise":
    """Settings of the plan, with what depends on the model and the file of relevance filled in."""
    from stereoclinic.calls.inputs import patterns_of
    from stereoclinic.sns.stepwise import Stepwise

    return Stepwise(
        settings.mu,
        settings.keep,
        settings.overshoot,
        settings.root,
        settings.until,
        settings.replans,
        steps=model.defaults.steps,
        guidance=model.defaults.guidance if settings.guidance is None else settings.guidance,
        batch_size=settings.batch_size,
        sites=settings.sites or tuple(patterns_of(made)),
    )


def _candidates(relevance: "Relevance | None", settings: PlanSettings) -> "Tensor | None":
    """The neurons that may be damped; None for all."""
    among = settings.searched(relevance)
    if relevance is None or among == 1:
        return None
    from stereoclinic.sns.linear import most_useful
    from stereoclinic.sns.mask import in_unit

    first = float(relevance.bin_edges[0])
    window = first, in_unit(settings.until, first)
    return most_useful(relevance, among, window, settings.mu, settings.allocate)


def others_of(settings: PlanSettings, axis: "Axis") -> "list[Axis]":
    """The axes along which nothing should move."""
    from stereoclinic.prompts.axes import WATCHED, load_axis

    names = WATCHED if settings.stay is None else () if settings.stay == ("none",) else settings.stay
    return [each for each in map(load_axis, names) if each.name != axis.name]
