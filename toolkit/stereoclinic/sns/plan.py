"""Runs a stepwise plan as a Lightning predict loop: every rank walks its own samples, and all make one plan.

    rank 0   samples 0, 2, 4, ...   derivatives \\                                    / factors of the step
    rank 1   samples 1, 3, 5, ...   derivatives  > rank 0 solves one problem of all <  factors of the step

Every planned step is saved at once, so that an interrupted plan continues, on any number of devices.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from stereoclinic.ddtd.trajectory import check_prompts
from stereoclinic.errors import Incomplete, InputError
from stereoclinic.io.digest import plain_digest, shapes_digest, weights_digest
from stereoclinic.io.files import check_same
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.schedule import schedule_of
from stereoclinic.pipelines.sites import Site, find_sites
from stereoclinic.prompts.axes import Axis, gate_words
from stereoclinic.prompts.sets import Samples
from stereoclinic.runtime.predict import Ranks, predict
from stereoclinic.sns.mask import NeuronMask
from stereoclinic.sns.select import label_metadata
from stereoclinic.sns.stepwise import PlannedStep, PlanTask, StepPlanner, Stepwise

KIND, VERSION = "unfinished plan", 1


class Unfinished:
    """The file that keeps the steps of a plan that is being made; a path of None keeps nothing.

    `configuration` is plain data: all that the plan depends on, except how samples are spread over devices. `steps` is
    the number of steps of the whole plan.
    """

    def __init__(self, path: Path | None, configuration: dict[str, Any], neurons: int, steps: int) -> None:
        self.path, self.configuration, self.neurons, self.steps = path, configuration, neurons, steps

    def read(self) -> list[PlannedStep]:
        """The steps planned so far, in the order of groups and then steps.

        Raises:
            InputError: They were planned in another configuration (says what differs), or the file is damaged.
        """
        if self.path is None or not self.path.exists():
            return []
        tensors, about = load_tensors(self.path, KIND, VERSION)
        check_same(self.path, about.get("configuration"), self.configuration)
        figures = about["steps"] if isinstance(about.get("steps"), list) else []
        names = ["factors", "roots"] if self.configuration["root"] != "zero" else ["factors"]
        shape = (len(figures), self.neurons)
        fits = all(
            name in tensors and tensors[name].shape == shape and tensors[name].is_floating_point() for name in names
        )
        if not fits or not 0 < len(figures) <= self.steps or not all(map(_are_figures, figures)):
            raise InputError(f"{self.path} holds other steps than it should; remove it to start anew")
        roots = tensors["roots"] if "roots" in names else [None] * len(figures)
        return [PlannedStep(*step) for step in zip(tensors["factors"], roots, figures, strict=True)]

    def keep(self, planned: Sequence[PlannedStep]) -> None:
        """Write all steps, whole or not at all; InputError where that is not possible."""
        if self.path is None:
            return
        factors, roots = _stacked(planned)
        tensors = {"factors": factors} if roots is None else {"factors": factors, "roots": roots}
        about = {"configuration": self.configuration, "steps": [step.figures for step in planned]}
        save_tensors(self.path, KIND, VERSION, tensors, about)


def _are_figures(line: Any) -> bool:
    """Whether a file's line can be the figures of a step."""
    names = ("timestep", "before", "after", "off_axis", "damping")
    return isinstance(line, dict) and all(isinstance(line.get(name), float) for name in names)


def _stacked(steps: Sequence[PlannedStep]) -> tuple[Tensor, Tensor | None]:
    """Factors and roots of several steps, (T, N) each."""
    roots = [step.root for step in steps if step.root is not None]
    return torch.stack([step.factor for step in steps]), torch.stack(roots) if roots else None


class Planning(L.LightningModule):
    """Plans one trajectory a group (None for a balanced prediction); a rank is given all of its samples at once."""

    def __init__(
        self,
        task: PlanTask,
        groups: Sequence[int | None],
        unfinished: Unfinished,
        progress: Callable[[int], None] | None,
        warn: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.task, self.groups, self.unfinished, self.progress = task, groups, unfinished, progress
        self.network = task.model.network  # registered, so that Lightning moves it
        self.portions = AdaptiveBatch(task.settings.batch_size, warn)
        self.planned = unfinished.read()

    def on_predict_start(self) -> None:
        task = self.task
        task.model.to(self.device)
        for start in range(0, len(task.samples.prompts), 64):
            rows = task.samples[start : min(start + 64, len(task.samples.prompts))]
            check_prompts(task.model, task.axis, rows, task.settings.guidance)

    def predict_step(self, batch: list[int], batch_idx: int) -> Tensor:
        rows = [self.task.samples[number] for number in batch]
        ranks = Ranks(self, batch)
        self.planned = ranks.agree(self.planned)  # only the first rank's machine is sure to have the file
        steps = self.unfinished.steps // len(self.groups)
        self._advance(len(self.planned))

        def planned(step: PlannedStep) -> None:
            self.planned.append(step)
            if ranks.first:
                self.unfinished.keep(self.planned)
            self._advance(1)

        for place, group in enumerate(self.groups):
            known = self.planned[place * steps : (place + 1) * steps]
            if len(known) < steps:
                StepPlanner(self.task, rows, group, ranks, self.portions).plan(known, planned, steps)
        return torch.tensor(len(batch))

    def _advance(self, steps: int) -> None:
        if self.progress is not None and steps:
            self.progress(steps * len(self.task.samples))


def plan_stepwise(
    model: Model,
    axis: Axis,
    samples: Samples,
    settings: Stepwise,
    allocate: bool = False,
    stay: Sequence[Axis] = (),
    candidates: Tensor | None = None,
    *,
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    unfinished: Path | None = None,
    **trainer: Any,
) -> NeuronMask | None:
    """Plan a mask along the neutral prompts' treated trajectories.

    Args:
        model: The pipeline; its weights, precision and device are the same afterwards.
        axis: The bias axis.
        samples: Calibration; evaluate on other seeds.
        settings: See `Stepwise`.
        allocate: Plan one damping a group, for images that are allotted to it; otherwise one that balances.
        stay: Other axes along whose directions predictions should not move.
        candidates: (N,) bool, the neurons that may be damped, such as those that relevance located; None for all.
        progress: Called with the number of samples, once a group and treated step; at first for all kept steps.
        warn: Called once if the samples did not fit in memory together.
        unfinished: File (.safetensors) that keeps planned steps, which are not planned again, on any number of devices.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy.

    Returns:
        On rank zero a mask of the conditional branch with a bin for each treated step; None on any other rank. Its
        `metadata["selection"]["steps"]` gives for each step mean |lean - target| before and after, and the movement off
        the axis in units of ||d||, on the samples planned on.

    Raises:
        InputError: No step is treated, the candidates are not of this model, fewer samples than ranks, a single sample
            does not fit in memory, or `unfinished` was planned in another configuration.
        Incomplete: Ranks planned too few or too many steps.
    """
    timesteps = schedule_of(model, settings.steps, settings.guidance).timesteps
    treated = settings.treated(timesteps)
    if not treated:
        raise InputError(f"until {settings.until:g}: no step lies above it; timesteps run from {timesteps[0]:g}")
    sites = find_sites(inner(model.network), settings.kinds, settings.sites)
    task = PlanTask(model, axis, samples, settings, sites, stay, candidates)
    about, how = _record(task)
    groups: list[int | None] = [*range(len(axis))] if allocate else [None]
    kept = Unfinished(unfinished, _configuration(task, allocate, about, how), task.neurons, len(groups) * len(treated))
    module = Planning(task, groups, kept, progress, warn)
    runner = predict(module, model, range(len(samples)), len(samples), **trainer)
    if len(module.planned) != kept.steps:
        raise Incomplete(f"{len(module.planned)} of {kept.steps} steps were planned; run again")
    if not runner.is_global_zero:
        return None
    by_group = [module.planned[i : i + len(treated)] for i in range(0, kept.steps, len(treated))]
    edges = _edges(list(dict.fromkeys(treated)), model.training_steps, timesteps)
    return _mask(sites, edges, by_group, axis.groups if allocate else (), {**about, **gate_words(axis)}, how)


def _record(task: PlanTask) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a mask's metadata says of the model and the samples, and of how it was planned."""
    model, axis, samples, settings = task.model, task.axis, task.samples, task.settings
    about = {
        **model.about,
        "unet_shapes": shapes_digest(inner(model.network)),
        "unet_weights": weights_digest(inner(model.network)),
        "axis": axis.name,
        "words": list(axis.words),
        **samples.about(),
        **label_metadata(samples.labels),
        "scheduler": type(model.pipe.scheduler).__name__,
        "steps": settings.steps,
        "guidance": settings.guidance,
    }
    how = {name: value for name, value in asdict(settings).items() if name not in ("steps", "guidance", "batch_size")}
    how |= {"kinds": list(settings.kinds), "sites": list(settings.sites), "stay": [axis.name for axis in task.stay]}
    return about, {**how, "candidates": None if task.candidates is None else int(task.candidates.sum())}


def _configuration(task: PlanTask, allocate: bool, about: dict[str, Any], how: dict[str, Any]) -> dict[str, Any]:
    """All that a plan depends on."""
    words = [list(axis.words) for axis in task.stay]
    among = None if task.candidates is None else plain_digest("candidates", task.candidates)
    return {**about, **how, "allocate": allocate, "stay_words": words, "candidates": among}


def _mask(
    sites: list[Site],
    edges: Tensor,
    by_group: list[list[PlannedStep]],
    groups: tuple[str, ...],
    about: dict[str, Any],
    how: dict[str, Any],
) -> NeuronMask:
    """The mask of the planned steps; of the only trajectory where there are no groups."""
    # Some samplers come back to a timestep, with the same damping.
    by_group = [list({step.figures["timestep"]: step for step in steps}.values()) for steps in by_group]
    stacked = [_stacked(steps) for steps in by_group]
    factors, roots = torch.stack([factors for factors, _ in stacked]), None
    if stacked[0][1] is not None:
        roots = torch.stack([roots for _, roots in stacked if roots is not None])
    figures = [[step.figures for step in steps] for steps in by_group]
    forecast = _forecast(edges.tolist(), figures)
    if not groups:
        factors, roots = factors[0], None if roots is None else roots[0]
    selection = {"method": "stepwise", **how, "steps": figures if groups else figures[0], "bins": forecast}
    return NeuronMask(sites, edges, factors, roots, "conditional", {**about, "selection": selection}, groups)


def _edges(treated: list[float], first: float, timesteps: Sequence[float]) -> Tensor:
    """Bins half-way between treated steps, the last half-way to the next step, so that finer samplers fit in."""
    following = max((t for t in timesteps if t < treated[-1]), default=0.0)
    inner = [(high + low) / 2 for high, low in zip(treated, [*treated[1:], following], strict=True)]
    return torch.tensor([max(first, treated[0] + 1), *inner], dtype=torch.float64)


def _forecast(edges: list[float], figures: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """What was planned in each bin, means over groups, in the form of `treatment_plan`; leans are |lean - target|."""
    names = {"lean_before": "before", "lean_after": "after", "off_axis": "off_axis"}
    return [
        {"from": edges[t], "to": edges[t + 1]}
        | {name: sum(step[key] for step in steps) / len(steps) for name, key in names.items()}
        for t, steps in enumerate(zip(*figures, strict=True))
    ]
