"""The calls of a pipeline's denoiser, seen before the denoiser does.

    pipe(prompts)  --arguments-->  watcher  --pass-->  denoiser     once for the pipeline's own rows, and whenever
                   <--output-----           <--------               a visitor asks for more at the same point

During the call the denoiser's class is replaced by one whose `__call__` gives its arguments to the watcher. Inside a
pass it has its own class again, so hooks, offloading, compiled code and sharded weights work as usual.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stereoclinic.errors import InputError, first_line
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.model import Model

#: Name of the network's attribute that holds the `Pass` under way; hooks of masks read it.
PASS = "_stereoclinic_pass"
#: Marks the class that a watched denoiser has during the call.
WATCHED = "_stereoclinic_watched"


class Left(BaseException):
    """Leaves a pipeline's call early. Not an `Exception`, so that no pipeline catches it."""


@dataclass(frozen=True)
class Pass:
    """One pass of the denoiser.

    Args:
        step: Steps of the scheduler done before.
        timestep: The scheduler's.
        samples: Which image of the pipeline's call each row belongs to.
        conditional: Whether each row sees the prompt.
        treated: False for a comparison, which masks leave alone.
        total: Images in the pipeline's call.
    """

    step: int
    timestep: float
    samples: tuple[int, ...]
    conditional: tuple[bool, ...]
    treated: bool
    total: int


def pass_of(network: nn.Module) -> Pass | None:
    """The watched pass that a network is in; None outside one, or where masks should not act."""
    found: Pass | None = tree.inner(network).__dict__.get(PASS)
    return found


@contextmanager
def announced(network: nn.Module, what: Pass | None) -> Iterator[None]:
    """Set what the passes of a network within a `with` block are about; None where masks should not act."""
    network.__dict__[PASS] = what
    try:
        yield
    finally:
        del network.__dict__[PASS]


class Watcher:
    """Replaces the denoiser's `__call__` and counts the scheduler's steps within a `with` block.

    Args:
        model: The pipeline.
        called: Takes the arguments of each of the denoiser's calls by name, and returns the output.
        stepped: Called after each step with the number of steps done and the prediction; may raise `Left`.
    """

    def __init__(
        self,
        model: Model,
        called: Callable[["Watcher", dict[str, Any]], Any],
        stepped: Callable[[int, Any], None] = lambda step, prediction: None,
    ) -> None:
        self.model, self.called, self.stepped = model, called, stepped
        self.steps = 0
        self.failure: BaseException | None = None  # raised by `called` or `stepped`: not the pipeline's fault
        self._network, self._scheduler = model.network, model.pipe.scheduler

    def __enter__(self) -> "Watcher":
        own = type(self._network)
        if hasattr(own, WATCHED):
            raise RuntimeError(
                "this pipeline's call is watched already; enter suppress(model, mask) and the like before the walk, not"
                " in its visitor"
            )

        def call(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with self._ours():
                return self.called(self, tree.named(network, args, kwargs))

        self._own, self._watched = own, type(own.__name__, (own,), {"__call__": call, WATCHED: True})
        self._watched.__module__ = own.__module__
        self._network.__class__ = self._watched
        step, self._step = self._scheduler.step, self._scheduler.__dict__.get("step")

        @functools.wraps(step)
        def counted(prediction: Any, *args: Any, **kwargs: Any) -> Any:
            found = step(prediction, *args, **kwargs)
            self.steps += 1
            with self._ours():
                self.stepped(self.steps, prediction)
            return found

        self._scheduler.step = counted
        return self

    def __exit__(self, *failure: object) -> None:
        self._network.__class__ = self._own
        del self._scheduler.step
        if self._step is not None:  # somebody else's wrapper
            self._scheduler.step = self._step

    @contextmanager
    def _ours(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.failure = error
            raise

    @property
    def timestep(self) -> float:
        """The scheduler's timestep of the step under way."""
        timesteps = self._scheduler.timesteps
        return float(timesteps[min(self.steps, len(timesteps) - 1)])

    def run(self, arguments: dict[str, Any], what: Pass | None = None) -> Any:
        """One pass of the denoiser, unwatched.

        Raises:
            RuntimeError: The pipeline's call has ended.
        """
        if type(self._network) is not self._watched:
            raise RuntimeError("the watched call has ended; only its visitor can ask for predictions")
        self._network.__class__ = self._own
        try:
            with announced(tree.inner(self._network), what):
                return self._network(**arguments)
        finally:
            self._network.__class__ = self._watched


def call_pipeline(
    model: Model,
    watcher: Watcher | None,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    steps: int,
    guidance: float,
    output: str = "latent",
    learning: bool = False,
) -> Any:
    """`pipe(...)`; None where the watcher left it.

    While a pipeline is learnt, only the watcher is ours; any other error is the model's fault.

    Raises:
        InputError: The pipeline refuses what it is given.
    """
    given = {"prompt": list(prompts), "generator": list(generators), "num_inference_steps": steps}
    given |= model.options(guidance, len(prompts)) | {"output_type": output}
    for name, value in given.items():
        if name.startswith("negative_prompt") and isinstance(value, str):  # some pipelines want one for each prompt
            given[name] = [value] * len(prompts)
    bars = getattr(model.pipe, "_progress_bar_config", {})
    model.pipe.set_progress_bar_config(disable=True)
    try:
        if watcher is None:
            return model.pipe(**given)
        with watcher:
            return model.pipe(**given)
    except Left:
        free = getattr(model.pipe, "maybe_free_model_hooks", None)
        if free is not None:
            free()
        return None
    except Exception as error:
        ours = watcher is not None and (watcher.failure is error or (watcher.steps and not learning))
        if ours or not (learning or isinstance(error, ValueError | TypeError | IndexError | ZeroDivisionError)):
            raise
        raise InputError(
            f"{type(model.pipe).__name__} refuses its call ({steps} steps): {first_line(error)}"
        ) from error
    finally:
        model.pipe._progress_bar_config = bars
