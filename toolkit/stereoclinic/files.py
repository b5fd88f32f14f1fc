"""Tensors with plain metadata, as `.pt` or `.safetensors` by the file's ending.

Both hold named tensors and one JSON text, {"kind", "version", "metadata"}, under the name "stereoclinic". A
`.pt` file is read with `weights_only=True`, so that no file, whoever made it, can run code.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from stereoclinic.errors import InputError

ENDINGS = (".pt", ".safetensors")
_HEAD = "stereoclinic"


def save_tensors(
    path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a file whole or not at all: a temporary name in the same folder, then a rename.

    Args:
        path: Ends in .pt or .safetensors.
        kind: What the file holds, such as "mask"; asked for again on loading.
        version: Of this kind's format.
        tensors: Name -> dense tensor of any shape, dtype and device.
        metadata: Plain data that JSON can hold.

    Raises:
        InputError: The ending is another, or the file cannot be written there.
    """
    path = Path(path)
    ending = _ending(path, kind)
    if path.is_dir():
        _refuse(path, kind, f"is a folder; give a file name ending in {' or '.join(ENDINGS)}")
    head = json.dumps({"kind": kind, "version": version, "metadata": dict(metadata)}, sort_keys=True)
    # Clones: safetensors refuses tensors that share memory, and torch.save would write the whole of a view's
    # storage.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if ending == ".pt":
            with temporary.open("xb") as file:
                torch.save({_HEAD: head, **plain}, file)
        else:
            temporary.write_bytes(safetensors.torch.save(plain, {_HEAD: head}))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{kind} file {path} cannot be written ({error.strerror}); choose a folder that exists and is writable"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_tensors(path: str | Path, kind: str, *versions: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote; tensors arrive on the CPU.

    Raises:
        InputError: The file is missing, a folder, empty, truncated, would run code, or is of another kind or
            version.
    """
    path = Path(path)
    if path.is_dir():
        _refuse(path, kind, "is a folder; give the file itself")
    ending = _ending(path, kind)
    try:
        if path.stat().st_size == 0:
            _refuse(path, kind, "is empty (0 bytes); make it again")
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{kind} file {path} cannot be read ({error.strerror}); check the path") from error
    head, tensors = _read_pt(path, kind) if ending == ".pt" else _read_safetensors(path, kind)
    try:
        parsed = json.loads(head)
        found, its_version, metadata = parsed["kind"], parsed["version"], parsed["metadata"]
    except (ValueError, TypeError, KeyError, RecursionError):
        _refuse(path, kind, f"was not written by stereoclinic; expected a {kind} file")
    if found != kind:
        _refuse(path, kind, f"is a {_short(found)} file; expected a {kind} file")
    if its_version not in versions:
        newer = isinstance(its_version, int) and its_version > max(versions)
        advice = "a newer one wrote it; update" if newer else "make it again"
        reads = f"this stereoclinic reads version {' or '.join(map(str, versions))}: {advice}"
        _refuse(path, kind, f"has format version {_short(its_version)}; {reads}")
    if not isinstance(metadata, dict):
        _refuse(path, kind, "has metadata that is no table; make it again")
    return tensors, metadata


def _read_pt(path: Path, kind: str) -> tuple[Any, dict[str, Tensor]]:
    unsafe = "holds objects other than plain tensors, and loading it could run code; do not trust where it came from"
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # a bare pickle; torch.save writes an archive
            _refuse(path, kind, unsafe)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            reason = unsafe
        else:
            reason = "is truncated, or no .pt file at all; copy or make it again"
        raise InputError(f"{kind} file {path} {reason}") from error
    if not isinstance(content, dict) or _HEAD not in content:
        _refuse(path, kind, f"was not written by stereoclinic; expected a {kind} file")
    head = content.pop(_HEAD)
    for name, tensor in content.items():
        # Ours are dense and contiguous; a tensor expanded from one number could ask for any amount of memory.
        plain = type(tensor) is Tensor and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain or not tensor.is_contiguous():
            _refuse(path, kind, f"holds {_short(name)}, which is no plain tensor; make it again")
    return head, {name: tensor.detach() for name, tensor in content.items()}


def _read_safetensors(path: Path, kind: str) -> tuple[Any, dict[str, Tensor]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            head = (file.metadata() or {}).get(_HEAD)
            # Clones, so that nothing points into the file once it is closed, or replaced.
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except Exception as error:  # as above
        raise InputError(
            f"{kind} file {path} is truncated, or no .safetensors file at all; copy or make it again"
        ) from error
    return head, tensors


def _ending(path: Path, kind: str) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        _refuse(path, kind, f"ends in {ending or 'nothing'!r}; expected {' or '.join(ENDINGS)}")
    return ending


def _short(value: object) -> str:
    return str(value)[:40].replace("\n", " ")


def _refuse(path: Path, kind: str, reason: str) -> NoReturn:
    raise InputError(f"{kind} file {path} {reason}")


def kind_of(path: str | Path) -> str:
    """The kind that a file says it is of, such as "mask".

    Raises:
        InputError: As `load_tensors`.
    """
    path = Path(path)
    if path.is_dir():
        _refuse(path, "tensor", "is a folder; give the file itself")
    ending = _ending(path, "tensor")
    if not path.is_file():
        _refuse(path, "tensor", "cannot be read (no such file); check the path")
    head, _ = _read_pt(path, "tensor") if ending == ".pt" else _read_safetensors(path, "tensor")
    try:
        return str(json.loads(head)["kind"])
    except (ValueError, TypeError, KeyError, RecursionError):
        _refuse(path, "tensor", "was not written by stereoclinic; expected a mask or relevance file")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        InputError: It cannot be written there.
    """
    write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write a picture whole or not at all, as PNG.

    Raises:
        InputError: It cannot be written there.
    """
    write_whole(Path(path), lambda temporary: image.save(temporary, format="PNG"))


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `final` when the context is left, unless by an error.

    Raises:
        InputError: It cannot be made there.
    """
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.tmp")
    old = temporary.with_suffix(".old")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{final} cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield temporary
        if final.exists():  # a folder that is not empty cannot be replaced in one step
            os.replace(final, old)
        try:
            os.replace(temporary, final)
        except OSError:
            if old.exists():
                os.replace(old, final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or "unknown error"
        raise InputError(f"{path} cannot be written ({reason}); choose a folder that exists and is writable") from error
    finally:
        temporary.unlink(missing_ok=True)
