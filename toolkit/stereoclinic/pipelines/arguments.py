"""A denoiser's arguments and output as rows of a batch.

Which arguments hold a row for each image, and which depend on the prompt, is learnt by comparing calls: this code
knows no pipeline. A *leaf* is a tensor, a number, or a list with one entry a row; a *path* is its place:

    {"hidden_states": (2, 16, 8, 8), "added_cond_kwargs": {"text_embeds": (2, 24)}}
    ("hidden_states",)  ("added_cond_kwargs", "text_embeds")
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Path = tuple[str | int, ...]
#: Path -> the dimension that runs over rows, or None for a list with one entry a row. Other leaves are shared by rows.
Axes = Mapping[Path, int | None]

#: What denoisers call their timestep.
TIMESTEP = ("timestep", "timesteps", "t")


def inner(network: nn.Module) -> nn.Module:
    """The network that `torch.compile` wrapped, or the network itself."""
    found: nn.Module = getattr(network, "_orig_mod", network)
    return found


def named(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the network's own `forward`."""
    signature = _signature(type(inner(network)).forward)
    bound = signature.bind(None, *args, **kwargs).arguments
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    found = {name: value for name, value in bound.items() if name not in ("self", rest)}
    return found | (bound.get(rest, {}) if rest else {})


@cache  # by the function: a watched denoiser has a new class in each call of its pipeline
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def first_name(network: nn.Module) -> str:
    """The name of the argument that holds the noisy latents: the first one."""
    return list(_signature(type(inner(network)).forward).parameters)[1]


def timestep_of(arguments: Mapping[str, Any]) -> float | None:
    """The timestep that the network is given; None where no argument has such a name.

    Raises:
        ValueError: It differs within the batch.
    """
    value = next((arguments[name] for name in TIMESTEP if arguments.get(name) is not None), None)
    if value is None:
        return None
    values = value.flatten().tolist() if isinstance(value, Tensor) else [value]
    if len(set(values)) != 1:
        raise ValueError(f"timesteps {values[:4]} differ within a batch")
    return float(values[0])


def row_axes(one: Any, two: Any, path: Path = ()) -> dict[Path, int | None]:
    """The dimensions of rows: those twice as long in a call for two images as in a call for one.

    Args:
        one: Arguments of a call for one image.
        two: Arguments of the call for two, with the same prompt.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim:
        longer = [d for d, (n, m) in enumerate(zip(one.shape, two.shape, strict=True)) if m == 2 * n and n]
        return {path: longer[0]} if len(longer) == 1 else {}
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if one and len(two) == 2 * len(one):
            return {path: None}
        pairs: Iterator[tuple[str | int, Any, Any]] = (
            (i, a, b) for i, (a, b) in enumerate(zip(one, two, strict=False))
        )
    elif isinstance(one, dict) and isinstance(two, dict):
        pairs = ((name, one[name], two[name]) for name in one if name in two)
    else:
        return {}
    return {key: axis for name, a, b in pairs for key, axis in row_axes(a, b, (*path, name)).items()}


def leaves(tree: Any, axes: Axes, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every leaf with its path."""
    if path not in axes and isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, axes, (*path, name))
    elif path not in axes and isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from leaves(value, axes, (*path, i))
    else:
        yield path, tree


def changed(tree: Any, change: Callable[[Path, Any], Any], axes: Axes, path: Path = ()) -> Any:
    """A copy of arguments in which every leaf is what `change(path, leaf)` gives."""
    if path not in axes and isinstance(tree, dict):
        return {name: changed(value, change, axes, (*path, name)) for name, value in tree.items()}
    if path not in axes and isinstance(tree, list | tuple):
        return type(tree)(changed(value, change, axes, (*path, i)) for i, value in enumerate(tree))
    return change(path, tree)


def of_rows(arguments: Mapping[str, Any], axes: Axes, rows: Sequence[int]) -> dict[str, Any]:
    """The arguments of a call for some of its rows, in this order."""
    found = changed(arguments, lambda path, leaf: take(leaf, axes[path], rows) if path in axes else leaf, axes)
    return dict(found)


def get(tree: Any, path: Path) -> Any:
    """The leaf at a path."""
    for name in path:
        tree = tree[name]
    return tree


def put(tree: Any, path: Path, leaf: Any) -> None:
    """Put another leaf at a path; containers on the way are the tree's own."""
    for name in path[:-1]:
        tree = tree[name]
    tree[path[-1]] = leaf


def length(leaf: Any, axis: int | None) -> int:
    """Rows in a leaf."""
    return len(leaf) if axis is None else int(leaf.shape[axis])


def take(leaf: Any, axis: int | None, rows: Sequence[int]) -> Any:
    """Some rows of a leaf, in this order; the leaf itself where that is all of them."""
    if list(rows) == list(range(length(leaf, axis))):
        return leaf
    if axis is None:
        return [leaf[row] for row in rows]
    return leaf.index_select(axis, torch.tensor(list(rows), device=leaf.device))


def joined(parts: Sequence[Any], axis: int | None) -> Any:
    """Rows of several leaves, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return [row for part in parts for row in part] if axis is None else torch.cat(list(parts), dim=axis)


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b)


def sample_of(output: Any) -> Any:
    """The prediction in a denoiser's output: a tensor, or a list of one tensor a row."""
    if isinstance(output, Tensor):
        return output
    return output.sample if hasattr(output, "sample") else output[0]


def with_sample(output: Any, sample: Any) -> Any:
    """The output with another prediction in it."""
    if isinstance(output, Tensor):
        return sample
    if hasattr(output, "sample"):
        return type(output)(**{**output, "sample": sample})
    return type(output)((sample, *output[1:]))


def stacked(sample: Any) -> Tensor:
    """A prediction as one tensor, rows first."""
    return torch.stack(list(sample)) if isinstance(sample, list | tuple) else sample


def like(sample: Any, rows: Tensor) -> Any:
    """Rows in the form of a prediction: a tensor, or a list of tensors."""
    return list(rows.unbind(0)) if isinstance(sample, list | tuple) else rows
