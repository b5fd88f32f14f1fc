"""Swap relevance rules into whatever torch functions a model calls.

    with propagate("epsilon-cp"):
        target = lean(unet(x, t, c))              # F.silu(x) -> rules.silu(F.silu, x), the same output
    grads = torch.autograd.grad(target, sites)    # inside the context or outside, on any thread

The rules are keyed by torch function, not by module, so the same code reads a UNet and a transformer. It is
an allow-list: a function that is not known, takes an activation that requires grad and returns one is
refused, because relevance would pass through it by whatever its gradient happens to be.

Two things escape a thread-local mode and are dealt with here: recomputation under non-reentrant gradient
checkpointing (it runs during backward, often on another thread: the mode is carried into the checkpoint's
frame), and custom autograd functions (never shown to a mode: refused when what they return is next used;
reentrant checkpointing is one).
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from stereoclinic.ddtd.composites import Composite, get_composite
from stereoclinic.ddtd.rules import RuleFunction
from stereoclinic.errors import UncoveredOperation

__all__ = ["KINDS", "Propagation", "UncoveredOperation", "propagate"]

#: Kind of operation -> the names torch gives it as a function, a method and in torch.nn.functional.
KINDS: Mapping[str, str] = {
    # native: linear in the activations, or piecewise linear through the origin (relu)
    "linear": "linear",
    "convolution": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "add": "add add_ __add__ __radd__ __iadd__ sub sub_ subtract rsub __sub__ __rsub__ __isub__ neg __neg__ negative",
    "join": "cat concat concatenate stack hstack vstack where masked_fill __setitem__ copy_",
    "reduce": "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d",
    "resample": "interpolate upsample pad pixel_shuffle pixel_unshuffle fold unfold",
    "relu": "relu leaky_relu",
    "identity": "dropout dropout1d dropout2d dropout3d detach requires_grad_ clone contiguous to type "
    "type_as float double half bfloat16 cpu cuda",
    "shape": "__getitem__ chunk split split_with_sizes tensor_split unbind reshape reshape_as view view_as "
    "flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze "
    "expand expand_as broadcast_to repeat repeat_interleave tile roll flip narrow select index_select gather "
    "T mT",
    # decided by which arguments are activations
    "product": "mul mul_ multiply __mul__ __rmul__ __imul__",
    "division": "div div_ divide true_divide __div__ __truediv__ __itruediv__",
    "matmul": "matmul __matmul__ bmm baddbmm",
    "square": "pow __pow__ square",
    # only by a rule of the composite
    "silu": "silu",
    "gelu": "gelu",
    "group_norm": "group_norm",
    "layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
    "attention": "scaled_dot_product_attention",
    "softmax": "softmax",
    "inverse_root": "rsqrt",
}
_NATIVE = frozenset({"linear", "convolution", "add", "join", "reduce", "resample", "relu", "identity", "shape"})
_INPLACE = frozenset({"mul_", "__imul__", "div_", "__itruediv__"})


def _functions(name: str) -> Iterator[Callable[..., Any]]:
    for namespace in (torch, torch.Tensor, functional):
        found = getattr(namespace, name, None)
        if callable(found):
            yield found
        elif name in ("T", "mT") and found is not None:
            yield found.__get__  # a property: the mode sees its getter


_KIND_OF: dict[Any, str] = {
    f: kind for kind, names in KINDS.items() for name in names.split() for f in _functions(name)
}


def _activations(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors that relevance could flow to: they require grad and are not a module's own parameters."""
    for value in values:
        if isinstance(value, Tensor):
            if value.requires_grad and not isinstance(value, nn.Parameter):
                yield value
        elif isinstance(value, list | tuple):
            yield from _activations(value)
        elif isinstance(value, dict):
            yield from _activations(value.values())


def _is_activation(value: Any) -> bool:
    return next(_activations((value,)), None) is not None


_local = threading.local()


class Propagation(TorchFunctionMode):
    """The mode that ``propagate`` returns; innermost wins when two are nested."""

    def __init__(self, composite: Composite) -> None:
        super().__init__()
        self.composite = composite

    def __enter__(self) -> Self:
        _local.stack = [*getattr(_local, "stack", ()), self]
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _local.stack = _local.stack[:-1]
        super().__exit__(kind, value, traceback)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # An inner mode's calls reach the outer one too: a rule must be applied once. Autograd may hand modes
        # on to its own threads, where nothing was entered and the stack is empty.
        stack = getattr(_local, "stack", ())
        if not torch.is_grad_enabled() or (stack and stack[-1] is not self):
            return func(*args, **kwargs)
        _carry_into_checkpoint(self.composite)
        if not self.composite.strict and not self.composite.rules:
            return func(*args, **kwargs)
        activations = list(_activations((args, kwargs)))
        if not activations:
            return func(*args, **kwargs)
        if self.composite.strict:
            self._refuse_custom_functions(activations)
        kind = _KIND_OF.get(func)
        if kind is not None:
            return self._covered(kind, func, args, kwargs)
        result = func(*args, **kwargs)
        if self.composite.strict and _is_activation(result):
            raise self._uncovered(func)
        return result

    def _covered(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of a known kind by its rule, natively if it is linear here, or refuse it."""
        rule = self.composite.rules.get(kind)
        if kind in ("linear", "convolution"):
            if _is_activation(args[1] if len(args) > 1 else kwargs.get("weight")):
                raise self._uncovered(func, "its weight is computed from something that requires grad")
        elif kind == "product":
            factors = (*args, *kwargs.values())
            if sum(map(_is_activation, factors)) < 2:
                return func(*args, **kwargs)
            if func.__name__ in _INPLACE or len(factors) != 2:
                raise self._uncovered(func, "a product of two activations must not be in place")
            args, kwargs = factors, {}
        elif kind == "division":
            if _is_activation(args[1] if len(args) > 1 else kwargs.get("other")) or kwargs.get("rounding_mode"):
                raise self._uncovered(func, "the divisor must be a constant")
            return func(*args, **kwargs)
        elif kind == "matmul":
            if any(isinstance(value, Tensor) for value in kwargs.values()):
                raise self._uncovered(func, "pass its factors by position")
            if any(isinstance(factor, nn.Parameter) for factor in args[-2:]):
                return func(*args, **kwargs)
        elif kind == "square" and func.__name__ != "square" and args[1:] != (2,):
            raise self._uncovered(func, "only x ** 2, inside the standard deviation of a norm, is covered")
        if rule is not None:
            return rule(func, *args, **kwargs)
        if kind in _NATIVE or not self.composite.strict:
            return func(*args, **kwargs)
        raise self._uncovered(func)

    def _refuse_custom_functions(self, activations: list[Tensor]) -> None:
        """Refuse what a custom autograd function returned: a mode never sees the call itself."""
        for activation in activations:
            node = activation.grad_fn
            if not isinstance(node, BackwardCFunction):
                continue
            made_by = getattr(type(node), "_forward_cls", type(node))
            if not issubclass(made_by, RuleFunction):
                advice = "use a module that calls torch functions"
                if made_by.__name__ == "CheckpointFunction":
                    advice = "use gradient checkpointing with use_reentrant=False, as diffusers does"
                raise UncoveredOperation(
                    f"the autograd function `{made_by.__qualname__}` has no rule in composite "
                    f"`{self.composite.name}`; {advice}, or the composite `gradient`"
                )

    def _uncovered(self, func: Callable[..., Any], why: str = "") -> UncoveredOperation:
        name = resolve_name(func) or getattr(func, "__qualname__", repr(func))
        return UncoveredOperation(
            f"`{name}` has no rule in composite `{self.composite.name}`{': ' + why if why else ''}; "
            "freeze the model (model.requires_grad_(False)), use its standard attention and activations, add "
            "a rule to the composite, or use the composite `gradient`"
        )


def propagate(composite: Composite | str) -> Propagation:
    """Swap a composite's rules in for the forward passes of this thread.

    The forward pass stays bit-identical. Backward may be called inside or outside the context, on any thread.

    Args:
        composite: a composite or the name of one, e.g. "epsilon-cp".

    Returns:
        A context manager.

    Raises:
        InputError: no composite has that name.
        UncoveredOperation: inside the context, on an operation without a rule.
    """
    return Propagation(get_composite(composite) if isinstance(composite, str) else composite)


def _carry_into_checkpoint(composite: Composite) -> None:
    """Inside a non-reentrant checkpoint, have its recomputation run under the same composite.

    The recomputation runs when backward unpacks the first saved tensor, on a thread where the mode is not
    set; the tensors it saves must be those of the rules (rstd, not x). torch offers no hook for that from
    within, so the frame is read from the closure of the checkpoint's pack hook.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    if not getattr(pack, "__qualname__", "").startswith("_checkpoint_hook."):
        return
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    frame: Any = cells["frame"].cell_contents if "frame" in cells else None
    if not hasattr(frame, "recompute_fn"):
        raise UncoveredOperation(
            f"gradient checkpointing of torch {torch.__version__} is built in a way this version does "
            "not know; call disable_gradient_checkpointing()"
        )
    if not isinstance(frame.recompute_fn, _Recompute):
        frame.recompute_fn = _Recompute(frame.recompute_fn, composite)


class _Recompute:
    """A checkpoint's recomputation, under a composite."""

    def __init__(self, function: Callable[..., Any], composite: Composite) -> None:
        self.function, self.composite = function, composite

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with Propagation(self.composite):
            return self.function(*args, **kwargs)
