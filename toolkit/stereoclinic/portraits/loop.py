"""The training loop that all stages of the embedded model share: learning rate, checkpoint, resume, progress."""

import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError

log = logging.getLogger("stereoclinic.portraits")

BATCH = {"autoencoder": 16, "text": 256, "unet": 64, "reader": 64}
RATE = {"autoencoder": 2e-3, "text": 2e-3, "unet": 1e-3, "reader": 2e-3}


def learning_rate(progress: float) -> float:
    """Warm up over 1 %, hold, fall to zero over the last 35 %: the end can be moved without losing what was learnt."""
    return min(1.0, progress / 0.01 + 0.01, max(0.0, (1 - progress) / 0.35))


class Stage:
    """One stage's loop: learning rate, checkpoint, resume, progress."""

    def __init__(self, fabric: L.Fabric, run: Path, name: str, samples: int, digest: str) -> None:
        self.fabric, self.name, self.samples, self.digest = fabric, name, samples, digest
        self.path = run / f"{name}.ckpt"
        self.batch = max(1, BATCH[name] // fabric.world_size)
        self.steps = math.ceil(samples / (self.batch * fabric.world_size))

    def saved(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        state: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        if state["world"] != self.digest:
            raise InputError(f"{self.path} was trained on another world; choose another --run folder")
        return state

    def save(self, **state: object) -> None:
        if self.fabric.is_global_zero:
            temporary = self.path.with_suffix(".tmp")
            torch.save({"world": self.digest, **state}, temporary)
            os.replace(temporary, self.path)

    def fit(
        self,
        loss: nn.Module,
        batches: Callable[[np.random.Generator, int], tuple[Tensor, ...]],
        average: nn.Module | None = None,
        look: Callable[[], None] | None = None,
        every_s: float = 120.0,
    ) -> None:
        """Minimise `loss(*batch)`; `average`, if given, follows the weights of `loss` exponentially.

        A stage that is done is loaded, not run again.
        """
        optimizer = torch.optim.AdamW(loss.parameters(), lr=RATE[self.name], betas=(0.9, 0.99), weight_decay=0.01)
        together = self.batch * self.fabric.world_size
        first = 0
        if (state := self.saved()) is not None:
            loss.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
            if average is not None:
                average.load_state_dict(state["average"])
            first = min(self.steps, math.ceil(state["seen"] / together))
            log.info("%s: resumed at %d of %d samples", self.name, state["seen"], self.samples)
            if first == self.steps:
                return
        wrapped, optimizer = self.fabric.setup(loss, optimizer)
        if average is not None:
            average.to(self.fabric.device)

        def checkpoint(step: int) -> None:
            extra = {"average": average.state_dict()} if average is not None else {}
            self.save(
                weights=loss.state_dict(),
                optimizer=optimizer.state_dict(),
                seen=step * together,
                **extra,
            )
            if look is not None and self.fabric.is_global_zero:
                look()

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
                decay = min(0.999, (step + 1) / (step + 10))
                with torch.no_grad():
                    pairs = zip(average.parameters(), loss.parameters(), strict=True)
                    for kept, new in pairs:
                        kept.lerp_(new.detach().to(kept.dtype), 1 - decay)
            mean_loss += (value.item() - mean_loss) / min(step - first + 1, 100)
            now = time.monotonic()
            if self.fabric.is_global_zero and (step % 100 == 99 or step + 1 == self.steps):
                seen = (step + 1) * together
                speed = (step + 1 - first) * together / (now - began)
                log.info(
                    "%s: %d/%d samples, loss %.4f, %.0f samples/s, %.0f min left",
                    *(self.name, seen, self.samples, mean_loss, speed, (self.samples - seen) / speed / 60),
                )
            if now - last > every_s:
                last = now
                checkpoint(step + 1)
        checkpoint(self.steps)
        self.fabric.barrier()
