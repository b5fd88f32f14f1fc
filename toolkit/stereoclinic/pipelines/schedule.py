"""The timesteps of a pipeline's call, in the scheduler's units and in the denoiser's."""

from dataclasses import dataclass
from typing import Any

import torch

from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.intercept import Left, Watcher, call_pipeline
from stereoclinic.pipelines.learn import PROMPTS, learnt_of, remembered
from stereoclinic.pipelines.model import Model


@dataclass(frozen=True)
class Schedule:
    """The steps of a pipeline's call.

    Attributes:
        timesteps: The scheduler's, noisiest first, at which the denoiser is called.
        told: The denoiser's argument at each; empty where it has none.
    """

    timesteps: tuple[float, ...]
    told: tuple[float, ...]

    def timestep(self, told: float) -> float:
        """The scheduler's timestep for one that the denoiser is given, interpolated linearly between the steps."""
        if not self.told or self.told == self.timesteps:
            return told
        pairs = sorted(set(zip(self.told, self.timesteps, strict=True)))
        if len(pairs) == 1:
            return pairs[0][1] * told / pairs[0][0] if pairs[0][0] else pairs[0][1]
        after = next((i for i, (x, _) in enumerate(pairs) if x >= told), len(pairs) - 1)
        (x0, y0), (x1, y1) = pairs[max(after, 1) - 1], pairs[max(after, 1)]
        return y0 + (told - x0) * (y1 - y0) / (x1 - x0)


def schedule_of(model: Model, steps: int, guidance: float) -> Schedule:
    """The timesteps of a pipeline's call, set up by the pipeline itself; its denoiser is not run.

    Raises:
        InputError: The pipeline cannot make this number of steps, or walks from an image to noise.
    """
    known, key = remembered(model, "schedule", steps, guidance)
    if key not in known:
        known[key] = _schedule(model, steps, guidance)
    found: Schedule = known[key]
    return found


@torch.no_grad()
def _schedule(model: Model, steps: int, guidance: float) -> Schedule:
    learnt = learnt_of(model, guidance, steps)
    timesteps, told = dict[int, float](), dict[int, float]()

    def called(watcher: Watcher, arguments: dict[str, Any]) -> Any:
        if watcher.steps not in timesteps:
            timesteps[watcher.steps] = watcher.timestep
            value = tree.timestep_of(arguments)
            if value is not None:
                told[watcher.steps] = value
        return learnt.stub(0, arguments)

    def stepped(step: int, prediction: Any) -> None:
        if step >= len(model.pipe.scheduler.timesteps):
            raise Left

    watcher = Watcher(model, called, stepped)
    call_pipeline(model, watcher, PROMPTS[:1], [torch.Generator().manual_seed(0)], steps, guidance, learning=True)
    found = tuple(timesteps.values())
    if len(found) > 1 and found[0] < found[-1]:
        name = type(model.pipe.scheduler).__name__
        raise InputError(f"{name} walks from an image to noise; use the scheduler that it inverts")
    return Schedule(found, tuple(told.values()) if len(told) == len(found) else ())
