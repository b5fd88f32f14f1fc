"""Swap relevance rules into whatever torch functions a model calls.

    with propagate("epsilon-cp"):
        target = lean(unet(x, t, c))              # F.silu(x) -> rules.silu(F.silu, x), the same output
    grads = torch.autograd.grad(target, sites)    # inside the context or outside, on any thread

The rules are keyed by torch function, not by module, so the same code reads a U-Net and a transformer. A composite that
chooses rules by layer recognises a call's layer by its weight. It is an allow-list: an unknown function that takes an
activation that requires grad and returns one is refused, because relevance would pass it by whatever its gradient is.

Three things escape a thread-local mode. Recomputation under non-reentrant gradient checkpointing runs during backward,
often on another thread: the mode is carried into the checkpoint's frame. Custom autograd functions (reentrant
checkpointing is one) are never shown to a mode: they are refused when their result is next used. Compiled modules do
not show their functions either: they run eagerly meanwhile, see `eagerly`.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode, resolve_name

from stereoclinic.ddtd.rules.composites import Composite, get_composite
from stereoclinic.ddtd.rules.functions import Rule, RuleFunction, half, native
from stereoclinic.ddtd.rules.layers import LayerRule
from stereoclinic.ddtd.rules.lora import as_if_merged, find_adapted
from stereoclinic.ddtd.rules.operations import KIND_OF, NATIVE, QUERIES, activations, follow, mark_of
from stereoclinic.errors import InputError, UncoveredOperation

_INPLACE = frozenset({"mul_", "__imul__", "div_", "__itruediv__"})
_BY_WEIGHT = frozenset({"linear", "convolution"})
_FSDP = "torch.distributed.fsdp."  # whose function passes inputs on as they are, to hear of their gradients


class _Local(threading.local):
    stack: tuple["Propagation", ...] = ()  # the modes that this thread entered, the innermost last


_local = _Local()
_harmless: set[type] = set()  # types of graph nodes that were looked at and are not a custom function without a rule


class Propagation(TorchFunctionMode):
    """The mode that `propagate` returns; the innermost wins when two are nested.

    It may be entered again after it was left, so a loop needs to find the layers of its model only once.
    """

    def __init__(self, composite: Composite, model: nn.Module | None = None) -> None:
        super().__init__()
        self.composite = composite
        self._rules = dict(composite.rules)
        if composite.layers and model is None:
            raise InputError(
                f"composite {composite.name!r} chooses rules by layer: call propagate(composite, model) with the "
                "network whose layers they are"
            )
        weights = composite.assign(model) if composite.layers and model is not None else []
        self._by_weight = {id(weight): rule for weight, rule in reversed(weights)}  # the first counts
        if model is not None and composite.by_terms:
            for module, weight in find_adapted(model):
                kind = "linear" if isinstance(module.base_layer, nn.Linear) else "convolution"
                chosen = self._by_weight.get(id(weight), self._rules.get(kind))
                if isinstance(chosen, LayerRule):
                    merged = list(as_if_merged(module, chosen))
                    self._by_weight |= {id(part): rule for part, rule in merged}
                    weights += merged
        self._weights = [weight for weight, _ in weights]  # kept, so that no other tensor gets the id of one
        self._halves = composite.modulation == "halves"
        self._idle = not (composite.strict or composite.rules or composite.layers)
        self._native = NATIVE - _BY_WEIGHT - self._rules.keys()

    def __enter__(self) -> Self:
        if self in _local.stack:
            raise RuntimeError("this propagation is entered already; call propagate again for a nested one")
        _enter_eager()
        _local.stack = (*_local.stack, self)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own has no annotations
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)  # type: ignore[no-untyped-call]  # nor has this
        _local.stack = _local.stack[:-1]
        _leave_eager()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a torch function as the composite says."""
        if func in QUERIES or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        # An inner mode's calls reach the outer one too: a rule must be applied once. Autograd may hand modes
        # on to its own threads, where nothing was entered and the stack is empty.
        if _local.stack and _local.stack[-1] is not self:
            return func(*args, **kwargs)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None:
            _carry_into_checkpoint(hooks[0], self)
        if self._idle:
            return func(*args, **kwargs)
        inputs = activations((*args, *kwargs.values()) if kwargs else args)
        if not inputs:
            result = func(*args, **kwargs)
            if self._halves:
                follow(func, (args, kwargs), result)
            return result
        if self.composite.strict:
            self._refuse_custom_functions(inputs)
        kind = KIND_OF.get(func)
        if kind in self._native:
            return func(*args, **kwargs)
        if kind is not None:
            return self._covered(kind, func, args, kwargs)
        result = func(*args, **kwargs)
        if self.composite.strict and activations((result,)):
            self._report(func)
        return result

    def _covered(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of a known kind by its rule, natively if it is linear here, or refuse it."""
        rule, why = self._rules.get(kind), ""
        if kind in _BY_WEIGHT:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            rule = self._by_weight.get(id(weight), rule)
            if activations((weight,)):
                why = "its weight is computed from something that requires grad"
        elif kind == "product":
            factors = (*args, *kwargs.values())
            if len(activations(factors)) < 2:
                if not (self._halves and any(mark_of(x) and not x.requires_grad for x in factors)):
                    return func(*args, **kwargs)
                rule = half
            if func.__name__ in _INPLACE or len(factors) != 2:
                why = "a product of two activations must not be in place"
            else:
                args, kwargs = factors, {}
        elif kind == "division":
            divisor = args[1] if len(args) > 1 else kwargs.get("other")
            if kwargs.get("rounding_mode"):
                why = "it rounds"
            elif not activations((divisor,)):
                rule = native
            else:
                args, kwargs = (args[0], divisor), {}
        elif kind == "matmul":
            if any(isinstance(value, Tensor) for value in kwargs.values()):
                why = "pass its factors by position"
            elif any(isinstance(factor, nn.Parameter) for factor in args[-2:]):
                rule = native
        elif kind == "einsum":
            operands = [x for x in args if not isinstance(x, str)]
            if len(activations(operands)) > 1:
                why = "only one of its operands may be an activation"
            else:
                rule = native
        elif kind == "square" and func.__name__ != "square" and args[1:] != (2,):
            why = "only x ** 2, inside the standard deviation of a norm, is covered"
        if why or (rule is None and self.composite.strict and kind not in NATIVE):
            self._report(func, why)
            rule = native
        return func(*args, **kwargs) if rule is None or rule is native else self._by_rule(rule, func, args, kwargs)

    def _by_rule(self, rule: Rule, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return rule(func, *args, **kwargs)

    def _refuse_custom_functions(self, inputs: list[Tensor]) -> None:
        """Refuse what a custom autograd function returned: a mode never sees the call itself."""
        for x in inputs:
            node = x.grad_fn
            if type(node) in _harmless:
                continue
            made_by = getattr(type(node), "_forward_cls", type(node))
            ours = issubclass(made_by, RuleFunction) or made_by.__module__.startswith(_FSDP)
            if isinstance(node, BackwardCFunction) and not ours:
                self._report(made_by)
            else:
                _harmless.add(type(node))

    def _report(self, func: Callable[..., Any], why: str = "") -> None:
        """Refuse an operation, or a custom autograd function.

        Raises:
            UncoveredOperation: Always; the conservation check counts it and continues.
        """
        what = f"`{name_of(func)}` has no rule in composite `{self.composite.name}`{': ' + why if why else ''}"
        advice = (
            "freeze the model (model.requires_grad_(False)), use its standard attention and activations, add a rule to"
            " the composite, or use"
        )
        if isinstance(func, type):
            what, advice = f"the autograd function {what}", "use a module that calls torch functions, or"
            if func.__name__ == "CheckpointFunction":
                advice = "use gradient checkpointing with use_reentrant=False, as diffusers does, or"
        raise UncoveredOperation(f"{what}; {advice} the composite `gradient`")


def name_of(func: Callable[..., Any]) -> str:
    """What a user calls a torch function or an autograd function."""
    name: str = resolve_name(func) or getattr(func, "__qualname__", repr(func))
    return name


def propagate(composite: Composite | str | Path, model: nn.Module | None = None) -> Propagation:
    """Swap a composite's rules in for the forward passes of this thread.

    The forward pass stays bit-identical. Backward may be called inside or outside the context, on any thread. Weights
    get no gradient from a rule. Inside, compiled modules of every thread run eagerly.

    Args:
        composite: A composite, the name of one such as "epsilon-cp", or a .toml file.
        model: The network that is run, compiled or not. A composite that chooses rules by layer needs it. Rules such as
            gamma and z+ need it to read LoRA adapters as if merged: without it, an adapter's layers are layers of their
            own. Adapters are looked for here; which of them are active is read at each pass.

    Returns:
        A context manager, which may be entered again.

    Raises:
        InputError: No composite has that name; it chooses by layer and there is no model, or none of its layers fits.
        UncoveredOperation: Inside the context, on an operation without a rule.
    """
    return Propagation(composite if isinstance(composite, Composite) else get_composite(composite), model)


def _carry_into_checkpoint(pack: Callable[..., Any], mode: Propagation) -> None:
    """Inside a non-reentrant checkpoint, have its recomputation run under the same rules.

    It runs when backward unpacks the first saved tensor, on a thread where the mode is not set; the tensors it saves
    must be those of the rules (rstd, not x). Torch has no hook for that, so the frame is read from the closure of the
    checkpoint's pack hook.
    """
    if not getattr(pack, "__qualname__", "").startswith("_checkpoint_hook."):
        return
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
    frame: Any = cells["frame"].cell_contents if "frame" in cells else None
    if not hasattr(frame, "recompute_fn"):
        raise UncoveredOperation(
            f"gradient checkpointing of torch {torch.__version__} is built in a way this version does "
            "not know; call disable_gradient_checkpointing()"
        )
    recompute = frame.recompute_fn
    if getattr(recompute, "_by_rules", False):
        return

    def by_rules(*args: Any, **kwargs: Any) -> Any:
        with copy.copy(mode):  # the mode itself may be set on this thread
            return recompute(*args, **kwargs)

    by_rules._by_rules = True  # type: ignore[attr-defined]
    frame.recompute_fn = by_rules


_lock = threading.Lock()
_inside = 0
_stance: Any = None


@contextmanager
def eagerly() -> Iterator[None]:
    """Within the context, every compiled module of the process runs eagerly.

    Torch's stance is one for all threads and each user restores what it found, so that two threads that leave out of
    order would leave it set for good: hence one count, and one change of it.
    """
    _enter_eager()
    try:
        yield
    finally:
        _leave_eager()


def _enter_eager() -> None:
    global _inside, _stance
    with _lock:
        # Without torch._dynamo nothing was compiled, and importing it takes seconds.
        if _stance is None and "torch._dynamo" in sys.modules:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1


def _leave_eager() -> None:
    global _inside, _stance
    with _lock:
        _inside -= 1
        if not _inside and _stance is not None:
            _stance.__exit__(None, None, None)
            _stance = None
