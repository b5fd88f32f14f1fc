"""DDTD as a Lightning predict loop: Lightning spreads the samples over devices, a metric adds their relevance up."""

import warnings
from array import array
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from stereoclinic.ddtd.checkpoint import Checkpoint, Shards
from stereoclinic.ddtd.lean import Classifier
from stereoclinic.ddtd.relevance import STATES, Relevance, RelevanceSums
from stereoclinic.ddtd.sharding import SHARDED, Evened, check_sharded, sharded
from stereoclinic.ddtd.trajectory import Measured, Settings, bin_of, check_prompts, walk
from stereoclinic.errors import Incomplete, InputError
from stereoclinic.io.digest import shapes_digest, weights_digest
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import Axis, gate_words
from stereoclinic.prompts.sets import Row, Samples
from stereoclinic.prompts.streams import Stream
from stereoclinic.runtime.predict import predict

#: A run that loses a larger share of its samples to values that are not finite is none.
MOST_DROPPED = 0.01


class DDTD(L.LightningModule):
    """Wraps a frozen denoiser; `predict_step` walks a batch of samples and adds their relevance to `sums`.

    Args:
        model: The pipeline; its weights are frozen.
        axis: The bias axis.
        settings: Composite, root, target, steps, guidance, bins.
        samples: What is to be measured, the same on every rank, or a stream of it. Fewer are an incomplete run.
        classifier: For the target of that name.
        progress: Called after each measured step with the number of samples in it.
        warn: Told what does not stop the run: a batch that did not fit in memory, a sample that was dropped.
        shards: Keeps what was measured as the run goes; None keeps nothing.
        kept: What earlier attempts measured, and is not among the samples.

    After the run `total` holds the sums over all ranks, on the CPU, with a row for each of `labels`; `done` says how
    many samples were measured, and `dropped` how many fell out.
    """

    total: dict[str, Tensor]
    done: int
    dropped: int

    def __init__(
        self,
        model: Model,
        axis: Axis,
        settings: Settings,
        samples: Samples | Stream,
        classifier: Classifier | None = None,
        progress: Callable[[int], None] | None = None,
        warn: Callable[[str], None] = warnings.warn,
        shards: Shards | None = None,
        kept: Checkpoint = Checkpoint(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.model, self.axis, self.settings = model, axis, settings
        self.samples, self.classifier, self.progress, self.warn = samples, classifier, progress, warn
        self.network = model.network  # registered, so that Lightning moves it
        self.sites = find_sites(inner(self.network), settings.kinds, settings.sites)
        self.timesteps = settings.timesteps(model)  # (M,)
        self.edges = settings.edges(self.timesteps, model.training_steps)
        neurons = sum(site.width for site in self.sites)
        self.labels = list(samples.labels)
        self.sums = RelevanceSums(len(self.labels), len(self.edges) - 1, len(axis), neurons, len(self.timesteps))
        self.portions = AdaptiveBatch(warn=warn)
        self.shards, self.kept = shards, kept
        self.samples_done = array("q")
        self.samples_dropped = 0
        self.first_fault = ""

    def configure_model(self) -> None:
        """Share the weights out over ranks where a strategy wants that; nothing was moved to a device yet."""
        if self.device_mesh is not None:
            self.network = sharded(inner(self.model.network), self.device_mesh["data_parallel"])
            self.model.replace(self.network)
            self.portions.parted = False  # all ranks gather a block together, and so must make the same passes

    def on_predict_start(self) -> None:
        self.model.to(self.device)
        found = torch.tensor([len(self.kept.done)], device=self.device)
        if int(self.trainer.strategy.reduce(found, reduce_op="sum")) != self.trainer.world_size * len(self.kept.done):
            raise InputError(
                "the devices find different shards of an earlier run: write to a folder that all machines share, or"
                " remove the shards"
            )
        if isinstance(self.samples, Stream):
            return  # whose prompts are seen as they come
        for start in range(0, len(self.samples.prompts), 64):
            last = min(start + 64, len(self.samples.prompts))
            check_prompts(self.model, self.axis, self.samples[start:last], self.settings.guidance, self.settings.steps)

    def predict_step(self, batch: list[Row], batch_idx: int) -> Tensor:
        if isinstance(self.samples, Stream):
            check_prompts(self.model, self.axis, batch, self.settings.guidance, self.settings.steps)
            self._meet([row["label"] for row in batch])
        labels = torch.tensor([self.labels.index(row["label"]) for row in batch], device=self.device)
        seeds = torch.tensor([row["seed"] for row in batch], device=self.device)
        real = [row for row in batch if row["number"] is not None]
        # Samples that have had a fault, of which nothing counts from there on; and those that only keep ranks in step.
        lost = {i: "" for i, row in enumerate(batch) if row["number"] is None}
        numbers = count()

        def measured(step: Measured) -> None:
            for row in step.faults.keys() - lost.keys():
                lost[row] = step.faults[row]
                self._drop(batch[row], step.timestep, lost[row])
            bin_ = bin_of(step.timestep, self.edges)
            self.sums.update(labels, seeds, bin_, next(numbers), replace(step, faults=lost))
            if self.progress is not None:
                self.progress(len(real))

        walk(self.model, self.sites, self.axis, batch, self.settings, measured, self.classifier, self.portions)
        self.samples_done.extend(row["number"] for row in real)
        self._keep()
        return torch.tensor(len(batch))

    def _meet(self, labels: list[str]) -> None:
        """Make room for labels of a stream that were not met before; twice what is needed, as more are to come."""
        self.labels += [label for label in dict.fromkeys(labels) if label not in self.labels]
        there = self.sums.count.shape[0]
        if len(self.labels) > there:
            self.sums.relabel(list(range(there)), max(2 * there, len(self.labels)))

    def _keep(self, last: bool = False) -> None:
        if self.shards is not None:
            sums = {name: getattr(self.sums, name) for name in STATES}
            self.shards.write(self.global_rank, sums, self.samples_done, self.labels, self.samples_dropped, last)

    def _drop(self, row: Row, timestep: float, where: str) -> None:
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
        given = self.samples.given if isinstance(self.samples, Stream) else 0
        counts = torch.tensor([len(self.samples_done), self.samples_dropped, given], device=self.device)
        done, dropped, given = self.trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        before = len(self.kept.done)
        expected = given if isinstance(self.samples, Stream) else len(self.samples)
        if done != expected:
            raise Incomplete(f"{done + before} of {expected + before} samples were measured; run again")
        self.done, self.dropped = done + before, dropped + self.kept.dropped
        _check_dropped(self.dropped, self.done, self.first_fault)
        if isinstance(self.samples, Stream):
            self._agree()
        earlier = self.kept.sums(self.labels, self.sums.shapes) if self.global_rank == 0 else {}
        # torchmetrics hands back what has one element as a scalar: the count of one prompt in one bin.
        sums = {name: value.cpu().view(getattr(self.sums, name).shape) for name, value in self.sums.compute().items()}
        self.total = {name: value + earlier.get(name, 0) for name, value in sums.items()}

    def _agree(self) -> None:
        """Ranks met other labels in another order: the same rows for all, before they are added up."""
        met: list[Any] = [self.labels]
        if self.trainer.world_size > 1:
            met = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(met, self.labels)
        labels = sorted({label for each in (*met, self.kept.labels) for label in each})
        self.sums.relabel([labels.index(label) for label in self.labels], len(labels))
        self.labels = labels


def _that_adds_in_float64(accelerator: Any) -> Any:
    """The accelerator, or the CPU in place of Apple's GPU where the choice is left open."""
    if not torch.backends.mps.is_available() or accelerator not in ("auto", "gpu", "mps"):
        return accelerator
    if accelerator == "mps":
        raise InputError("accelerator 'mps': relevance is summed in float64, which mps does not have; give cpu")
    return "cpu"


def locate(
    model: Model,
    axis: Axis,
    samples: Samples | Stream,
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

    The model is left as it came, in weights, precision and place.

    Args:
        model: The pipeline.
        axis: The bias axis.
        samples: See `prompts.with_seeds`; or a stream, of which every rank reads its own part.
        settings: What is decomposed, and how.
        batch_size: Samples walked together on one device; changes nothing but rounding. Where memory runs out the model
            is given fewer at a time.
        classifier: For the target "classifier": pictures (B, 3, H, W) in [0, 1], or latents, to logits (B, K).
        progress: Called with the number of samples of each measured step.
        warn: Told, once each, of a batch that did not fit in memory and of a sample that was dropped.
        shards: Folder that keeps what was measured as the run goes. What lies there is not measured again, on however
            many devices; remove the folder once the relevance is saved.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy, precision. The strategy
            "fsdp" is our own, see `ddtd.sharding`; it takes the number of devices.

    Returns:
        The relevance on rank zero, None on any other rank.

    Raises:
        InputError: Fewer samples than ranks at the start of a run, an empty stream, more labels than fit in memory, a
            bin that no measured step falls in, prompts or predictions that are the same for all groups, a target
            without its classifier, a single sample that does not fit in memory, an accelerator without float64, or what
            cannot be done with shared-out weights.
        Incomplete: Samples are missing at the end, or more than 1 % of them had values that are not finite.
        KeyboardInterrupt: As pressed.
    """
    trainer["accelerator"] = _that_adds_in_float64(trainer.get("accelerator", "auto"))
    how = settings.how(model.network, classifier)
    network = inner(model.network)
    ranks: Any = trainer.get("devices", 1) * trainer.get("num_nodes", 1)  # no number where Lightning is to choose
    if together := trainer.get("strategy") == SHARDED:  # ranks must make the same passes
        check_sharded(network, samples, settings.composite, trainer.get("precision"), ranks)
        # Lightning's own "fsdp" is torch's first one.
        trainer["strategy"] = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    about = {
        **model.about,
        "unet_shapes": shapes_digest(network),
        "unet_weights": weights_digest(network),
        "precision": str(trainer.get("precision") or "32-true"),
        "axis": axis.name,
        "words": list(axis.words),
        **samples.about(),
        "scheduler": type(model.pipe.scheduler).__name__,
        "target": settings.target,
        **({"classifier_on": settings.classifier_on} if settings.target == "classifier" else {}),
        "composite": how.propagation.composite.name,
        "composite_digest": how.propagation.composite.digest()[:16],
        "root": "rooted" if how.rooted else "plain",
        "steps": settings.steps,
        "every": settings.every,
        "guidance": settings.guidance,
        **({"patterns": list(settings.sites)} if settings.sites else {}),
    }
    store, kept = None, Checkpoint()
    if shards is not None:
        beside = {
            "bins": settings.bins,
            "kinds": list(settings.kinds),
            "sites": list(settings.sites),
            "collateral_every": settings.collateral_every,
        }
        store = Shards(shards, {**about, **beside})
        kept = store.kept()
    module = DDTD(model, axis, settings, samples.without(kept.done), classifier, progress, warn, store, kept)
    if isinstance(module.samples, Stream) or len(module.samples):
        items: Samples | Stream | Evened = module.samples
        if isinstance(items, Samples) and (together or (kept.done and isinstance(ranks, int) and len(items) < ranks)):
            items = Evened(items, ranks)  # what is left of a run may be fewer than its ranks, by no one's mistake
        runner = predict(module, model, items, batch_size, **trainer)
        if not runner.is_global_zero:
            return None
        total, done, dropped = module.total, module.done, module.dropped
    else:
        total, done, dropped = kept.sums(module.labels, module.sums.shapes), len(kept.done), kept.dropped
        _check_dropped(dropped, done)
    if not done:
        raise InputError(f"{about['prompts']}: no prompts in it")
    metadata = {
        **about,
        **gate_words(axis),
        "samples": done,
        "dropped": dropped,
        "versions": {name: version(name) for name in ("stereoclinic", "torch", "diffusers", "lightning")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Relevance(
        module.sites,
        axis.groups,
        module.labels,
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
