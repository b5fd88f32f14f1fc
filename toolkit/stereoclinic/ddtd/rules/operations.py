"""Kinds of torch functions: a composite gives each kind a rule."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

#: Kind of operation -> the names torch gives it as a function, a method and in torch.nn.functional.
KINDS: Mapping[str, str] = {
    # native: linear in the activations, or piecewise linear through the origin (relu)
    "linear": "linear",
    "convolution": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    "add": "add add_ __add__ __radd__ __iadd__ sub sub_ subtract rsub __sub__ __rsub__ __isub__ neg __neg__ negative",
    "join": "cat concat concatenate stack hstack vstack where masked_fill __setitem__ copy_ pad_sequence",
    "reduce": "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d",
    "resample": "interpolate upsample pad pixel_shuffle pixel_unshuffle fold unfold",
    "relu": "relu leaky_relu",
    "identity": "dropout dropout1d dropout2d dropout3d detach requires_grad_ clone contiguous to type "
    "type_as float double half bfloat16 cpu cuda",
    "shape": "__getitem__ chunk split split_with_sizes tensor_split unbind reshape reshape_as view view_as "
    "flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t squeeze unsqueeze "
    "expand expand_as broadcast_to repeat repeat_interleave tile roll flip narrow select index_select gather topk "
    "T mT view_as_complex view_as_real",
    # decided by which arguments are activations
    "product": "mul mul_ multiply __mul__ __rmul__ __imul__",
    "division": "div div_ divide true_divide __div__ __truediv__ __itruediv__",
    "matmul": "matmul __matmul__ bmm baddbmm",
    "square": "pow __pow__ square",
    "einsum": "einsum",
    # only by a rule of the composite
    "silu": "silu",
    "gelu": "gelu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "group_norm": "group_norm",
    "layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
    "attention": "scaled_dot_product_attention",
    "softmax": "softmax",
    "inverse_root": "rsqrt",
}
#: Kinds whose own vector-Jacobian product is a rule.
NATIVE = frozenset({"linear", "convolution", "add", "join", "reduce", "resample", "relu", "identity", "shape"})

#: Questions about a tensor, whose answer holds no activation.
_QUERIES = (
    "shape dtype device layout ndim requires_grad is_leaf grad_fn is_cuda is_meta is_sparse is_quantized "
    "size dim stride numel nelement element_size is_contiguous is_floating_point is_complex data_ptr __len__"
)


def _functions(name: str) -> Iterator[Callable[..., Any]]:
    for namespace in (torch, torch.Tensor, functional, torch._C._nn):
        found = getattr(namespace, name, None)
        if callable(found):
            yield found
        elif found is not None and hasattr(found, "__get__"):
            yield found.__get__  # a property: a mode sees its getter


KIND_OF: Mapping[Any, str] = {
    f: kind for kind, names in KINDS.items() for name in names.split() for f in _functions(name)
}
QUERIES: frozenset[Any] = frozenset(f for name in _QUERIES.split() for f in _functions(name))


def activations(values: Any) -> list[torch.Tensor]:
    """Tensors in arguments that relevance could flow to: they require grad and are not a module's own parameters."""
    found: list[torch.Tensor] = []
    _collect(values, found)
    return found


def _collect(values: Any, found: list[torch.Tensor]) -> None:
    for value in values:
        if type(value) in _PLAIN:  # first, as this runs for each argument of each call
            continue
        if isinstance(value, torch.Tensor):
            if value.requires_grad and not isinstance(value, nn.Parameter):
                found.append(value)
        elif isinstance(value, list | tuple):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


_PLAIN = frozenset({nn.Parameter, int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, slice})


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(list(values.values()))


def mark_of(value: Any) -> str:
    """What a constant was computed from: "text", "modulation" (a learned layer on no activation), or neither, ""."""
    return getattr(value, "_stereo_mark", "")


def mark(values: Any, what: str) -> None:
    """Mark what tensors were computed from."""
    for x in tensors(values):
        x._stereo_mark = what  # type: ignore[attr-defined]


def follow(function: Callable[..., Any], inputs: Any, result: Any) -> None:
    """Mark a function's result, by what the constants were computed from that it was given.

    A timestep becomes modulation in the first linear layer that embeds it. Rotary embeddings and attention masks pass
    no layer: they stay without a mark.
    """
    marks = {mark_of(x) for x in tensors(inputs)}
    if "text" in marks:
        mark(result, "text")
    elif "modulation" in marks or KIND_OF.get(function) in ("linear", "convolution"):
        mark(result, "modulation")
