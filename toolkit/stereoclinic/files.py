"""Tensors with plain metadata, as `.pt` or `.safetensors` by the file's ending.

Both hold named tensors and one JSON text, {"kind", "version", "metadata"}, under the name "stereoclinic". Whoever made
a file, reading it runs no code (see archives.py), and takes memory in proportion to its size and no more.
"""

import io
import json
import math
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

from stereoclinic.archives import NotPlain, Unsafe, read_archive
from stereoclinic.errors import InputError
from stereoclinic.reading import MOST, check_plain

ENDINGS = (".pt", ".safetensors")
DTYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64}
)
_HEAD = "stereoclinic"
_MOST_TENSORS = 1000  # relevance has fourteen


def save_tensors(
    path: str | Path, kind: str, version: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write a file whole or not at all: a temporary name in the same folder, then a rename.

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
    # Clones: safetensors refuses tensors that share memory, and torch.save would write the whole of a view's
    # storage.
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if ending == ".pt":
            content = io.BytesIO()  # what torch raises on a disk that is full says nothing
            torch.save({_HEAD: head, **plain}, content)
            temporary.write_bytes(content.getbuffer())
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
    tensors, parsed = _read(path, kind, kind)
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
        _refuse(path, kind, "has metadata that is no table; make it again")
    return tensors, metadata


def _read(path: Path, kind: str, expected: str) -> tuple[dict[str, Tensor], Any]:
    """A file's tensors, and its JSON."""
    if path.is_dir():
        _refuse(path, kind, "is a folder; give the file itself")
    ending = _ending(path, kind)
    try:
        size = path.stat().st_size
        if path.is_file():
            path.open("rb").close()
    except OSError as error:
        raise InputError(f"{kind} file {path} cannot be read ({error.strerror}); check the path") from error
    if not path.is_file():
        _refuse(path, kind, "is no regular file; give the file itself")
    if size == 0:
        _refuse(path, kind, "is empty (0 bytes); make it again")
    head, tensors = (_read_pt if ending == ".pt" else _read_safetensors)(path, kind)
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.dtype not in DTYPES:
            _refuse(path, kind, f"holds {_short(name)}, which is no plain tensor; make it again")
    try:
        if len(head) > MOST:
            raise ValueError
        parsed = json.loads(head)
        check_plain(parsed)
    except (ValueError, TypeError, RecursionError):
        _refuse(path, kind, f"was not written by stereoclinic; expected a {expected} file")
    return tensors, parsed


def _read_pt(path: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    unsafe = "holds objects other than plain tensors, and loading it could run code; do not trust where it came from"
    with path.open("rb") as file:
        if file.read(1) == b"\x80":  # a bare pickle; torch.save writes an archive
            _refuse(path, kind, unsafe)
    try:
        content = read_archive(path)
    except Unsafe as error:
        raise InputError(f"{kind} file {path} {unsafe}") from error
    except NotPlain as error:
        raise InputError(f"{kind} file {path} holds {error}, which is no plain tensor; make it again") from error
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


def _ending(path: Path, kind: str) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        _refuse(path, kind, f"ends in {ending or 'nothing'!r}; expected {' or '.join(ENDINGS)}")
    return ending


def _short(value: object) -> str:
    text = value if isinstance(value, str) else str(value) or type(value).__name__
    return "".join(each if each.isprintable() else " " for each in text[:60])


def _refuse(path: Path, kind: str, reason: str) -> NoReturn:
    raise InputError(f"{kind} file {path} {reason}")


def kind_of(path: str | Path) -> str:
    """The kind that a file says it is of, such as "mask".

    Raises:
        InputError: As `load_tensors`.
    """
    path = Path(path)
    _, parsed = _read(path, "tensor", "mask or relevance")
    try:
        return str(parsed["kind"])
    except (TypeError, KeyError):
        _refuse(path, "tensor", "was not written by stereoclinic; expected a mask or relevance file")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        InputError: It cannot be written there.
    """
    write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plain(value: Any) -> Any:
    """The same data with None for what is not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """While in the context, no other process is in it for the same file; one that is killed leaves it.

    The folder is made if it is not there. Where the file system knows no locks, nothing is held.

    Raises:
        InputError: Another process writes that file, or the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = lock.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.close()
                raise InputError(f"another run is writing {path}; wait for it, or give another --out") from error
            except OSError:
                break
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
            file.close()  # of a run that ended meanwhile, and took its name away
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose a folder that is writable") from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is still held
        file.close()


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


def check_same(place: Path, then: Any, now: dict[str, Any]) -> None:
    """Refuse to go on with what was made in another configuration.

    Args:
        place: Where it lies.
        then: The configuration that it says it was made in.
        now: The configuration of this run, as it comes out of JSON.

    Raises:
        InputError: They differ (says in what).
    """
    then = then if isinstance(then, dict) else {}
    if names := [name for name in {**now, **then} if now.get(name) != then.get(name)]:
        changes = ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in names[:3])
        raise InputError(
            f"{place} was made in another configuration: {changes}; run as then, or remove it to start anew"
        )
