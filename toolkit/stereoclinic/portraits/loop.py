"""The training loop that all stages of the embedded model share: learning rate, checkpoint, resume, progress."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError
from stereoclinic.io.files import write_whole

log = logging.getLogger("stereoclinic.portraits")

BATCH = {"autoencoder": 16, "text": 256, "unet": 64, "flow": 64, "reader": 64}
RATE = {"autoencoder": 2e-3, "text": 2e-3, "unet": 1e-3, "flow": 1e-3, "reader": 2e-3}


def learning_rate(progress: float) -> float:
    """Warm up over 1 %, hold, then fall to zero over the last 35 %. The end can be moved without retraining."""
    return min(1.0, progress / 0.01 + 0.01, max(0.0, (1 - progress) / 0.35))


class Stage:
    """One stage's training. A stage that was interrupted continues where it stopped; one that is done is loaded."""

    def __init__(self, fabric: L.Fabric, run: Path, name: str, samples: int, digest: str) -> None:
        self.fabric, self.name, self.samples, self.digest = fabric, name, samples, digest
        self.path = run / f"{name}.ckpt"
        self.batch = max(1, BATCH[name] // fabric.world_size)
        self.together = self.batch * fabric.world_size
        self.steps = math.ceil(samples / self.together)
        self.compile = False

    def fit(
        self,
        loss: nn.Module,
        batches: Callable[[np.random.Generator, int], tuple[Tensor, ...]],
        average: nn.Module | None = None,
        look: Callable[[], None] | None = None,
        every_s: float = 120.0,
    ) -> None:
        """Minimise `loss(*batch)`.

        Args:
            loss: Its weights are trained.
            batches: Gives a batch of so many samples.
            average: Follows the weights of `loss` exponentially.
            look: Called after each checkpoint.
            every_s: Seconds between checkpoints.
        """
        optimizer = torch.optim.AdamW(loss.parameters(), lr=RATE[self.name], betas=(0.9, 0.99), weight_decay=0.01)
        parts = {"weights": loss, "optimizer": optimizer} | ({} if average is None else {"average": average})
        first = self._resume(parts)
        if first == self.steps:
            return
        if self.compile:
            loss.compile(dynamic=False)
        wrapped, optimizer = self.fabric.setup(loss, optimizer)
        parts["optimizer"] = optimizer
        if average is not None:
            average.to(self.fabric.device)
        began = last = time.monotonic()
        mean_loss = 0.0
        for step in range(first, self.steps):
            rng = np.random.default_rng([self.fabric.global_rank, step, *self.name.encode()])
            for group in optimizer.param_groups:
                group["lr"] = RATE[self.name] * learning_rate(step / self.steps)
            value = wrapped(*batches(rng, self.batch))
            self.fabric.backward(value)
            self.fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                _follow(average, loss, min(0.999, (step + 1) / (step + 10)))
            mean_loss += (value.item() - mean_loss) / min(step - first + 1, 100)
            now = time.monotonic()
            if step % 100 == 99 or step + 1 == self.steps:
                self._report(step + 1, mean_loss, (step + 1 - first) * self.together / (now - began))
            if now - last > every_s:
                last = now
                self._save(step + 1, parts, look)
        self._save(self.steps, parts, look)
        self.fabric.barrier()

    def _resume(self, parts: dict[str, Any]) -> int:
        """Load what was saved, and give the step to continue with."""
        if not self.path.exists():
            return 0
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["world"] != self.digest:
            raise InputError(
                f"{self.path} was trained on another world or for another denoiser; choose another --run folder"
            )
        for name, part in parts.items():
            part.load_state_dict(state[name])
        seen: int = state["seen"]
        log.info("%s: resumed at %d of %d samples", self.name, seen, self.samples)
        return min(self.steps, math.ceil(seen / self.together))

    def _save(self, step: int, parts: dict[str, Any], look: Callable[[], None] | None) -> None:
        if not self.fabric.is_global_zero:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"world": self.digest, "seen": step * self.together}
        write_whole(self.path, lambda temporary: torch.save(state, temporary))
        if look is not None:
            look()

    def _report(self, step: int, mean_loss: float, speed: float) -> None:
        if self.fabric.is_global_zero:
            seen = step * self.together
            log.info(
                "%s: %d/%d samples, loss %.4f, %.0f samples/s, %.0f min left",
                *(self.name, seen, self.samples, mean_loss, speed, (self.samples - seen) / speed / 60),
            )


@torch.no_grad()
def _follow(average: nn.Module, network: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), network.parameters(), strict=True):
        kept.lerp_(new.detach().to(kept.dtype), 1 - decay)
