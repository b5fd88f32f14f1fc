"""DDTD as a Lightning predict loop: Lightning spreads the samples over devices, a metric adds their relevance up."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from torch import Tensor

from stereoclinic import prompts as prompt_sets
from stereoclinic.axes import Axis
from stereoclinic.ddtd.memory import Portions
from stereoclinic.ddtd.neurons import find_sites
from stereoclinic.ddtd.relevance import STATES, Relevance, RelevanceSums
from stereoclinic.ddtd.shards import Kept, Shards
from stereoclinic.ddtd.step import uncompiled
from stereoclinic.ddtd.target import Classifier
from stereoclinic.ddtd.trajectory import Settings, bin_of, check_prompts, walk
from stereoclinic.denoisers.base import Denoiser
from stereoclinic.digest import shapes_digest, weights_digest
from stereoclinic.errors import Incomplete
from stereoclinic.predict import predict

#: A run that loses a larger share of its samples to values that are not finite is none.
MOST_DROPPED = 0.01


class DDTD(L.LightningModule):
    """Wraps a frozen denoiser; `predict_step` walks a batch of samples and adds their relevance to `sums`.

    Args:
        denoiser: The model; its weights are frozen.
        axis: The bias axis.
        labels: Every label that occurs, in the order of the result's rows.
        settings: Composite, root, target, steps, guidance, bins.
        samples: All there are, on every rank; the run is incomplete with fewer.
        classifier: For the target of that name.
        progress: Called after each measured step with the number of samples in it.
        warn: Told what does not stop the run: a batch that did not fit in memory, a sample that was dropped.
        shards: Keeps what was measured as the run goes; None keeps nothing.
        kept: What earlier attempts measured; the loop is to be given the other samples.

    After the run `total` holds the sums over all ranks, on the CPU, and `dropped` how many samples fell out.
    """

    total: dict[str, Tensor]
    dropped: int

    def __init__(
        self,
        denoiser: Denoiser,
        axis: Axis,
        labels: list[str],
        settings: Settings,
        samples: Dataset,
        classifier: Classifier | None = None,
        progress: Callable[[int], None] | None = None,
        warn: Callable[[str], None] = warnings.warn,
        shards: Shards | None = None,
        kept: Kept = Kept(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.denoiser, self.axis, self.labels, self.settings = denoiser, axis, labels, settings
        self.samples, self.classifier, self.progress, self.warn = samples, classifier, progress, warn
        self.unet = denoiser.unet  # registered, so that Lightning moves it
        self.sites = find_sites(uncompiled(self.unet), settings.kinds)
        self.edges = settings.edges(denoiser.pipe.scheduler.config.num_train_timesteps)
        timesteps = denoiser.timesteps(settings.steps)
        settings.check_bins(timesteps, self.edges)
        self.timesteps = timesteps[:: settings.every].double().cpu()  # (M,)
        neurons = sum(site.width for site in self.sites)
        self.sums = RelevanceSums(len(labels), settings.bins, len(axis), neurons, len(self.timesteps))
        self.portions = Portions(warn=warn)
        self.shards, self.kept = shards, kept
        self.numbers = {(row["prompt"], row["seed"]): number for number, row in enumerate(samples)}
        self.samples_done: list[int] = []
        self.samples_dropped = 0
        self.first_fault = ""

    def on_predict_start(self) -> None:
        self.denoiser.to(self.device)
        rows = list({row["prompt"]: row for row in self.samples}.values())
        for start in range(0, len(rows), 64):
            check_prompts(self.denoiser, self.axis, rows[start : start + 64])

    def predict_step(self, batch: list[dict], batch_idx: int) -> Tensor:
        labels = torch.tensor([self.labels.index(row["label"]) for row in batch], device=self.device)
        seeds = torch.tensor([row["seed"] for row in batch], device=self.device)
        lost: dict[int, str] = {}  # samples that have had a fault; nothing of them counts from there on
        steps = walk(self.denoiser, self.sites, self.axis, batch, self.settings, self.classifier, self.portions)
        for number, step in enumerate(steps):
            for row in step.faults.keys() - lost.keys():
                lost[row] = step.faults[row]
                self._drop(batch[row], step.timestep, lost[row])
            bin_ = bin_of(step.timestep, self.edges)
            self.sums.update(labels, seeds, bin_, number, replace(step, faults=lost))
            if self.progress is not None:
                self.progress(len(batch))
        self.samples_done += [self.numbers[row["prompt"], row["seed"]] for row in batch]
        self._keep()
        return torch.tensor(len(batch))

    def _keep(self, last: bool = False) -> None:
        if self.shards is not None:
            sums = {name: getattr(self.sums, name) for name in STATES}
            self.shards.write(self.global_rank, sums, self.samples_done, self.samples_dropped, last)

    def _drop(self, row: dict, timestep: float, where: str) -> None:
        self.samples_dropped += 1
        if not self.first_fault:
            self.first_fault = (
                f"at timestep {timestep:g} of {row['prompt']!r}, seed {row['seed']}, {where} are not finite"
            )
            self.warn(f"{self.first_fault}; such samples are dropped from there on")

    def on_predict_end(self) -> None:
        """Every rank counts what it did: a rank that died must not pass for a finished run.

        The ranks add up here, while their sums lie on the device: Lightning's teardown moves them to the CPU, where
        a group of GPUs cannot gather them.
        """
        self._keep(last=True)
        counts = torch.tensor([len(self.samples_done), self.samples_dropped], device=self.device)
        done, dropped = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        done, self.dropped = done + len(self.kept.done), dropped + self.kept.dropped
        if done != len(self.samples):
            raise Incomplete(f"{done} of {len(self.samples)} samples were measured; run again")
        _check_dropped(self.dropped, done, self.first_fault)
        before = self.kept.sums(self.sums.shapes) if self.global_rank == 0 else {}
        self.total = {name: value.cpu() + before.get(name, 0) for name, value in self.sums.compute().items()}


def locate(
    denoiser: Denoiser,
    axis: Axis,
    samples: Dataset,
    settings: Settings,
    *,
    batch_size: int = 16,
    classifier: Classifier | None = None,
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
    shards: Path | None = None,
    **trainer: Any,
) -> Relevance | None:
    """Find where the axis lives: relevance of every neuron, summed over samples and ranks.

    The denoiser is left as it came, in weights, precision and place.

    Args:
        denoiser: The model.
        axis: The bias axis.
        samples: Rows with `prompt` and `seed`, see `prompts.with_seeds`.
        settings: What is decomposed, and how.
        batch_size: Samples walked together on one device; changes nothing but rounding. Where memory runs out the model
            is given fewer at a time.
        classifier: For the target "classifier": pictures (B, 3, H, W) in [0, 1], or latents, to logits (B, K).
        progress: Called with the number of samples of each measured step.
        warn: Told, once each, of a batch that did not fit in memory and of a sample that was dropped.
        shards: Folder that keeps what was measured as the run goes. What lies there is not measured again, on however
            many devices; remove the folder once the relevance is saved.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy, precision.

    Returns:
        The relevance on rank zero, None on any other rank.

    Raises:
        InputError: Fewer samples than ranks, a bin that no measured step falls in, prompts or predictions that are the
            same for all groups, a target without its classifier, or a single sample that does not fit in memory.
        Incomplete: Samples are missing at the end, or more than 1 % of them had values that are not finite.
        KeyboardInterrupt: As pressed.
    """
    how = settings.how(denoiser.unet, classifier)
    labels = list(dict.fromkeys(samples["label"]))
    unet, seeds = uncompiled(denoiser.unet), sorted(set(samples["seed"]))
    about = {
        "model": denoiser.model,
        "unet_shapes": shapes_digest(unet),
        "unet_weights": weights_digest(unet),
        "precision": str(trainer.get("precision") or "32-true"),
        "axis": axis.name,
        "words": list(axis.words),
        "prompts": prompt_sets.digest(samples.select(range(len(samples) // len(seeds)))),
        "samples": len(samples),
        "seeds": [seeds[0], seeds[-1]],
        "scheduler": type(denoiser.pipe.scheduler).__name__,
        "target": settings.target,
        **({"classifier_on": settings.classifier_on} if settings.target == "classifier" else {}),
        "composite": how.propagation.composite.name,
        "composite_digest": how.propagation.composite.digest()[:16],
        "root": "rooted" if how.rooted else "plain",
        "steps": settings.steps,
        "every": settings.every,
        "guidance": settings.guidance,
    }
    store, kept, left = None, Kept(), samples
    if shards is not None:
        beside = {"bins": settings.bins, "kinds": list(settings.kinds), "collateral_every": settings.collateral_every}
        store = Shards(shards, {**about, **beside})
        kept = store.kept()
        there = set(kept.done)
        left = samples.select([number for number in range(len(samples)) if number not in there])
    module = DDTD(denoiser, axis, labels, settings, samples, classifier, progress, warn, store, kept)
    if len(left):
        runner = predict(module, denoiser, left, batch_size, **trainer)
        if not runner.is_global_zero:
            return None
        total, dropped = module.total, module.dropped
    else:
        total, dropped = kept.sums(module.sums.shapes), kept.dropped
        _check_dropped(dropped, len(samples))
    metadata = {
        **about,
        "dropped": dropped,
        "versions": {name: version(name) for name in ("stereoclinic", "torch", "diffusers", "lightning")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Relevance(
        module.sites,
        axis.groups,
        labels,
        module.edges,
        **total,
        metadata=metadata,
        timesteps=module.timesteps,
    )


def _check_dropped(dropped: int, done: int, fault: str = "") -> None:
    if dropped > MOST_DROPPED * done:
        raise Incomplete(
            f"{dropped} of {done} samples were dropped, more than {MOST_DROPPED:.0%}:"
            f" {fault or 'elsewhere, values were not finite'}; try --precision 32-true"
        )
