"""Tensors with plain metadata, as `.pt` or `.safetensors` by the file's ending.

Both hold named tensors and one JSON text, {"kind", "version", "metadata"}, under the name "stereoclinic". Whoever made
a file, reading it runs no code (see archives.py), and takes memory in proportion to its size and no more.

Whatever is written is written whole or not at all. While a file or folder NAME is written, these may stand beside it,
and stay where the process is killed:

    .NAME.lock               held by the run that writes NAME: `sole_writer`
    .NAME.<8 letters>.tmp    what will take its place, a file or a folder
    .NAME.<8 letters>.old    a folder that is giving up its place
    .NAME.ready              whole results on their way to their places, NAME among them: `whole_results`
    NAME.making              in a folder of parts, a baseline that is being made: `baselines.kept`

The next run that becomes the sole writer of NAME puts them right: `repair`; NAME.making goes with the next run that
finds the baseline, and what `portraits.train` was writing is written over. Progress is not among them: shards, parts
and unfinished plans are kept until what they lead to is written.
"""

import io
import json
import math
import os
import re
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
from stereoclinic.io.archives import MOST_DIMENSIONS, NotPlain, Unsafe, read_archive
from stereoclinic.io.reading import MOST, check_plain

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
    temporary = _temporary(path)
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
    if len(tensors) > _MOST_TENSORS:
        _refuse(path, kind, f"holds {len(tensors):,} tensors; make it again")
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.dtype not in DTYPES or tensor.ndim > MOST_DIMENSIONS:
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
        return _short(parsed["kind"])
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
    with _temporary_folder(final) as temporary:
        yield temporary
        _give_place(temporary, final)


@contextmanager
def whole_results(place: Path) -> Iterator[Path]:
    """A temporary folder; what lies in it when the context is left, unless by an error, moves beside `place`.

    All of it moves, or nothing. That takes several steps, and a run that is killed between two of them leaves the rest
    for the next one to move (`repair`). Files of the same names go first and the new ones come last, so that none ever
    stands beside what belongs to another run.

    Args:
        place: A file or folder among them, which the run is the sole writer of; the folder that it is in is made.

    Raises:
        InputError: It cannot be made there, or a folder stands where a file goes, or the other way round.
    """
    ready = _ready(place)
    with _temporary_folder(place) as temporary:
        yield temporary
        for there in (place.parent / each.name for each in temporary.iterdir()):
            if there.exists() and there.is_dir() != (temporary / there.name).is_dir():
                raise InputError(f"{there} is {'a folder' if there.is_dir() else 'a file'}; give another folder")
        if ready.is_dir():
            _put_in_place(ready)
        os.replace(temporary, ready)
    _put_in_place(ready)


@contextmanager
def _temporary_folder(final: Path) -> Iterator[Path]:
    temporary = _temporary(final)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{final} cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(ready: Path) -> None:
    """Move what whole results consist of to where they belong; goes on where a killed run was."""
    files_last = sorted(ready.iterdir(), key=Path.is_file)
    for each in filter(Path.is_file, files_last):
        (ready.parent / each.name).unlink(missing_ok=True)
    for each in files_last:
        _give_place(each, ready.parent / each.name)
    ready.rmdir()


def _give_place(new: Path, place: Path) -> None:
    """Move a file or folder to a place; a folder there, which cannot be replaced in one step, is moved away first."""
    if not place.is_dir():
        os.replace(new, place)
        return
    old = _temporary(place).with_suffix(".old")
    os.replace(place, old)
    try:
        os.replace(new, place)
    except OSError:
        os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _ready(place: Path) -> Path:
    return place.with_name(f".{place.name}.ready")


def repair(path: Path) -> list[str]:
    """Put right what killed runs left of a file or folder that nobody is writing.

    Whole results move to their places, a folder that had given up its place for nothing gets it back, and whatever was
    only half written goes, also within the folder.

    Returns:
        A line for each thing that the user may wonder about.
    """
    said: list[str] = []
    if (ready := _ready(path)).is_dir():
        _put_in_place(ready)
        said.append(f"{path.parent}: a run was killed while its results were put in place; they are now")
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    for each in _matching(path.parent, name):
        if each.suffix == ".old" and not path.exists():
            os.replace(each, path)
            said.append(f"{path}: a run was killed while it was replaced; it is there again as it was")
        else:
            _remove(each)
    for each in _matching(path, re.compile(r"\..+\.[0-9a-f]{8}\.tmp")):
        _remove(each)
    return said


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _matching(folder: Path, name: re.Pattern[str]) -> list[Path]:
    return [each for each in folder.iterdir() if name.fullmatch(each.name)] if folder.is_dir() else []


@contextmanager
def sole_writer(path: Path) -> Iterator[list[str]]:
    """While in the context, no other process is in it for the same file or folder; one that is killed leaves it.

    The folder that it is in is made if it is not there. What killed runs left there is put right, see `repair`, and
    what was done is yielded. Where the file system knows no locks, nothing is held, and nothing put right.

    Raises:
        InputError: Another process writes it, or the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # no such locks here
        yield []
        return
    lock = path.with_name(f".{path.name}.lock")
    said: list[str] = []
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
                said = repair(path)
                break
            file.close()  # of a run that ended meanwhile, and took its name away
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose a folder that is writable") from error
    try:
        yield said
    finally:
        lock.unlink(missing_ok=True)  # while it is still held
        file.close()


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name")
    temporary = _temporary(path)
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
        changes = ", ".join(f"{name:.80} was {then.get(name)!r:.80} and is {now.get(name)!r:.80}" for name in names[:3])
        raise InputError(
            f"{place} was made in another configuration: {changes}; run as then, or remove it to start anew"
        )
