"""`locate`: find the neurons that carry a stereotype, and choose a mask of them."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stereoclinic.calls.choosing import ChoosingSettings
from stereoclinic.calls.inputs import relevance_file
from stereoclinic.calls.settings import (
    DEVICES,
    MODEL,
    RELEVANCE,
    DeviceSettings,
    LoggerSettings,
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
    from stereoclinic.ddtd.trajectory import Settings as TrajectorySettings
    from stereoclinic.pipelines.model import Model
    from stereoclinic.prompts.axes import Axis
    from stereoclinic.prompts.sets import Samples
    from stereoclinic.prompts.streams import Stream
    from stereoclinic.report.loggers import Log
    from stereoclinic.sns.mask import NeuronMask
    from stereoclinic.sns.select import Selection


#: Name in place of a composite's: the most faithful one on the model, as measured.
AUTO = "auto"


class LocateSettings(LoggerSettings, DeviceSettings, ChoosingSettings, SiteSettings, PromptSettings, ModelSettings):
    """How relevance is measured, and how a mask is chosen from it."""

    seed: int = option(0, "First seed to measure on.", ge=0, advanced=True)
    seeds: int = option(16, "Number of seeds per prompt.", ge=1)
    stream: bool = option(
        False, "Read prompts during the run, for a file or hub data set that does not fit in memory; needs a column"
        " `occupation`.",
        MODEL, advanced=True,
    )  # fmt: skip
    target: str = option(
        "lean", "Quantity to decompose: lean, contrast (the lean, not divided by the distance between groups), guidance"
        " (the lean that guidance adds), or classifier (output of the model's reader for the predicted clean image).",
        RELEVANCE, advanced=True,
    )  # fmt: skip
    composite: str = option(
        "gradient", "Relevance rules: gradient (most faithful in our tests), epsilon-cp, epsilon-attnlrp, gamma-cp,"
        " gamma-attnlrp, zplus-cp, deep-taylor, a TOML file, or auto (measure which is most faithful on this model).",
        RELEVANCE, advanced=True,
    )  # fmt: skip
    root: str | None = option(
        None, "Relevance of an activation a with gradient g: plain (a g) or rooted ((a - mean over groups) g).",
        RELEVANCE, advanced=True, default_text="the composite's own",
    )  # fmt: skip
    every: int | None = option(
        None, "Measure every Nth sampler step.",
        RELEVANCE, ge=1, advanced=True, default_text="2, or 1 with 8 steps or fewer",
    )  # fmt: skip
    bins: int = option(5, "Number of timestep bins; relevance is summed in each.", RELEVANCE, ge=1, advanced=True)
    guidance: float | None = option(
        None, "Guidance scale to measure at; 1 is no guidance.",
        RELEVANCE, ge=0, default_text="1, or a distilled model's own",
    )  # fmt: skip
    batch_size: int = option(16, "Number of samples in a batch on each device.", DEVICES, ge=1, advanced=True)
    strategy: str = option(
        "auto", "Lightning strategy: ddp (whole model on each device), fsdp (denoiser split over devices, if it does"
        " not fit on one), or auto (ddp on several devices).",
        DEVICES, advanced=True,
    )  # fmt: skip
    precision: str = option(
        "32-true", "Lightning precision of the run, such as 32-true or bf16-mixed.", DEVICES, advanced=True
    )
    resume: bool = option(False, "Continue an interrupted run.")


class Located(NamedTuple):
    """What `locate` makes."""

    relevance: "Relevance"
    mask: "NeuronMask"


def locate(
    model: "str | Model | DiffusionPipeline" = "portraits",
    axis: "str | Path | Axis" = "gender",
    prompts: "str | Dataset" = "portraits",
    settings: LocateSettings | None = None,
    *,
    out: str | Path | None = None,
    classifier: "Callable[[Tensor], Tensor] | None" = None,
    reporter: Reporter | None = None,
) -> "Relevance | None":
    """Find where a stereotype lives: the relevance of every neuron, and the lean by prompt and timestep.

    This is `stereo locate`. `choose(relevance)` makes a mask of what it returns.

    Args:
        model: `portraits`, a diffusers folder, a checkpoint, a hub id; or an open pipeline, which stays where it is.
        axis: Axis of bias: gender, skin, age, or a TOML file.
        prompts: Neutral prompts: the name of a set, a file, a hub data set, or rows as `load_prompts` returns them.
        settings: Everything else; the defaults are those of the command.
        out: Write the mask here, and the relevance next to it. An interrupted run then keeps its progress there.
        classifier: For the target "classifier": images (B, 3, H, W) in [0, 1] to logits (B, K).
        reporter: Gets notes, warnings and progress.

    Returns:
        The relevance; None on every rank but the first.

    Raises:
        InputError: An argument is wrong or does not fit the model; the message says what to do.
        Incomplete: Samples are missing, or more than 1 % of them had values that are not finite.
    """
    reporter = reporter or Reporter()
    located = prepare_locate(model, axis, prompts, settings, out, classifier, reporter).run(reporter)
    return None if located is None else located.relevance


@dataclass(frozen=True)
class LocateJob:
    """What `locate` will do, checked and not yet begun."""

    model: "Model"
    axis: "Axis"
    samples: "Samples | Stream"
    settings: LocateSettings
    walk: "TrajectorySettings"
    classifier: "Callable[[Tensor], Tensor] | None"
    device: str
    steps: tuple[int, int]
    file: Path | None
    logs: "list[Log]"

    @property
    def stored(self) -> Path | None:
        """Where the relevance is written."""
        return self.file and self.file.with_name(relevance_file(self.file.stem))

    @property
    def shards(self) -> Path | None:
        """Where an interrupted run keeps its progress."""
        return self.file and self.file.with_name(f"{self.file.stem}.shards")

    @property
    def kept_choice(self) -> Path | None:
        """Where `--composite auto` keeps what it chose, for other ranks and a resumed run."""
        return self.file and self.file.with_name(f"{self.file.stem}.composite.json")

    @property
    def description(self) -> str:
        places = f", and write {self.stored} and {self.file}" if self.file else ""
        measured, total = self.steps
        first = "choose the composite by silencing groups of neurons, then " if self.settings.composite == AUTO else ""
        return (
            f"{first}measure {_size(self.samples, self.settings)} at {measured} of {total} steps on"
            f" {self.settings.ranks} device(s){places}"
        )

    def run(self, reporter: Reporter) -> Located | None:
        """Measure, choose and write; None on every rank but the first."""
        from stereoclinic.ddtd.relevance import Relevance
        from stereoclinic.report.loggers import log_leans
        from stereoclinic.report.summary import lean_summary
        from stereoclinic.sns.linear import choose

        files = [place for place in (self.file, self.stored, self.shards) if place is not None]
        with claimed(reporter, *files), keeps_progress(self.shards, reporter):
            choice = self._choose_composite(reporter) if self.settings.composite == AUTO else {}
            relevance = self._measure(reporter, choice.get("composite", self.walk.composite))
            if relevance is None:
                return None
            if choice:
                relevance = replace(relevance, metadata={**relevance.metadata, "composite_choice": choice})
            if dropped := relevance.metadata["dropped"]:
                of = relevance.metadata["samples"]
                reporter.warn(f"{dropped} of {of} samples were dropped: their values were not finite")
            if self.stored is not None:
                relevance.save(self.stored)
                # The file keeps sums in float32: choosing from what it holds lets `stereo mask` choose the same again.
                relevance = Relevance.load(self.stored)
            mask = choose(relevance, self.settings.selection())
            if self.file is not None:
                mask.save(self.file)
            log_leans(self.logs, lean_summary(relevance))
            if self.shards is not None:
                shutil.rmtree(self.shards, ignore_errors=True)
                if choice and self.kept_choice is not None:
                    self.kept_choice.unlink(missing_ok=True)
        return Located(relevance, mask)

    def _choose_composite(self, reporter: Reporter) -> dict[str, Any]:
        """The most faithful composite and its figure, measured on some of the samples."""
        from stereoclinic.calls.faithfulness import chosen_composite
        from stereoclinic.prompts.sets import Samples

        assert isinstance(self.samples, Samples)  # streams are refused
        how = self.settings.batch_size, self.kept_choice
        return chosen_composite(self.model, self.axis, self.samples, self.walk, reporter, *how)

    def _measure(self, reporter: Reporter, composite: str) -> "Relevance | None":
        from stereoclinic.ddtd.locate import run_ddtd
        from stereoclinic.prompts.streams import Stream
        from stereoclinic.runtime.devices import hush_lightning, strategy_for, threads_for

        hush_lightning()
        settings, ranks = self.settings, self.settings.ranks
        amount = None if isinstance(self.samples, Stream) else len(self.samples) * self.steps[0]
        with threads_for(self.device, ranks), reporter.progress(amount, f"locating {self.axis.name}") as advance:
            return run_ddtd(
                self.model, self.axis, self.samples, replace(self.walk, composite=composite),
                batch_size=settings.batch_size,
                classifier=self.classifier, progress=lambda count: advance(count * ranks), warn=reporter.warn,
                shards=self.shards, accelerator=self.device, devices=settings.devices, num_nodes=settings.num_nodes,
                strategy=strategy_for(settings.strategy, ranks), precision=settings.precision,
            )  # fmt: skip


def prepare_locate(
    model: "str | Model | DiffusionPipeline",
    axis: "str | Path | Axis",
    prompts: "str | Dataset",
    settings: LocateSettings | None,
    out: str | Path | None,
    classifier: "Callable[[Tensor], Tensor] | None",
    reporter: Reporter,
) -> LocateJob:
    """Check everything that `locate` needs; arguments and errors as there."""
    from stereoclinic.calls import inputs
    from stereoclinic.pipelines.schedule import schedule_of
    from stereoclinic.prompts.axes import load_axis
    from stereoclinic.prompts.streams import Stream
    from stereoclinic.report.loggers import logs_of
    from stereoclinic.runtime.devices import check_precision, device_of, place_of
    from stereoclinic.sns.select import check_root

    settings = settings or LocateSettings()
    selection = settings.selection()
    axis = load_axis(axis) if isinstance(axis, str | Path) else axis
    if settings.composite == AUTO:
        _check_auto(settings, out)
    samples = _samples(prompts, settings)
    file = None if out is None else inputs.check_target(Path(out), "--out", (".pt", ".safetensors"))
    logs = logs_of(settings.logger, file and file.with_name(f"{file.stem}.logs"))
    device = device_of(settings.accelerator, float64=True)
    check_root(settings.mask_root, axis.groups)
    check_precision(settings.precision)
    if not isinstance(samples, Stream):
        inputs.check_ranks(len(samples), settings.ranks)
    if settings.target == "classifier" and classifier is None:
        classifier = inputs.own_classifier(model, axis)
    opened = inputs.open_named(model, settings, reporter, place_of(device, settings.strategy))
    walk = walk_of(settings, opened)
    if not isinstance(samples, Stream):
        inputs.check_length(reporter, opened, samples.prompts, axis, walk.guidance, walk.steps)
        inputs.note_named(reporter, samples.prompts, axis)
    timesteps = walk.timesteps(opened)
    _check_selection(selection, walk, opened, float(walk.edges(timesteps, opened.training_steps)[0]))
    _check_shared(settings, opened, samples)
    steps = len(timesteps), len(schedule_of(opened, walk.steps, walk.guidance).timesteps)
    job = LocateJob(opened, axis, samples, settings, walk, classifier, device, steps, file, logs)
    if file is not None and job.shards is not None:
        refuse_left_over(file, job.shards, settings.resume)
    return job


def _samples(prompts: "str | Dataset", settings: LocateSettings) -> "Samples | Stream":
    from stereoclinic.calls.inputs import neutral_prompts
    from stereoclinic.prompts.sets import with_seeds
    from stereoclinic.prompts.streams import Stream

    if not settings.stream:
        return with_seeds(neutral_prompts(prompts, settings.limit), settings.seed, settings.seeds)
    if not isinstance(prompts, str):
        raise InputError("stream: give the name of a file or hub data set, which is read during the run")
    return Stream(prompts, range(settings.seed, settings.seed + settings.seeds), settings.limit)


def _check_auto(settings: LocateSettings, out: str | Path | None) -> None:
    """Refuse `--composite auto` where it cannot be measured beforehand, or ranks could choose differently."""
    if settings.stream or settings.strategy.startswith("fsdp"):
        why = "with --stream" if settings.stream else f"with strategy {settings.strategy}"
        raise InputError(f"composite auto cannot be measured {why}; name one, see `stereo doctor --faithfulness`")
    if settings.ranks > 1 and out is None:
        raise InputError("composite auto on several devices keeps its choice in a file for all of them; give out=PATH")


def _size(samples: "Samples | Stream", settings: LocateSettings) -> str:
    """How many samples there are, in words."""
    from stereoclinic.prompts.streams import Stream

    if isinstance(samples, Stream):
        return f"{samples.about()['prompts']} x {settings.seeds} seeds"
    return f"{len(samples)} samples ({len(samples.prompts)} prompts x {settings.seeds} seeds)"


def _check_shared(settings: LocateSettings, model: "Model", samples: "Samples | Stream") -> None:
    """Refuse what cannot be done with a denoiser whose weights are shared out over devices."""
    from stereoclinic.ddtd.sharding import SHARDED, check_sharded
    from stereoclinic.pipelines.arguments import inner

    if settings.strategy == SHARDED:
        check_sharded(inner(model.network), samples, settings.composite, settings.precision, settings.ranks)


def walk_of(settings: LocateSettings, model: "Model") -> "TrajectorySettings":
    """How the trajectory is measured, with what depends on the model filled in."""
    from stereoclinic.calls.inputs import every_of, unguided
    from stereoclinic.ddtd.trajectory import Settings as TrajectorySettings

    steps = model.defaults.steps
    return TrajectorySettings(
        "gradient" if settings.composite == AUTO else settings.composite,  # chosen when the job runs
        settings.root,
        steps,
        unguided(model, steps) if settings.guidance is None else settings.guidance,
        settings.every or every_of(steps),
        settings.bins,
        target=settings.target,
        sites=settings.sites,
    )


def _check_selection(selection: "Selection", walk: "TrajectorySettings", model: "Model", first: float) -> None:
    """Check the selection before any work is done."""
    from stereoclinic.pipelines.arguments import inner
    from stereoclinic.pipelines.sites import find_sites
    from stereoclinic.sns.mask import in_unit
    from stereoclinic.sns.select import neurons_of, number_of

    watched = find_sites(inner(model.network), walk.kinds, walk.sites)
    if selection.select == "top-k":
        number_of(selection.k, len(neurons_of(watched, None)))
    if in_unit(selection.until, first) >= first:
        raise InputError(
            f"--until {selection.until:g}: nothing is left to damp; timesteps run from {first:g} down to 0"
        )
