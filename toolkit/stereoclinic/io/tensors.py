"""Tensors with plain metadata, as `.pt` or `.safetensors` by the file's ending.

Both hold named tensors and one JSON text, {"kind", "version", "metadata"}, under the name "stereoclinic". Reading a
file runs no code, whoever made it (see `archives`), and takes memory in proportion to its size.
"""

import difflib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from stereoclinic.errors import InputError
from stereoclinic.io.archives import NotPlain, Unsafe, load_archive
from stereoclinic.io.files import write_whole
from stereoclinic.io.reading import MOST, check_plain

ENDINGS = (".pt", ".safetensors")
DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
_HEAD = "stereoclinic"
#: Tensors of a file, and dimensions of a tensor; ours have up to fourteen and four.
_MOST_TENSORS, _MOST_DIMENSIONS = 1000, 8


def save_tensors(
    path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a file whole or not at all.

    Args:
        path: Ends in .pt or .safetensors.
        kind: What the file holds, such as "mask"; asked for again on loading.
        version: Of this kind's format.
        tensors: Name -> dense tensor of any shape and device, of one of `DTYPES`.
        metadata: Plain data that JSON can hold.

    Raises:
        InputError: The ending is another, or the file cannot be written there.
    """
    path = Path(path)
    ending = _ending(path, kind)
    if path.is_dir():
        _refuse(path, kind, f"is a folder; give a file name ending in {' or '.join(ENDINGS)}")
    head = json.dumps({"kind": kind, "version": version, "metadata": dict(metadata)}, sort_keys=True)
    # Clones: safetensors refuses tensors that share memory, and torch.save would write the whole of a view's storage.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        if ending == ".pt":
            content = io.BytesIO()  # on a full disk torch's own error says nothing
            torch.save({_HEAD: head, **plain}, content)
            temporary.write_bytes(content.getbuffer())
        else:
            temporary.write_bytes(safetensors.torch.save(plain, {_HEAD: head}))

    write_whole(path, write, f"{kind} file {path}")


def load_tensors(path: str | Path, kind: str, *versions: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        InputError: The file is missing, a folder, empty, truncated, would run code, or has another kind or
            version.
    """
    path = Path(path)
    tensors, parsed = _read(path, kind)
    try:
        found, its_version, metadata = parsed["kind"], parsed["version"], parsed["metadata"]
    except (TypeError, KeyError):
        _refuse(path, kind, f"was not written by stereoclinic; expected a {kind} file")
    if found != kind:
        _refuse(path, kind, f"is a {_short(found)} file; expected a {kind} file")
    if its_version not in versions:
        newer = isinstance(its_version, int) and its_version > max(versions)
        advice = "a newer one wrote it; update" if newer else "make it again"
        reads = f"this stereoclinic reads version {' or '.join(map(str, versions))}: {advice}"
        _refuse(path, kind, f"has format version {_short(its_version)}; {reads}")
    if not isinstance(metadata, dict):
        _refuse(path, kind, "has metadata that is not a table; make it again")
    return tensors, metadata


def kind_of(path: str | Path) -> str:
    """The kind in a file's metadata, such as "mask".

    Raises:
        InputError: As `load_tensors`.
    """
    path = Path(path)
    either = "mask or relevance"
    _, parsed = _read(path, either)
    try:
        return _short(parsed["kind"])
    except (TypeError, KeyError):
        _refuse(path, either, f"was not written by stereoclinic; expected a {either} file")


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], Any]:
    """A file's tensors, and its JSON."""
    if path.is_dir():
        _refuse(path, kind, "is a folder; give the file itself")
    ending = _ending(path, kind, _did_you_mean(path))
    try:
        size = path.stat().st_size
        if path.is_file():
            path.open("rb").close()
    except OSError as error:
        advice = _did_you_mean(path) or "; check the path"
        raise InputError(f"{kind} file {path} cannot be read ({error.strerror}){advice}") from error
    if not path.is_file():
        _refuse(path, kind, "is not a regular file; give the file itself")
    if size == 0:
        _refuse(path, kind, "is empty (0 bytes); make it again")
    head, tensors = (_read_pt if ending == ".pt" else _read_safetensors)(path, kind)
    if len(tensors) > _MOST_TENSORS:
        _refuse(path, kind, f"holds {len(tensors):,} tensors; make it again")
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            _refuse(path, kind, f"holds {_short(name)}, which is not a plain tensor; make it again")
    try:
        if len(head) > MOST:
            raise ValueError
        parsed = json.loads(head)
        check_plain(parsed)
    except (ValueError, TypeError, RecursionError):
        _refuse(path, kind, f"was not written by stereoclinic; expected a {kind} file")
    return tensors, parsed


def _is_plain(tensor: Any) -> bool:
    """Whether something is a dense tensor as `save_tensors` writes them."""
    return (
        type(tensor) is Tensor
        and tensor.dtype in DTYPES
        and tensor.ndim <= _MOST_DIMENSIONS
        and tensor.is_contiguous()
        and not (tensor.requires_grad or tensor.is_neg())
    )


def _read_pt(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    unsafe = "holds objects other than plain tensors, and loading it could run code; do not trust where it came from"
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # a bare pickle; torch.save writes an archive
            _refuse(path, kind, unsafe)
    try:
        content = load_archive(path)
    except Unsafe as error:
        raise InputError(f"{kind} file {path} {unsafe}") from error
    except NotPlain as error:
        raise InputError(f"{kind} file {path} holds {error}, which is not a plain tensor; make it again") from error
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        raise InputError(
            f"{kind} file {path} is truncated, or no .pt file at all ({_short(error)}); copy or make it again"
        ) from error
    if type(content) is not dict or _HEAD not in content:
        _refuse(path, kind, f"was not written by stereoclinic; expected a {kind} file")
    return content.pop(_HEAD), content


def _read_safetensors(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    try:
        with path.open("rb") as raw:
            claimed = int.from_bytes(raw.read(8), "little")
        if claimed > MOST:
            raise ValueError(f"a header of {claimed:,} bytes")
        with safetensors.safe_open(path, framework="pt") as file:
            head = (file.metadata() or {}).get(_HEAD)
            names = file.keys()
            if len(names) > _MOST_TENSORS:
                raise ValueError(f"{len(names)} tensors")
            # Clones, so that nothing points into the file once it is closed, or replaced.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except Exception as error:  # as above
        raise InputError(
            f"{kind} file {path} is truncated, or no .safetensors file at all ({_short(error)}); copy or make it again"
        ) from error
    return head, tensors


def _ending(path: Path, kind: str, advice: str = "") -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        has = f"ends in {ending!r}" if ending else "has no file ending"
        _refuse(path, kind, f"{has}; expected {' or '.join(ENDINGS)}{advice}")
    return ending


def _did_you_mean(path: Path) -> str:
    """Up to three files in its folder whose names begin with the given one, or the one most like it; "" for none."""
    try:
        names = sorted(each.name for each in path.parent.iterdir() if each.suffix.lower() in ENDINGS)
    except (OSError, ValueError):
        return ""
    begun = [name for name in names if name.startswith(f"{path.name}.")]
    meant = begun or difflib.get_close_matches(path.name, names, 1, 0.85)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in meant)}?" if 0 < len(meant) < 4 else ""


def _short(value: object) -> str:
    text = value if isinstance(value, str) else str(value) or type(value).__name__
    return "".join(each if each.isprintable() else " " for each in text[:60])


def _refuse(path: Path, kind: str, reason: str) -> NoReturn:
    raise InputError(f"{kind} file {path} {reason}")
