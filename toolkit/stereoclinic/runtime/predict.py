"""Lightning's predict loop as this house runs it: a frozen model, items spread over ranks, nothing kept in memory.

`ddtd.module` measures relevance through it, `evaluation.bench.drawing` draws pictures.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from stereoclinic.errors import InputError
from stereoclinic.pipelines import arguments as tree
from stereoclinic.pipelines.model import Model


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
    """Run a module's predict loop over items, and leave the model in weights, precision and place as it came.

    Args:
        module: Its `predict_step` is given lists of items.
        model: What the module wraps.
        items: Every rank gets its part of them; a stream gives each its own.
        batch_size: Items together on one device.
        what: The items are called, in errors.
        advice: What to do where there are fewer items than ranks.
        alone: One process of several that a launcher started does this by itself, and the others do not.
        **trainer: Given to `lightning.Trainer`: accelerator, devices, num_nodes, strategy, precision.

    Returns:
        The trainer, which knows whether this is rank zero.

    Raises:
        InputError: Fewer items than ranks, a strategy that shares weights out or whose processes would keep the
            results to themselves, or a launcher (torchrun, srun) that started another number of processes than was
            asked for.
        KeyboardInterrupt: As pressed.
    """
    if str(strategy := trainer.get("strategy")).startswith(_SHARING):
        raise InputError(
            f"strategy {strategy!r} shares the model's weights out, which is done for measuring relevance alone, by"
            " 'fsdp'; use 'ddp', and --dtype bfloat16 where the model does not fit"
        )
    try:
        runner = L.Trainer(
            inference_mode=False,  # relevance needs gradients; the default would forbid them
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[_Terminable()],
            **trainer,
        )
    except (ValueError, RuntimeError) as error:  # what a launcher started and what was asked for do not go together
        raise InputError(f"devices: {error}") from error
    # Lightning's own launcher sets WORLD_SIZE too, and leaves it behind for whatever this process does next.
    launched = "WORLD_SIZE" if torch.distributed.is_torchelastic_launched() else "SLURM_STEP_NUM_TASKS"
    started = int(os.environ.get(launched) or 1)
    if started > 1 and runner.world_size == 1 and not alone:
        raise InputError(
            f"{started} processes were started, and each would do all the work; say so by --devices (those of one"
            " machine) and --num-nodes"
        )
    if getattr(runner.strategy.launcher, "_start_method", None):
        raise InputError(f"strategy {strategy!r} keeps its results in processes of its own; use 'ddp'")
    if not isinstance(items, IterableDataset) and len(items) < runner.world_size:
        raise InputError(f"{len(items)} {what} for {runner.world_size} devices: {advice}")
    with _restore(model, _CASTS.get(str(runner.precision))), _interruptible():
        loader: DataLoader[Any] = DataLoader(items, batch_size, collate_fn=list)  # type: ignore[arg-type]
        runner.predict(module, loader, return_predictions=False)
    return runner


#: How Lightning's strategies are called that wrap the module in something of their own: nothing here calls it whole.
_SHARING = ("fsdp", "deepspeed")


class _Terminable(L.Callback):
    """`kill`, and a scheduler's, ends a run as Ctrl-C does; Lightning takes note of it and goes on to the end."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # Lightning puts back what was there before it


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


#: What Lightning casts the weights to, in place.
_CASTS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@contextmanager
def _restore(model: Model, cast: torch.dtype | None) -> Iterator[None]:
    """Leave the model where it was and as precise as it was: Lightning casts it, and tears down to the CPU."""
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
    """Hand a denoiser that alone was cast its arguments in the new dtype, and its pipeline the output in the old one.

    But for the timestep, which half precision would round to another.
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
    """Lightning turns Ctrl-C into exit code 1, as of a failure, and is deaf to it from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from stop
