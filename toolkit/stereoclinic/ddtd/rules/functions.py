"""The relevance rules: each one is a modified backward pass, next to its formula.

Relevance is written as `R = a * g`. A rule leaves the forward pass alone: it calls the torch function that the model
called. It changes only how `g` is passed back. So no relevance is ever divided by an activation, and the plain
vector-Jacobian product of linear layers, convolutions and sums is the epsilon rule with epsilon -> 0.

Every rule has the signature `rule(function, *args, **kwargs)`: the torch function, then its own arguments. Weights get
no gradient from a rule: relevance is a question about activations.

References:
    Bach et al. 2015, On pixel-wise explanations by layer-wise relevance propagation.
    Ali et al. 2022, XAI for transformers: better explanations through conservative propagation, section 4.
    Achtibat et al. 2024, AttnLRP, arXiv 2402.05602, section 3.3.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stereoclinic.errors import UncoveredOperation

Rule = Callable[..., Tensor]
TorchFunction = Callable[..., Tensor]
#: One call under a rule: the output, the tensors kept for backward, and a function of g and those that passes g back.
Passed = tuple[Tensor, tuple[Tensor | None, ...], Callable[..., Tensor | tuple[Tensor, ...]]]


class RuleFunction(torch.autograd.Function):
    """The autograd function of every rule; `propagate` refuses any other custom function.

    `apply(rule, *inputs)` calls `rule(*inputs)`, which returns `Passed`. Gradients go to the first inputs; the others
    (weights) get none. Autograd casts them to the dtype of the inputs.
    """

    apply: ClassVar[Callable[..., Tensor]]  # torch's own has no annotations

    @staticmethod
    def forward(ctx: Any, rule: Callable[..., Passed], *inputs: Tensor | None) -> Tensor:
        out, kept, ctx.back = rule(*inputs)
        ctx.save_for_backward(*kept)
        ctx.inputs = len(inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.back(g, *ctx.saved_tensors)
        grads = (grads,) if isinstance(grads, Tensor) else grads
        return None, *grads, *[None] * (ctx.inputs - len(grads))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type for sums and statistics: float32 for half precision, else the tensor's own."""
    return torch.promote_types(dtype, torch.float32)


def _rstd(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """1 / sqrt(var + eps) over dims, kept, in the wide type. `Tensor.var` is some 15 times slower on a CPU."""
    kind, count = wide(x.dtype), math.prod(x.shape[d] for d in dims)
    mean = x.mean(dims, keepdim=True, dtype=kind)
    if x.dtype != kind:
        # No wide copy of x. The difference loses nothing that half precision had: a standard deviation that it resolves
        # is not that small compared with the mean.
        norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=kind)
        return norm.square_().div_(count).sub_(mean.square_()).clamp_(min=0).add_(eps).rsqrt_()
    norm = torch.linalg.vector_norm(x - mean, dim=dims, keepdim=True)
    return norm.square_().div_(count).add_(eps).rsqrt_()


def silu(function: TorchFunction, input: Tensor, inplace: bool = False) -> Tensor:
    """SiLU with its gate constant: `g_in = g * sigmoid(x)`, hence `x * g_in = silu(x) * g`."""
    if inplace:
        raise UncoveredOperation("`silu` in place has no relevance rule; set inplace=False on that module")
    return RuleFunction.apply(lambda x: (function(x), (x,), lambda g, x: torch.sigmoid(x).mul_(g)), input)


def gelu(function: TorchFunction, input: Tensor, approximate: str = "none") -> Tensor:
    """GELU with its gate constant: `g_in = g * Phi(x)`, Phi exact or by tanh, as in the forward pass."""

    def back(g: Tensor, x: Tensor) -> Tensor:
        if approximate == "tanh":
            gate = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        else:
            gate = (x * math.sqrt(0.5)).erf_()
        return gate.add_(1).mul_(0.5).mul_(g)

    return RuleFunction.apply(lambda x: (function(x, approximate=approximate), (x,), back), input)


def tanh(function: TorchFunction, input: Tensor) -> Tensor:
    """tanh with its gate constant: `g_in = g * tanh(x) / x`, hence `x * g_in = tanh(x) * g`.

    A sigmoid has no such gate, for it is 1/2 at 0. It stays a `constant`: a gate, as attention probabilities are.
    """

    def rule(x: Tensor) -> Passed:
        out = function(x)
        return out, ((out / x).masked_fill_(x == 0, 1),), lambda g, gate: g * gate

    return RuleFunction.apply(rule, input)


def group_norm(
    function: TorchFunction,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """GroupNorm with a constant standard deviation: `v = g * w * rstd`, `g_in = v - mean_group(v)`.

    The centring is linear and kept (Ali 2022). Saves rstd `(B, G)`, never the input.
    """

    def rule(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Passed:
        samples, channels = x.shape[:2]
        rstd = None
        if _keeps_layout(x) and not torch.is_autocast_enabled(x.device.type):
            # What the function itself calls, with the statistics that it throws away.
            positions = x.numel() // (samples * channels)
            out, _, rstd = torch.native_group_norm(x, weight, bias, samples, channels, positions, num_groups, eps)
        else:
            out = function(x, num_groups, weight=weight, bias=bias, eps=eps)
        if rstd is None or rstd.dtype != wide(x.dtype):
            rstd = _rstd(x.reshape(samples, num_groups, -1), (-1,), eps)[..., 0]  # (B, C, ...) -> (B, G)
        return out, (rstd, weight), _group_norm_back

    return RuleFunction.apply(rule, input, weight, bias)


def _group_norm_back(g: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    samples, groups = rstd.shape
    positions = tuple(range(3, g.ndim + 1))
    if all(x is None or x.dtype == g.dtype for x in (rstd, weight)) and g.is_contiguous():
        # The native pass of an input whose every value is the mean: there the standard deviation has no part.
        sizes = (samples, g.shape[1], math.prod(g.shape[2:]), groups)
        native = torch.ops.aten.native_group_norm_backward
        flat = torch.zeros_like(g)
        passed: Tensor = native(g, flat, torch.zeros_like(rstd), rstd, weight, *sizes, (True, False, False))[0]
        return passed
    g = g.unflatten(1, (groups, -1))  # (B, C, ...) -> (B, G, C/G, ...)
    scale = rstd[:, :, None].expand(g.shape[:3])
    scale = scale if weight is None else scale * weight.view(groups, -1)
    # mean_group(v) from the sums over positions, so that g is read twice and written once.
    sums = g.sum(positions, dtype=scale.dtype) if positions else g.to(scale.dtype)
    mean = (sums * scale).sum(-1).div_(-(g[0, 0].numel()))  # (B, G); autocast would run vecdot in half precision
    after = (1,) * len(positions)
    return torch.addcmul(mean.view(*mean.shape, 1, *after), g, scale.view(*scale.shape, *after)).flatten(1, 2)


def _keeps_layout(x: Tensor) -> bool:
    """Whether group_norm takes x in the layout it has; it copies any other."""
    return x.is_contiguous() or (
        x.device.type == "cpu" and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    )


def layer_norm(
    function: TorchFunction,
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """LayerNorm with a constant standard deviation: `v = g * w * rstd`, `g_in = v - mean(v)` (Ali 2022)."""
    shape = tuple(normalized_shape)
    dims = tuple(range(-len(shape), 0))

    def rule(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Passed:
        rstd = None
        if torch.is_autocast_enabled(x.device.type):
            out = function(x, shape, weight=weight, bias=bias, eps=eps)
        else:  # what the function itself calls, with the statistics that it throws away
            out, _, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        if rstd is None or rstd.dtype != wide(x.dtype):
            rstd = _rstd(x, dims, eps)  # (..., 1)
        return out, (rstd, None if weight is None else weight.to(rstd.dtype)), back

    def back(g: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
        if rstd.dtype == g.dtype and g.is_contiguous():  # as in GroupNorm
            native, flat = torch.ops.aten.native_layer_norm_backward, torch.zeros_like(g)
            passed: Tensor = native(g, flat, shape, torch.zeros_like(rstd), rstd, weight, None, (True, False, False))[0]
            return passed
        v = g.to(rstd.dtype) if weight is None else g * weight
        return torch.addcmul(v.mean(dims, keepdim=True).mul_(rstd).neg_(), v, rstd)

    return RuleFunction.apply(rule, input, weight, bias)


def rms_norm(
    function: TorchFunction,
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """RMSNorm with a constant root mean square: `g_in = g * w * rrms`; there is no centring to keep."""
    shape = tuple(normalized_shape)

    def rule(x: Tensor, weight: Tensor | None) -> Passed:
        floor = torch.finfo(x.dtype).eps if eps is None else eps
        square = x.to(wide(x.dtype)).square().mean(tuple(range(-len(shape), 0)), keepdim=True)
        return function(x, shape, weight=weight, eps=eps), ((square + floor).rsqrt_(), weight), back

    def back(g: Tensor, rrms: Tensor, weight: Tensor | None) -> Tensor:
        return g * rrms if weight is None else g * rrms * weight

    return RuleFunction.apply(rule, input, weight)


def product(function: TorchFunction, input: Tensor, other: Tensor) -> Tensor:
    """Product of two activations, half to each: `g_a = g * b / 2`, `g_b = g * a / 2` (AttnLRP).

    Factors may broadcast (the scale of an adaptive norm); a broadcast factor collects over the positions it serves.
    """

    def back(g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        half = 0.5 * g  # a and b are conjugated: themselves where they are real
        return (half * b.conj()).sum_to_size(a.shape), (half * a.conj()).sum_to_size(b.shape)

    return RuleFunction.apply(lambda a, b: (function(a, b), (a, b), back), input, other)


def _scaled(x: Tensor, factor: float) -> Tensor:
    """x itself, with what is passed back to it multiplied by factor."""
    return RuleFunction.apply(lambda x: (x.view_as(x), (), lambda g: g * factor), x) if x.requires_grad else x


def attention_cp(
    function: TorchFunction, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Softmax attention, its probabilities P constant: nothing to q and k, `g_v = P^T g` (Ali 2022)."""
    _refuse_mask(args, kwargs)
    return function(query.detach(), key.detach(), value, *args, **kwargs)


def attention_attnlrp(
    function: TorchFunction, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """AttnLRP: the gradients of q, k, v divided by 4, 4, 2.

    Each of the two products (q k^T and P v) gives half to each factor. Softmax keeps its native vector-Jacobian product
    (AttnLRP, section 3.3), which holds a bias term, so this rule alone does not conserve.
    """
    _refuse_mask(args, kwargs)
    return function(_scaled(query, 0.25), _scaled(key, 0.25), _scaled(value, 0.5), *args, **kwargs)


def half(function: TorchFunction, input: Tensor, other: Tensor) -> Tensor:
    """Product with a modulation that nothing asks about, which keeps its half: `g_a = g * b / 2`."""
    return function(_scaled(input, 0.5), _scaled(other, 0.5))


def quotient(function: TorchFunction, input: Tensor, other: Tensor) -> Tensor:
    """Division by an activation, which is a constant: `g_a = g / b` (the normaliser of a linear attention)."""
    return function(input, other.detach())


def matmul_halves(function: TorchFunction, *args: Any, **kwargs: Any) -> Tensor:
    """Matrix product of two activations, half to each factor (the last two of a call by position).

    A batched factor is an activation even where nothing asks for its gradient (the keys of a text that is held
    constant), as in `attention_attnlrp`. A matrix that does not require grad is a weight, and native.
    """
    *first, a, b = args
    if not (a.requires_grad and b.requires_grad) and min(a.ndim, b.ndim) < 3:
        return function(*args, **kwargs)
    return function(*first, _scaled(a, 0.5), _scaled(b, 0.5), **kwargs)


def matmul_scores(function: TorchFunction, *args: Any, **kwargs: Any) -> Tensor:
    """Matrix product where attention probabilities are constants: native in P v, a `dead_end` in q k^T.

    Linear attention multiplies v with phi(k) and phi(q) and has no softmax. Their phi is relu, by which they are
    recognised: they are constants, `g_v = g phi(k)`, as probabilities are.
    """
    *first, a, b = args
    if not (a.requires_grad and b.requires_grad):
        return function(*args, **kwargs)
    if _is_feature_map(a) != _is_feature_map(b):
        a, b = (x.detach() if _is_feature_map(x) else x for x in (a, b))
        return function(*first, a, b, **kwargs)
    return dead_end(function, *args, **kwargs)


#: Nodes of the graph that move or cast values, by how their names begin.
_MOVES = ("ToCopy", "Transpose", "T0", "Permute", "View", "UnsafeView", "Clone", "Alias", "Unsqueeze", "Squeeze")


def _is_feature_map(x: Tensor) -> bool:
    """Whether x is the output of a relu, moved about."""
    node = x.grad_fn
    while node is not None and node.name().startswith(_MOVES):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Relu")


def native(function: TorchFunction, *args: Any, **kwargs: Any) -> Tensor:
    """The operation's own vector-Jacobian product."""
    return function(*args, **kwargs)


def constant(function: TorchFunction, *args: Any, **kwargs: Any) -> Tensor:
    """The result is a constant: attention probabilities (`cp`), the 1/std of a norm written by hand."""
    with torch.no_grad():
        return function(*args, **kwargs)


class Dead(RuleFunction):
    """What `dead_end` leaves in the graph."""


def dead_end(function: TorchFunction, *args: Any, **kwargs: Any) -> Tensor:
    """An operation that may only feed a `constant` (q k^T, x**2 in a variance): raises if relevance reaches it."""

    def back(g: Tensor) -> Tensor:
        raise UncoveredOperation(
            f"relevance reached `{getattr(function, '__name__', repr(function))}`, which is covered only in attention"
            " scores or the standard deviation of a norm; use scaled_dot_product_attention or one of torch's norms, or"
            " the composite `gradient`"
        )

    reached = next(a for a in args if isinstance(a, Tensor) and a.requires_grad)
    return Dead.apply(lambda x: (function(*args, **kwargs), (), back), reached)


def _refuse_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attn_mask", args[0] if args else None)
    if mask is not None and mask.requires_grad:
        raise UncoveredOperation(
            "`scaled_dot_product_attention` with an attn_mask that requires grad has no relevance rule; detach the mask"
        )
