"""Lightning's predict loop for a frozen model: items are spread over ranks, and no results are kept in memory.

Relevance is measured through it, and images are drawn.

What ranks that share a computation exchange: every rank has its own samples, and all decide alike.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.utilities.distributed import gather_all_tensors

from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.model import Model

T = TypeVar("T")


class Ranks:
    """The ranks of a module's trainer; without a module, one process alone.

    Args:
        module: Whose `predict_step` runs.
        numbers: The numbers of this rank's samples.

    Attributes:
        first: Whether this is the first rank.
    """

    def __init__(self, module: L.LightningModule | None = None, numbers: Sequence[int] = ()) -> None:
        self._module = None if module is None or module.trainer.world_size == 1 else module
        self.first = module is None or module.global_rank == 0
        self._order: Tensor | None = None
        if self._module is not None:
            self._order = self.gather(torch.tensor(numbers)).argsort()

    def gather(self, own: Tensor) -> Tensor:
        """(own samples, ...) to (all samples, ...), on the CPU, in the order of the samples.

        Sums over samples are then the same, bit for bit, on any number of ranks.
        """
        if self._module is None:
            return own.cpu()
        gathered = torch.cat(gather_all_tensors(own.to(self._module.device).contiguous())).cpu()
        return gathered if self._order is None else gathered[self._order]

    def agree(self, value: T) -> T:
        """The first rank's value, plain or on the CPU: rounding could make ranks decide differently."""
        if self._module is None:
            return value
        agreed: T = self._module.trainer.strategy.broadcast(value)
        return agreed


def predict(
    module: L.LightningModule,
    model: Model,
    items: Sequence[Any] | IterableDataset[Any],
    batch_size: int,
    *,
    what: str = "samples",
    advice: str = "give more prompts or fewer devices",
    alone: bool = False,
    **trainer: Any,
) -> L.Trainer:
    """Run a module's predict loop over items; the model keeps its weights, precision and device.

    Args:
        module: Its `predict_step` gets lists of items.
        model: What the module wraps.
        items: Every rank gets its part of them.
        batch_size: Items together on one device.
        what: Name of the items in errors.
        advice: For the error where there are fewer items than ranks.
        alone: Whether one of several processes that a launcher started does this by itself.
        **trainer: Options of `lightning.Trainer`: accelerator, devices, num_nodes, strategy, precision.

    Returns:
        The trainer, which knows whether this is rank zero.

    Raises:
        InputError: There are fewer items than ranks, the strategy shards weights or keeps results in processes of its
            own, or a launcher (torchrun, srun) started another number of processes than asked for.
        KeyboardInterrupt: As pressed.
    """
    runner = _trainer(alone, trainer)
    if not isinstance(items, IterableDataset) and len(items) < runner.world_size:
        raise InputError(f"{len(items)} {what} for {runner.world_size} devices: {advice}")
    with _restore(model, _CASTS.get(str(runner.precision))), _interruptible():
        loader: DataLoader[Any] = DataLoader(items, batch_size, collate_fn=list)  # type: ignore[arg-type]
        runner.predict(module, loader, return_predictions=False)
    return runner


def _trainer(alone: bool, options: dict[str, Any]) -> L.Trainer:
    """A trainer whose strategy and number of processes can do the work."""
    if str(strategy := options.get("strategy")).startswith(_SHARING):
        raise InputError(
            f"strategy {strategy!r} shards the model's weights, which only measuring relevance can do, by 'fsdp'; use"
            " 'ddp', and --dtype bfloat16 where the model does not fit"
        )
    try:
        runner = L.Trainer(
            inference_mode=False,  # relevance needs gradients; the default would forbid them
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Terminable()],
            **options,
        )
    except (ValueError, RuntimeError) as error:  # the launcher's processes do not match the options
        raise InputError(f"devices: {error}") from error
    # Lightning's own launcher sets WORLD_SIZE too, and leaves it set.
    launched = "WORLD_SIZE" if torch.distributed.is_torchelastic_launched() else "SLURM_STEP_NUM_TASKS"
    started = int(os.environ.get(launched) or 1)
    if started > 1 and runner.world_size == 1 and not alone:
        raise InputError(
            f"{started} processes were started, and each would do all the work; give --devices (those of one machine)"
            " and --num-nodes"
        )
    if getattr(runner.strategy.launcher, "_start_method", None):
        raise InputError(f"strategy {strategy!r} keeps its results in processes of its own; use 'ddp'")
    return runner


#: Lightning's strategies that shard the module's weights: nothing here calls the whole module.
_SHARING = ("fsdp", "deepspeed")


class _Terminable(L.Callback):
    """SIGTERM ends a run like Ctrl-C; Lightning alone would run on to the end."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # Lightning restores the handler


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


#: What Lightning casts the weights to, in place.
_CASTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@contextmanager
def _restore(model: Model, cast: torch.dtype | None) -> Iterator[None]:
    """Restore the model's device and precision: Lightning casts the model and moves it to the CPU at the end."""
    network, device, dtype = model.network, model.device, model.dtype
    kept = None
    if cast is not None and cast != dtype:
        kept = {name: value.clone() for name, value in network.state_dict().items()}
    try:
        with nullcontext() if kept is None or cast is None else _translated(tree.inner(network), dtype, cast):
            yield
    finally:
        model.replace(network)
        if kept is not None:
            network.load_state_dict(kept, assign=True)
        model.to(device)


@contextmanager
def _translated(network: nn.Module, dtype: torch.dtype, cast: torch.dtype) -> Iterator[None]:
    """Cast the arguments of a denoiser to its new dtype, and its output back to the pipeline's.

    The timestep keeps its dtype: half precision would round it to another.
    """

    def to(given: torch.dtype) -> Callable[[Any, Any], Any]:
        return lambda path, x: x.to(given) if isinstance(x, Tensor) and x.is_floating_point() else x

    def enter(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = tree.named(module, args, kwargs)
        return (), {name: x if name in tree.TIMESTEP else tree.changed(x, to(cast), {}) for name, x in given.items()}

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return tree.with_sample(output, tree.changed(tree.sample_of(output), to(dtype), {}))

    handles = [
        network.register_forward_pre_hook(enter, prepend=True, with_kwargs=True),
        network.register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise Ctrl-C as KeyboardInterrupt: Lightning turns it into exit code 1 and ignores it from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
