"""Does relevance add up? The conservation check: one relevance step, balanced at every cut through the network.

The target is <f, v> with f the prediction and v = f held constant: its total ||f||^2 is far from zero. A composite that
conserves misses it by rounding alone at every cut (see `cuts`). `epsilon-attnlrp` does not conserve: softmax holds a
bias term that none of its rules accounts for (Achtibat et al. 2024, section 3.3.1). Plain gradients conserve nothing.

Constants take relevance too. A function that is linear in its activations up to a constant, y = L(x) + c, hands
<x, g_x> = <y, g> - <c, g> on, so each constant takes <c, g>:

    bias        of a linear layer, a convolution or a norm; a learned table or token; the 1 of 1 + scale
    modulation  a shift, or the half of a product, where it was computed outside every block
    text        text states joined to the image's, where that happens outside every block

A layer with a rule of its own (epsilon, gamma, z+) absorbs <y, g> - <x, g_x>; that counts as bias.

References:
    Bach et al. 2015, On pixel-wise explanations by layer-wise relevance propagation, eq. 2: conservation.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.ddtd.cuts import Cut, Runs, dot
from stereoclinic.ddtd.propagate import Propagation, name_of
from stereoclinic.ddtd.rules import functions as rules
from stereoclinic.ddtd.rules.composites import Composite, get_composite
from stereoclinic.ddtd.rules.functions import Dead, Rule, constant
from stereoclinic.ddtd.rules.layers import LayerRule
from stereoclinic.ddtd.rules.lora import AsIfMerged
from stereoclinic.ddtd.rules.operations import KIND_OF, QUERIES, activations, follow, mark, mark_of, tensors
from stereoclinic.errors import InputError, UncoveredOperation

#: How far relevance may miss the target by rounding, by the dtype that the model runs in; measured in tests/ddtd. Some
#: transformers compute norms and rotations in float32 whatever they run in.
ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass(frozen=True)
class Conservation:
    """The outcome of `check`.

    Attributes:
        composite: The rules, by name.
        dtype: Of the prediction.
        batch: Samples in the pass.
        total: The target, ||f||^2 summed over the batch.
        cuts: One for each block, first to last; empty where the prediction is not finite.
        uncovered: Name of each operation without a rule -> how often it came; it was passed by its own gradient.
        fault: What is not a number, and where; None if all is well.
        kept_bytes: Memory that one sample keeps from the forward pass to the relevance pass.
        exact: Whether the composite conserves by definition, so that more than rounding is a fault.
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
        """Whether relevance adds up at every cut, to the rounding of the model's dtype."""
        return self.error <= self.rounding


def check(
    network: nn.Module,
    run: Callable[[], Tensor],
    composite: Composite | str | Path = "epsilon-cp",
    *,
    text: Sequence[Tensor] = (),
) -> Conservation:
    """Propagate the relevance of one prediction and balance it at every cut.

    The network stays as it was and runs in its own dtype. In float64 a rule that does not conserve stands out from
    rounding.

    Args:
        network: A denoiser's network, compiled or not, that is a function of its arguments.
        run: Calls the network once, on conditional rows, and returns the prediction, (B, ...).
        composite: A composite, the name of one, or a .toml file.
        text: The call's arguments that depend on the prompt: the very tensors that `run` passes. Text states have three
            dimensions or more, or come in lists; pooled text has two.

    Raises:
        InputError: No such composite; the network has no blocks or none of them runs; the prediction is zero.
    """
    composite = composite if isinstance(composite, Composite) else get_composite(composite)
    network = getattr(network, "_orig_mod", network)  # what torch.compile wrapped
    mode, runs, cuts = Audit(composite, network), Runs(network), tuple[Cut, ...]()
    with torch.enable_grad(), _prepared(network, text), runs, kept_storages(network) as kept:
        with mode:
            f = run()
        if not any(ran.name in runs.blocks for ran in runs.runs):
            raise InputError(f"no block of {type(network).__name__} ran: expected `run` to call this very network")
        total, fault = float(dot(f, f)), runs.fault
        if fault is None and not math.isfinite(total):
            fault = "the prediction holds NaN or infinity"
        if total == 0:
            raise InputError("the prediction is zero everywhere: nothing to decompose; are the weights loaded?")
        if fault is None:
            cuts = runs.balance(mode.taken, f, total)
    if broken := [cut.before for cut in cuts if not math.isfinite(cut.sum)]:
        fault = f"relevance turns NaN or infinite in `{broken[-1]}`"
    kept_bytes = sum(storage.nbytes() for storage in kept.values()) // len(f)
    exact = composite.strict and composite.rules.get("attention") is rules.attention_cp
    return Conservation(composite.name, f.dtype, len(f), total, cuts, dict(mode.uncovered), fault, kept_bytes, exact)


@contextmanager
def _prepared(network: nn.Module, text: Sequence[Tensor]) -> Iterator[None]:
    """Weights are constants; text is marked, so that it is not taken for modulation."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    mark(list(text), "text")
    try:
        yield
    finally:
        mark(list(text), "")
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def kept_storages(network: nn.Module) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Storages kept for the backward pass, by address, without weights."""
    own = {x.untyped_storage().data_ptr() for x in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x.detach()  # the tensor itself would hold on to the node that holds it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


#: Kind of operation -> where its bias stands among its arguments, and the dimension of the bias in the result.
_BIAS = {"linear": (2, -1), "convolution": (2, 1), "group_norm": (3, 1), "layer_norm": (3, -1)}
_OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    "add_": torch.add,
    "__iadd__": torch.add,
    "sub_": torch.sub,
    "__isub__": torch.sub,
}


class Audit(Propagation):
    """The mode of the conservation check: it itemises what constants take, and counts operations without a rule.

    What was computed from text or from modulation alone is marked (`operations.follow`), constants and activations
    alike. Unless the composite gives modulation a half, a product holds it constant: it is one where relevance is
    measured, for there nothing asks about the timestep.

    Attributes:
        taken: Relevance by item, in units of the target; it grows while relevance is passed back.
        uncovered: Name of each operation without a rule -> how often it came; it is passed by its own gradient. An
            operation that is covered only in attention scores or in the standard deviation of a norm counts when a
            backward pass reaches it.
    """

    def __init__(self, composite: Composite, model: nn.Module) -> None:
        super().__init__(composite, model)
        self.taken = {"modulation": 0.0, "text": 0.0, "bias": 0.0}
        self.uncovered: Counter[str] = Counter()

    def _report(self, func: Callable[..., Any], why: str = "") -> None:
        self.uncovered[name_of(func)] += 1

    def _by_rule(self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            result = rule(func, *args, **kwargs)
        except UncoveredOperation:  # raised before anything was computed
            self._report(func)
            return func(*args, **kwargs)
        if getattr(type(getattr(result, "grad_fn", None)), "_forward_cls", None) is Dead:
            result = func(*args, **kwargs)
            result.register_hook(lambda g: self._report(func))
        return result

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `Propagation.call`; itemises the constants of the call."""
        if func in QUERIES:
            return func(*args, **kwargs)
        asked, kind = activations((*args, *kwargs.values())), KIND_OF.get(func, "")
        rule = self._rules.get(kind) if kind in _BIAS else None
        rule = self._by_weight.get(id(args[1]), rule) if len(args) > 1 else rule
        if not asked or not torch.is_grad_enabled():
            result = super().call(func, args, kwargs)
            if not asked and rule is not constant:  # an adapter's weights have that rule: its result is an activation
                follow(func, (args, kwargs), result)
            return result
        modulation = [x for x in asked if mark_of(x) == "modulation"]
        if kind == "product" and 0 < len(modulation) < len(asked) and self.composite.modulation == "constant":
            args = tuple(x.detach() if any(x is m for m in modulation) else x for x in args)
        if isinstance(rule, LayerRule | AsIfMerged):
            x = args[0].view_as(args[0]) if args[0].requires_grad else args[0]
            self._take(x, x.detach(), factor=-1)
            result = super().call(func, (x, *args[1:]), kwargs)
            self._take(result, result.detach())
            return result
        added = _added(kind, func, args, kwargs)  # before the call, which may be in place
        result = super().call(func, args, kwargs)
        if len(modulation) == len(asked):
            mark(result, "modulation")
        if added is not None:
            item, value, dim = added
            self._take(args[0] if result is None else result, value, item, dim)
        elif kind == "product" and self._halves and any(mark_of(x) and not x.requires_grad for x in args):
            self._take(result, result.detach(), "modulation", factor=0.5)  # the half that a constant keeps
        return result

    def _take(self, result: Tensor, value: Tensor, item: str = "bias", dim: int = -1, factor: float = 1.0) -> None:
        """Have an item take factor <c, g> of a result; `dim` is where a vector c lies in it, -1 for what broadcasts."""

        def add(g: Tensor) -> None:
            wide = torch.promote_types(g.dtype, torch.float32)
            self.taken[item] += factor * float(dot(value, g.movedim(dim, -1).to(wide).sum_to_size(value.shape)))

        if result.requires_grad:
            result.register_hook(add)


def _added(
    kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, Tensor, int] | None:
    """The item that a function's constant belongs to, its value and its dimension; None where it adds none."""
    if kind in _BIAS:
        place, dim = _BIAS[kind]
        bias = args[place] if len(args) > place else kwargs.get("bias")
        return None if bias is None else ("bias", bias.detach(), dim)
    values = (*args, *kwargs.values())
    others = [x for x in tensors(values) if kind in ("add", "join") and x.is_floating_point() and not _is_activation(x)]
    with_value = kind == "add" or getattr(function, "__name__", "") in ("where", "masked_fill", "pad")
    if not others and not (with_value and any(type(x) in (int, float) for x in values)):
        return None
    with torch.no_grad():
        value = _at_zero(kind, function, args, kwargs)
    item = next((mark_of(x) for x in others if mark_of(x)), "bias")
    return (item, value, -1) if bool(value.any()) else None


def _at_zero(kind: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The output of an affine function for zero activations."""

    def zero(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not _is_activation(value):
                return value
            return value.new_zeros(()) if kind == "add" else torch.zeros_like(value)
        return type(value)(map(zero, value)) if type(value) in (list, tuple) else value

    name = getattr(function, "__name__", "")
    args, kwargs = tuple(map(zero, args)), {key: zero(value) for key, value in kwargs.items()}
    if name in ("__setitem__", "copy_"):
        changed: Tensor = args[0].clone()
        function(changed, *args[1:], **kwargs)
        return changed
    made: Tensor = _OUT_OF_PLACE.get(name, function)(*args, **kwargs)
    return made.masked_fill(~made.isfinite(), 0)  # minus infinity in attention scores: nothing comes back there


def _is_activation(x: Tensor) -> bool:
    return x.requires_grad and not isinstance(x, nn.Parameter)
