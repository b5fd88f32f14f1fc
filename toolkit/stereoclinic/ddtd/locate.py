"""DDTD over many samples: Lightning spreads them over devices, and their relevance is summed."""

import warnings
from array import array
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from stereoclinic.ddtd.checkpoint import Checkpoint, Shards
from stereoclinic.ddtd.lean import Classifier
from stereoclinic.ddtd.relevance import Relevance, RelevanceSums
from stereoclinic.ddtd.sharding import SHARDED, Evened, check_sharded, sharded
from stereoclinic.ddtd.step import Measured
from stereoclinic.ddtd.trajectory import Settings, check_prompts, walk
from stereoclinic.errors import Incomplete, InputError
from stereoclinic.pipelines.arguments import inner
from stereoclinic.pipelines.bins import bin_of
from stereoclinic.pipelines.memory import AdaptiveBatch
from stereoclinic.pipelines.model import Model
from stereoclinic.pipelines.record import created_now, made_by
from stereoclinic.pipelines.sites import find_sites
from stereoclinic.prompts.axes import Axis, gate_words
from stereoclinic.prompts.sets import Row, Samples
from stereoclinic.prompts.streams import Stream
from stereoclinic.runtime.predict import predict

#: A run that loses a larger share of its samples to values that are not finite fails.
MOST_DROPPED = 0.01


class DDTD(L.LightningModule):
    """Wraps a frozen denoiser; `predict_step` measures a batch of samples and adds their relevance to `sums`.

    Arguments as for `run_ddtd`; `shards` keeps what was measured as the run goes, and `kept` is what earlier attempts
    measured, which is not among the samples. After the run `total` holds the sums over all ranks, on the CPU, with a
    row for each of `labels`; `done` is the number of measured samples, `dropped` of those that were dropped.
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
        self.sums.to(self.device)
        (found,) = self._sum_over_ranks(len(self.kept.done))
        if found != self.trainer.world_size * len(self.kept.done):
            raise InputError(
                "the devices see different shards of an earlier run: write to a folder that all machines share, or"
                " remove the shards"
            )
        if isinstance(self.samples, Samples):  # a stream's prompts are checked as they come
            for start in range(0, len(self.samples.prompts), 64):
                self._check_prompts(self.samples[start : min(start + 64, len(self.samples.prompts))])

    def predict_step(self, batch: list[Row], batch_idx: int) -> Tensor:
        if isinstance(self.samples, Stream):
            self._check_prompts(batch)
            self._add_labels([row["label"] for row in batch])
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

    def on_predict_end(self) -> None:
        """Every rank counts its samples, so that a dead rank is not taken for a finished one.

        The ranks add up here, before the teardown ends their process group.
        """
        self._keep(last=True)
        stream = self.samples if isinstance(self.samples, Stream) else None
        given = 0 if stream is None else stream.given
        done, dropped, given = self._sum_over_ranks(len(self.samples_done), self.samples_dropped, given)
        before, expected = len(self.kept.done), len(self.samples) if isinstance(self.samples, Samples) else given
        if done != expected:
            raise Incomplete(f"{done + before} of {expected + before} samples were measured; run again")
        if stream is not None:
            self._agree_on_labels()
        reduce = self.trainer.strategy.reduce
        sums = {name: reduce(value, reduce_op="sum").cpu() for name, value in self.sums.tensors.items()}
        self.finish(sums, done, dropped)

    def finish(self, sums: dict[str, Tensor], done: int = 0, dropped: int = 0) -> None:
        """Add what earlier attempts measured; set `total`, `done` and `dropped`; refuse if too many were dropped."""
        self.done, self.dropped = done + len(self.kept.done), dropped + self.kept.dropped
        if self.dropped > MOST_DROPPED * self.done:
            raise Incomplete(
                f"{self.dropped} of {self.done} samples were dropped, more than {MOST_DROPPED:.0%}:"
                f" {self.first_fault or 'elsewhere, values were not finite'}; try --precision 32-true"
            )
        earlier = self.kept.sums(self.labels, self.sums.shapes) if self.global_rank == 0 else {}
        self.total = {name: value + earlier.get(name, 0) for name, value in sums.items()}

    def relevance(self, about: dict[str, Any]) -> Relevance:
        """The result, with metadata of how it was made."""
        if not self.done:
            raise InputError(f"{about['prompts']}: no prompts in it")
        counts = {"samples": self.done, "dropped": self.dropped}
        metadata = {**about, **gate_words(self.axis), **counts, **created_now()}
        bins = {"bin_edges": self.edges, "timesteps": self.timesteps}
        return Relevance(self.sites, self.axis.groups, self.labels, **bins, **self.total, metadata=metadata)

    def _sum_over_ranks(self, *numbers: int) -> list[int]:
        summed: Tensor = self.trainer.strategy.reduce(torch.tensor(numbers, device=self.device), reduce_op="sum")
        return [int(number) for number in summed]

    def _check_prompts(self, rows: list[Row]) -> None:
        check_prompts(self.model, self.axis, rows, self.settings.guidance, self.settings.steps)

    def _add_labels(self, labels: list[str]) -> None:
        """Make room for new labels of a stream: for twice as many as needed, as more are to come."""
        self.labels += [label for label in dict.fromkeys(labels) if label not in self.labels]
        if len(self.labels) > self.sums.labels:
            self.sums.relabel(list(range(self.sums.labels)), max(2 * self.sums.labels, len(self.labels)))

    def _agree_on_labels(self) -> None:
        """Give all ranks the same rows, as each met the labels of its part in another order."""
        met: list[Any] = [self.labels]
        if self.trainer.world_size > 1:
            met = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(met, self.labels)
        labels = sorted({label for some in (*met, self.kept.labels) for label in some})
        self.sums.relabel([labels.index(label) for label in self.labels], len(labels))
        self.labels = labels

    def _keep(self, last: bool = False) -> None:
        if self.shards is not None:
            tensors = self.sums.tensors
            self.shards.write(self.global_rank, tensors, self.samples_done, self.labels, self.samples_dropped, last)

    def _drop(self, row: Row, timestep: float, where: str) -> None:
        self.samples_dropped += 1
        if not self.first_fault:
            place = f"at timestep {timestep:g} of {row['prompt']!r}, seed {row['seed']}"
            self.first_fault = f"{place}, {where} are not finite"
            self.warn(f"{self.first_fault}; such samples are dropped from there on")


def run_ddtd(
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
    """Measure the relevance of every neuron, summed over samples and ranks.

    The model keeps its weights, precision and device.

    Args:
        model: The pipeline.
        axis: The bias axis.
        samples: See `prompts.with_seeds`; or a stream, of which every rank reads its own part.
        settings: What is decomposed, and how.
        batch_size: Samples run together on one device; changes nothing but rounding. Where memory runs out the model
            is given fewer at a time.
        classifier: For the target "classifier": images (B, 3, H, W) in [0, 1], or latents, to logits (B, K).
        progress: Called with the number of samples of each measured step.
        warn: Called once for a batch that did not fit in memory, and once for a dropped sample.
        shards: Folder that keeps what was measured as the run goes. What is there is not measured again, on any number
            of devices; remove the folder once the relevance is saved.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy, precision. The strategy
            "fsdp" is our own, see `ddtd.sharding`; it takes the number of devices.

    Returns:
        The relevance on rank zero, None on any other rank.

    Raises:
        InputError: Fewer samples than ranks at the start of a run, an empty stream, more labels than fit in memory, a
            bin without a measured step, prompts or predictions that are the same for all groups, a target without its
            classifier, a sample that does not fit in memory, an accelerator without float64, or something that
            shared-out weights do not allow.
        Incomplete: Samples are missing at the end, or more than 1 % of them had values that are not finite.
        KeyboardInterrupt: As pressed.
    """
    trainer["accelerator"] = _with_float64(trainer.get("accelerator", "auto"))
    about = _about(model, axis, samples, settings, classifier, trainer.get("precision"))
    ranks: Any = trainer.get("devices", 1) * trainer.get("num_nodes", 1)  # no number where Lightning is to choose
    if together := trainer.get("strategy") == SHARDED:
        check_sharded(inner(model.network), samples, settings.composite, trainer.get("precision"), ranks)
        # Lightning's own "fsdp" is torch's first one.
        trainer["strategy"] = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    store = None if shards is None else _shards(shards, about, settings)
    kept = Checkpoint() if store is None else store.kept()
    module = DDTD(model, axis, settings, samples.without(kept.done), classifier, progress, warn, store, kept)
    if isinstance(module.samples, Samples) and not len(module.samples):
        module.finish(module.sums.tensors)
        return module.relevance(about)
    items = _evened(module.samples, ranks, together, resumed=bool(kept.done))
    runner = predict(module, model, items, batch_size, **trainer)
    return module.relevance(about) if runner.is_global_zero else None


def _evened(samples: Samples | Stream, ranks: Any, together: bool, resumed: bool) -> Samples | Stream | Evened:
    """The samples, evened out where ranks must make the same passes or there are fewer samples left than ranks."""
    if isinstance(samples, Stream):
        return samples
    few = resumed and isinstance(ranks, int) and len(samples) < ranks
    return Evened(samples, ranks) if together or few else samples


def _with_float64(accelerator: Any) -> Any:
    """The accelerator, or the CPU in place of Apple's GPU where the choice is left open."""
    if not torch.backends.mps.is_available() or accelerator not in ("auto", "gpu", "mps"):
        return accelerator
    if accelerator == "mps":
        raise InputError("accelerator 'mps': relevance is summed in float64, which mps does not have; give cpu")
    return "cpu"


def _shards(folder: Path, about: dict[str, Any], settings: Settings) -> Shards:
    more = {name: getattr(settings, name) for name in ("bins", "collateral_every")}
    lists = {name: list(getattr(settings, name)) for name in ("kinds", "sites")}
    return Shards(folder, {**about, **more, **lists})


def _about(
    model: Model,
    axis: Axis,
    samples: Samples | Stream,
    settings: Settings,
    classifier: Classifier | None,
    precision: str | None,
) -> dict[str, Any]:
    """Everything that relevance depends on, as its file says it; errors are those of `Settings.for_step`."""
    step = settings.for_step(model.network, classifier)
    composite = step.propagation.composite
    return {
        **made_by(model, axis, samples, settings.steps, settings.guidance),
        "precision": str(precision or "32-true"),
        "target": settings.target,
        **({"classifier_on": settings.classifier_on} if settings.target == "classifier" else {}),
        "composite": composite.name,
        "composite_digest": composite.digest()[:16],
        "root": "rooted" if step.rooted else "plain",
        "every": settings.every,
        **({"patterns": list(settings.sites)} if settings.sites else {}),
    }
