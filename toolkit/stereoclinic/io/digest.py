"""Digests of models, by shapes alone or by weights, and of plain data and tensors."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stereoclinic.errors import InputError


def shapes_digest(module: nn.Module) -> str:
    """SHA-256 over the state dict's names and shapes; the same in every precision and on every device."""
    tensors = sorted(module.state_dict().items())
    lines = [f"{name}{tuple(value.shape) if isinstance(value, Tensor) else ''}" for name, value in tensors]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over the state dict's names, shapes, dtypes and bytes; a cast to another precision changes it.

    Raises:
        InputError: Weights are not in memory (on the "meta" device, as sequential offloading leaves them).
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        _add(digest, name, value)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    """Add an entry of a state dict; in quantised layers it may not be a plain tensor."""
    if isinstance(value, tuple | list):  # a packed weight and its bias
        for i, each in enumerate(value):
            _add(digest, f"{name}.{i}", each)
        return
    if not isinstance(value, Tensor):
        digest.update(f"{name}{value}\n".encode())
        return
    if value.is_meta:
        raise InputError(
            f"weight {name!r} is on the 'meta' device; load or move the model into memory before its digest is taken"
        )
    digest.update(f"{name}{tuple(value.shape)}{value.dtype}\n".encode())
    try:
        digest.update(_bytes(value))
    except (RuntimeError, TypeError, NotImplementedError):  # a quantised one, of several tensors
        digest.update(_bytes(value.dequantize()))


def _bytes(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def plain_digest(plain: Any, *tensors: torch.Tensor) -> str:
    """SHA-256 over plain data, as JSON with sorted keys, and tensors' shapes, dtypes and bytes."""
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def content_digest(key: str, about: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over a file's content and its key, so that a file under another key's name is noticed."""
    names = sorted(tensors)
    return plain_digest([key, about, names], *(tensors[name] for name in names))
