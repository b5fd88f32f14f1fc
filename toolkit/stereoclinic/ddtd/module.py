"""DDTD as a Lightning predict loop: Lightning spreads the samples over devices, a metric adds their relevance up."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from stereoclinic import prompts as prompt_sets
from stereoclinic.axes import Axis
from stereoclinic.ddtd.neurons import find_sites
from stereoclinic.ddtd.relevance import Relevance, RelevanceSums
from stereoclinic.ddtd.trajectory import Settings, bin_of, walk
from stereoclinic.denoisers.stable_diffusion import StableDiffusion
from stereoclinic.digest import shapes_digest, weights_digest
from stereoclinic.errors import Incomplete, InputError


class DDTD(L.LightningModule):
    """Wraps a frozen denoiser; `predict_step` walks a batch of samples and adds their relevance to `sums`.

    Args:
        denoiser: The model; its weights are frozen.
        axis: The bias axis.
        labels: Every label that occurs, in the order of the result's rows.
        settings: Composite, root, steps, guidance, bins.
        samples: How many there are in all; the run is incomplete with fewer.
        progress: Called after each measured step with the number of samples in it.

    After the run `total` holds the sums over all ranks, on the CPU.
    """

    total: dict[str, Tensor]

    def __init__(
        self,
        denoiser: StableDiffusion,
        axis: Axis,
        labels: list[str],
        settings: Settings,
        samples: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self.denoiser, self.axis, self.labels, self.settings = denoiser, axis, labels, settings
        self.samples, self.progress = samples, progress
        self.unet = denoiser.unet  # registered, so that Lightning moves it
        self.sites = find_sites(self.unet, settings.kinds)
        self.edges = settings.edges(denoiser.pipe.scheduler.config.num_train_timesteps)
        neurons = sum(site.width for site in self.sites)
        self.sums = RelevanceSums(len(labels), settings.bins, len(axis), neurons)
        self.samples_done = 0

    def on_predict_start(self) -> None:
        self.denoiser.to(self.device)

    def predict_step(self, batch: list[dict], batch_idx: int) -> Tensor:
        labels = torch.tensor([self.labels.index(row["label"]) for row in batch], device=self.device)
        seeds = torch.tensor([row["seed"] for row in batch], device=self.device)
        for step in walk(self.denoiser, self.sites, self.axis, batch, self.settings):
            if not torch.isfinite(step.relevance).all() or not torch.isfinite(step.collateral).all():
                raise InputError(
                    f"relevance is not finite at timestep {step.timestep:g} of {batch[0]['prompt']!r};"
                    " try --precision 32-true"
                )
            self.sums.update(
                labels,
                seeds,
                bin_of(step.timestep, self.edges),
                step.lean,
                step.relevance,
                step.collateral,
                step.means,
            )
            if self.progress is not None:
                self.progress(len(batch))
        self.samples_done += len(batch)
        return torch.tensor(len(batch))

    def on_predict_end(self) -> None:
        """Every rank counts what it did: a rank that died must not pass for a finished run.

        The ranks add up here, while their sums lie on the device: Lightning's teardown moves them to the CPU, where
        a group of GPUs cannot gather them.
        """
        done = self.trainer.strategy.reduce(torch.tensor(self.samples_done, device=self.device), reduce_op="sum")
        if int(done) != self.samples:
            raise Incomplete(f"{int(done)} of {self.samples} samples were measured; run again")
        self.total = {name: value.cpu() for name, value in self.sums.compute().items()}


def locate(
    denoiser: StableDiffusion,
    axis: Axis,
    samples: Dataset,
    settings: Settings,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    **trainer: Any,
) -> Relevance | None:
    """Find where the axis lives: relevance of every neuron, summed over samples and ranks.

    The denoiser is left as it came, in weights, precision and place.

    Args:
        denoiser: The model.
        axis: The bias axis.
        samples: Rows with `prompt` and `seed`, see `prompts.with_seeds`.
        settings: What is decomposed, and how.
        batch_size: Samples walked together on one device; changes nothing but rounding.
        progress: Called with the number of samples of each measured step.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy, precision.

    Returns:
        The relevance on rank zero, None on any other rank.

    Raises:
        InputError: Fewer samples than ranks, a bin that no measured step falls in, or values that are not finite.
        Incomplete: Samples are missing at the end.
        KeyboardInterrupt: As pressed.
    """
    labels = list(dict.fromkeys(samples["label"]))
    module = DDTD(denoiser, axis, labels, settings, len(samples), progress)
    runner = L.Trainer(
        inference_mode=False,  # relevance needs gradients; the default would forbid them
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    if getattr(runner.strategy.launcher, "_start_method", None):
        raise InputError(f"strategy {trainer.get('strategy')!r} keeps its results in processes of its own; use 'ddp'")
    if len(samples) < runner.world_size:
        raise InputError(f"{len(samples)} samples for {runner.world_size} devices: give more prompts or fewer devices")
    settings.check_bins(denoiser.timesteps(settings.steps), module.edges)
    digests = {"unet_shapes": shapes_digest(denoiser.unet), "unet_weights": weights_digest(denoiser.unet)}
    with _put_back(denoiser, _CASTS.get(str(runner.precision))), _interruptible():
        runner.predict(module, DataLoader(samples, batch_size, collate_fn=list), return_predictions=False)
    if not runner.is_global_zero:
        return None
    seeds = sorted(set(samples["seed"]))
    metadata = {
        "model": denoiser.model,
        **digests,
        "precision": str(runner.precision),
        "axis": axis.name,
        "words": list(axis.words),
        "prompts": prompt_sets.digest(samples.select(range(len(samples) // len(seeds)))),
        "samples": len(samples),
        "seeds": [seeds[0], seeds[-1]],
        "scheduler": type(denoiser.pipe.scheduler).__name__,
        "composite": settings.composite,
        "root": settings.root,
        "steps": settings.steps,
        "every": settings.every,
        "guidance": settings.guidance,
        "versions": {name: version(name) for name in ("stereoclinic", "torch", "diffusers", "lightning")},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Relevance(module.sites, axis.groups, labels, module.edges, **module.total, metadata=metadata)


#: What Lightning casts the weights to, in place.
_CASTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@contextmanager
def _put_back(denoiser: StableDiffusion, cast: torch.dtype | None) -> Iterator[None]:
    """Leave the denoiser where it was and as precise as it was: Lightning casts it, and tears down to the CPU."""
    device, dtype = denoiser.device, denoiser.unet.dtype
    kept = None
    if cast is not None and cast != dtype:
        kept = {name: value.clone() for name, value in denoiser.unet.state_dict().items()}
    try:
        yield
    finally:
        if kept is not None:
            denoiser.unet.load_state_dict(kept, assign=True)
        denoiser.to(device)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning turns Ctrl-C into exit code 1, as of a failure, and is deaf to it from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
