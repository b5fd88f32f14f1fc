"""Does relevance add up? The conservation check: one relevance step, balanced at every cut through the network.

The target is <f, v> with f the prediction and v = f held constant: its total ||f||^2 is far from zero. A composite that
conserves misses it by rounding alone, at every cut of ``cuts``. `epsilon-attnlrp` does not conserve, for softmax holds
a bias term that no rule of it accounts for (Achtibat et al. 2024, section 3.3.1), and plain gradients conserve nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stereoclinic.ddtd import rules
from stereoclinic.ddtd.composites import Composite, get_composite
from stereoclinic.ddtd.cuts import Cut, balance
from stereoclinic.ddtd.operations import mark
from stereoclinic.ddtd.runs import Runs
from stereoclinic.ddtd.sinks import Audit, dot
from stereoclinic.errors import InputError

#: How far relevance may miss the target by rounding, by the dtype that the model runs in; measured in tests/ddtd. Some
#: transformers compute norms and rotations in float32 whatever they run in.
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass(frozen=True)
class Conservation:
    """The outcome of `check`.

    Attributes:
        composite: the rules, by name.
        dtype: what the prediction was made in.
        batch: samples in the pass.
        total: the target, ||f||^2 summed over the batch.
        cuts: one for each block, first to last; empty where the prediction is not finite.
        uncovered: how often each operation came that has no rule, by its name; it was passed by its own gradient.
        fault: what is not a number, and where; None if all is well.
        kept_bytes: what one sample keeps in memory from the forward pass to the relevance pass.
        exact: whether the composite conserves by definition, so that more than rounding is a fault.
    """

    composite: str
    dtype: torch.dtype
    batch: int
    total: float
    cuts: tuple[Cut, ...]
    uncovered: dict[str, int]
    fault: str | None
    kept_bytes: int
    exact: bool

    @property
    def rounding(self) -> float:
        """The error up to which relevance counts as conserved."""
        return ROUNDING.get(self.dtype, 0.0)

    @property
    def error(self) -> float:
        """The largest error of any cut; infinite where there is none to show."""
        return max((cut.error for cut in self.cuts), default=math.inf)

    @property
    def conserves(self) -> bool:
        """Whether relevance adds up, to the rounding of the model's dtype, at every cut."""
        return self.error <= self.rounding


def check(
    network: nn.Module,
    run: Callable[[], Tensor],
    composite: Composite | str | Path = "epsilon-cp",
    *,
    text: Sequence[Tensor] = (),
) -> Conservation:
    """Propagate the relevance of one prediction and balance it at every cut.

    The network is left as it came, and runs in its own dtype: float64 tells a rule that does not conserve from
    rounding.

    Args:
        network: a denoiser's network, compiled or not, that is a function of its arguments.
        run: calls the network once, on conditional rows, and returns what it predicts, (B, ...).
        composite: a composite, the name of one, or a .toml file.
        text: what of the call's arguments depends on the prompt: the very tensors that ``run`` passes. Text states
            have three dimensions or more, or come in lists; pooled text has two.

    Raises:
        InputError: no such composite; the network has no blocks or none of them runs; the prediction is zero.
    """
    composite = composite if isinstance(composite, Composite) else get_composite(composite)
    network = getattr(network, "_orig_mod", network)  # what torch.compile wrapped
    mode = Audit(composite, network)
    passed = Runs(network)
    cuts: tuple[Cut, ...] = ()
    with torch.enable_grad(), _frozen(network), _marked(text), passed, _kept(network) as kept:
        with mode:
            f = run()
        if not any(ran.name in passed.blocks for ran in passed.runs):
            raise InputError(f"no block of {type(network).__name__} ran: expected `run` to call this very network")
        total, fault = float(dot(f, f)), passed.fault
        if fault is None and not math.isfinite(total):
            fault = "the prediction holds NaN or infinity"
        if total == 0:
            raise InputError("the prediction is zero everywhere: nothing to decompose; are the weights loaded?")
        if fault is None:
            cuts = balance(passed, mode.taken, f, total)
    for cut in reversed(cuts):
        if fault is None and not math.isfinite(cut.sum):
            fault = f"relevance turns NaN or infinite in `{cut.before}`"
    kept_bytes = sum(storage.nbytes() for storage in kept.values()) // len(f)
    exact = composite.strict and composite.rules.get("attention") is rules.attention_cp
    return Conservation(composite.name, f.dtype, len(f), total, cuts, dict(mode.uncovered), fault, kept_bytes, exact)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Nothing asks about the weights: what depends on them alone is a constant."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def _marked(text: Sequence[Tensor]) -> Iterator[None]:
    """Text is told from modulation by where it came from."""
    mark(list(text), "text")
    try:
        yield
    finally:
        mark(list(text), "")


@contextmanager
def _kept(unet: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """What is kept for the backward pass, by address: each storage once, weights not at all."""
    own = {x.untyped_storage().data_ptr() for x in (*unet.parameters(), *unet.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x.detach()  # the tensor itself would hold on to the node that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept
