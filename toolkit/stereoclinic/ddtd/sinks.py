"""What takes relevance and hands it to nobody: biases, other constants that are added, and layers that absorb.

A function that is linear in its activations up to a constant, y = L(x) + c, hands <x, g_x> = <y, g> - <c, g> on. So
each constant takes <c, g>, and can be itemised without asking any other item:

    bias        of a linear layer, a convolution or a norm; a learned table or token; the 1 of 1 + scale
    modulation  a shift, or the half of a product, where it was computed outside every block
    text        text states joined to the image's, where that happens outside every block

A layer with a rule of its own (epsilon, gamma, z+) absorbs <y, g> - <x, g_x>: by gamma what its bias takes, by z+ and
epsilon also what finds no taker. That counts as bias.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.ddtd.propagate import Survey
from stereoclinic.ddtd.rules.composites import Composite
from stereoclinic.ddtd.rules.functions import constant
from stereoclinic.ddtd.rules.layers import LayerRule
from stereoclinic.ddtd.rules.lora import AsIfMerged
from stereoclinic.ddtd.rules.operations import KIND_OF, QUERIES, activations, follow, mark, mark_of, tensors

#: Kind of operation -> where its bias stands among its arguments, and the dimension of the bias in the result.
_BIAS = {"linear": (2, -1), "convolution": (2, 1), "group_norm": (3, 1), "layer_norm": (3, -1)}
_OUT_OF_PLACE: dict[str, Callable[..., Any]] = {
    "add_": torch.add,
    "__iadd__": torch.add,
    "sub_": torch.sub,
    "__isub__": torch.sub,
}


class Audit(Survey):
    """The mode of the conservation check: as `Survey`, and it itemises what constants take.

    What was computed from text or from modulation alone is marked (`operations.follow`), constants and activations
    alike. Unless the composite gives modulation a half, a product with it holds it constant: that is what it is where
    relevance is measured, for there nothing asks about the timestep.

    Attributes:
        taken: relevance by item, in units of the target; it grows while relevance is passed back.
    """

    def __init__(self, composite: Composite, model: nn.Module) -> None:
        super().__init__(composite, model)
        self.taken = {"modulation": 0.0, "text": 0.0, "bias": 0.0}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in QUERIES:
            return func(*args, **kwargs)
        asked, kind = activations((*args, *kwargs.values())), KIND_OF.get(func, "")
        if not asked or not torch.is_grad_enabled():
            result = super().__torch_function__(func, types, args, kwargs)
            adapter = kind in _BIAS and self._rule_of(kind, args) is constant  # of activations, as a constant
            if not asked and not adapter:
                follow(func, (args, kwargs), result)
            return result
        modulation = [x for x in asked if mark_of(x) == "modulation"]
        if kind == "product" and 0 < len(modulation) < len(asked) and self.composite.modulation == "constant":
            args = tuple(x.detach() if any(x is m for m in modulation) else x for x in args)
        if kind in _BIAS and isinstance(self._rule_of(kind, args), LayerRule | AsIfMerged):
            args = (self._watched(args[0]), *args[1:])
            result = super().__torch_function__(func, types, args, kwargs)
            values = result.detach()
            self._hook(result, lambda g: dot(values, g))
            return result
        added = _added(kind, func, args, kwargs)  # before the call, which may be in place
        result = super().__torch_function__(func, types, args, kwargs)
        if len(modulation) == len(asked):
            mark(result, "modulation")
        if added is not None:
            self._take(args[0] if result is None else result, *added)
        elif kind == "product" and self._halves and any(mark_of(x) and not x.requires_grad for x in args):
            values = result.detach()
            self._hook(result, lambda g: 0.5 * dot(values, g), "modulation")  # the half that a constant keeps
        return result

    def _rule_of(self, kind: str, args: tuple[Any, ...]) -> Any:
        return self._by_weight.get(id(args[1]), self._rules.get(kind)) if len(args) > 1 else self._rules.get(kind)

    def _watched(self, x: Tensor) -> Tensor:
        if not x.requires_grad:
            return x
        values, alias = x.detach(), x.view_as(x)
        self._hook(alias, lambda g: -dot(values, g))
        return alias

    def _take(self, result: Tensor, item: str, value: Tensor, dim: int) -> None:
        """Have a constant take <c, g>; `dim` is where a vector lies in the result, -1 for what broadcasts."""

        def share(g: Tensor) -> Tensor:
            wide = torch.promote_types(g.dtype, torch.float32)
            return dot(value, g.movedim(dim, -1).to(wide).sum_to_size(value.shape))

        self._hook(result, share, item)

    def _hook(self, x: Tensor, share: Callable[[Tensor], Tensor], item: str = "bias") -> None:
        def add(g: Tensor) -> None:
            self.taken[item] += float(share(g))

        if x.requires_grad:
            x.register_hook(add)


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
    """What an affine function makes of activations that are zero."""

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


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b>, in float32 or wider; in float64 where the device has it, as thousands of terms cancel."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    return (a.detach().to(wide) * b.detach().to(wide)).sum()
