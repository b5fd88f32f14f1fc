"""Does relevance add up? The conservation check: one relevance step, balanced at every cut through the network.

The target is <f, v> with f the prediction and v = f held constant: its total ||f||^2 is far from zero. A composite that
conserves misses it by rounding alone, at every cut of `cuts`. `epsilon-attnlrp` does not conserve, for softmax holds
a bias term that no rule of it accounts for (Achtibat et al. 2024, section 3.3.1), and plain gradients conserve nothing.

Cuts through a network: what crosses each, what enters behind it, and whether that adds up.

A cut lies before each block, in the order in which the blocks run, and before the layers after them. Everything that
reaches the output from there on enters the next block, waits outside for a later one (a skip connection, the image's
tokens while the text's are refined), enters at a block behind the cut (modulation, text), or is a constant. So

    image + text tokens + skips + modulation + text + bias = <f, v>

Blocks are passed back one by one, from the last, and so is what lies between two (`runs`). Each item is measured,
none is what the others leave.

References:
    Bach et al. 2015, On pixel-wise explanations by layer-wise relevance propagation, eq. 2: conservation.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stereoclinic.ddtd.boundaries import Runs
from stereoclinic.ddtd.rules import functions as rules
from stereoclinic.ddtd.rules.composites import Composite, get_composite
from stereoclinic.ddtd.rules.operations import mark
from stereoclinic.ddtd.sinks import Audit, dot
from stereoclinic.errors import InputError

#: What relevance is itemised by, in the order of a table.
ITEMS = ("image", "text_tokens", "tokens", "skips", "modulation", "text", "bias")
#: What a U-Net has always; its names for two of them.
_OF_UNETS = {"image": "hidden", "skips": "skips", "modulation": "time", "text": "text", "bias": "bias"}


@dataclass(frozen=True)
class Cut:
    """What crosses one cut, in units of the target; the shares add up to the total.

    Attributes:
        before: the block, or the layer after the last one, that the cut lies before.
        shares: relevance by item. An item that is 0 at every cut may be left out. Those of a U-Net:
            `hidden`, the hidden state that enters the block;
            `skips`, of the skip connections made before the cut and used behind it;
            `time`, of the time embedding (with added conditions) where it enters a block behind the cut;
            `text`, of the text states where they enter a block behind the cut;
            `bias`, of the biases and other constants behind the cut, and what layers with a rule of their own absorb.
            Of a transformer: `image`, `text_tokens`, or `tokens` where both stand in one sequence and the split
            is not known; `skips`, `text` and `bias` as above; `modulation`, of what depends on time, guidance
            or pooled text, where it enters a block behind the cut.
        total: the target at the output.
    """

    before: str
    shares: dict[str, float]
    total: float

    @property
    def sum(self) -> float:
        return sum(self.shares.values())

    @property
    def error(self) -> float:
        """|sum - total| / total; infinite where the sum is not finite."""
        error = abs(self.sum - self.total) / self.total
        return error if math.isfinite(error) else math.inf


def balance(passed: Runs, taken: Mapping[str, float], f: Tensor, total: float) -> tuple[Cut, ...]:
    """Propagate v = f, and add up each cut.

    Args:
        passed: the blocks that ran.
        taken: what constants take, by item, as it grows (`sinks.Audit`).
        f: the prediction.
        total: the target, <f, f>.
    """
    passed.end()
    leaves = [*passed.latents, *(leaf for run in passed.runs for _, leaf in run.made)]
    waiting: dict[int, Tensor] = {}  # id of a leaf -> what came back to it
    entered = dict.fromkeys(("modulation", "text"), 0.0)
    cuts: list[Cut] = []

    def between(values: Iterable[Tensor], grads: Iterable[Tensor | None]) -> None:
        """Pass back what lies between blocks."""
        for leaf, g in zip(leaves, _back(values, grads, leaves, keep=True), strict=True):
            if g is not None:
                waiting[id(leaf)] = waiting[id(leaf)] + g if id(leaf) in waiting else g

    between([f], [f.detach()])
    for run in reversed(passed.runs):
        inputs = [*(leaf for *_, leaf in run.streams), *(leaf for _, leaf in run.entering)]
        grads = _back((made for made, _ in run.made), [waiting.pop(id(leaf), None) for _, leaf in run.made], inputs)
        shares = dict.fromkeys(ITEMS, 0.0)
        for (item, _, leaf), g in zip(run.streams, grads, strict=False):
            _credit(passed, shares, item, leaf, g)
        refined = any(passed.item[id(leaf)] == "text_tokens" for _, leaf in run.made)
        later = dict(entered)
        for (item, leaf), g in zip(run.entering, grads[len(run.streams) :], strict=True):
            share = 0.0 if g is None else float(dot(leaf, g))
            entered[item] += share
            if item == "text" and refined:  # it is a stream from here on
                shares["text_tokens"] += share
            else:
                later[item] += share
        busy = any(item in ("image", "tokens") for item, *_ in run.streams)
        for leaf in leaves:
            item = passed.item.get(id(leaf), "image")
            _credit(passed, shares, "skips" if busy and item == "image" else item, leaf, waiting.get(id(leaf)))
        for item, share in (*later.items(), *taken.items()):
            shares[item] += share
        cuts.append(Cut(run.name, shares, total))
        between((x for _, x, _ in run.streams), grads[: len(run.streams)])
    return _shown(passed, cuts[::-1])


def _credit(passed: Runs, shares: dict[str, float], item: str, leaf: Tensor, g: Tensor | None) -> None:
    if g is None:
        return
    if item == "tokens" and passed.is_image is not None and leaf.shape[:2] == passed.is_image.shape:
        here = passed.is_image[..., None]
        shares["image"] += float(dot(leaf, g * here))
        shares["text_tokens"] += float(dot(leaf, g * ~here))
    else:
        shares[item] += float(dot(leaf, g))


def _shown(passed: Runs, cuts: list[Cut]) -> tuple[Cut, ...]:
    """The cuts before blocks and the one after the last; the items that there are."""
    last = max(i for i, cut in enumerate(cuts) if cut.before in passed.blocks)
    cuts = cuts[: last + 2]
    if passed.unet:
        names = _OF_UNETS
    else:
        always = ("image", "modulation", "text", "bias")
        names = {x: x for x in ITEMS if x in always or any(cut.shares[x] for cut in cuts)}
    return tuple(Cut(cut.before, {name: cut.shares[x] for x, name in names.items()}, cut.total) for cut in cuts)


def _back(
    values: Iterable[Tensor], grads: Iterable[Tensor | None], inputs: list[Tensor], keep: bool = False
) -> list[Tensor | None]:
    """Vector-Jacobian products, where there is a vector."""
    pairs = [(x, g) for x, g in zip(values, grads, strict=True) if g is not None and x.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    outputs, vectors = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, vectors, allow_unused=True, retain_graph=keep))


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
        text: what of the call's arguments depends on the prompt: the very tensors that `run` passes. Text states
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
