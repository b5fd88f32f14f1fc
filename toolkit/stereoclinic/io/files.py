"""The one place that writes: every file and folder is written whole or not at all, by one run at a time.

While a file or folder NAME is written, these may stand next to it. They stay where the process is killed:

    .NAME.lock               held by the run that writes NAME: `sole_writer`
    .NAME.<8 letters>.tmp    what will take its place, a file or a folder
    .NAME.<8 letters>.old    a folder that is giving up its place
    .NAME.ready              whole results on their way to their places, NAME among them: `whole_results`
    NAME.set-aside           a damaged file of a folder of parts, which nobody reads: `set_aside`
    NAME.making              in a folder of parts, a baseline that is being made: `methods.checkpoint`

The next run that becomes the sole writer of NAME cleans up (`repair`); NAME.making goes with the next run that finds
the baseline. Progress is kept: shards, parts and unfinished plans stay until what they lead to is written.
"""

import errno
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from stereoclinic.errors import InputError

#: Ending of a damaged file: it is not read again, and may be removed.
ASIDE = ".set-aside"
#: What a file system answers that has no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def write_whole(path: Path, write: Callable[[Path], object], what: str | None = None) -> None:
    """Have a function write a temporary file in the same folder, then rename it.

    Args:
        path: Where the file goes.
        write: Writes it under the name that it is given.
        what: The file, in errors; its path by default.

    Raises:
        InputError: The path is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give a file name")
    temporary = _temporary(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or "unknown error"
        raise InputError(
            f"{what or path} cannot be written ({reason}); choose a folder that exists and is writable"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all. Raises InputError where it cannot be written."""
    write_whole(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_image(path: str | Path, image: Image.Image) -> None:
    """Write an image as PNG, whole or not at all. Raises InputError where it cannot be written."""
    write_whole(Path(path), lambda temporary: image.save(temporary, format="PNG"))


def set_aside(path: Path) -> None:
    """Give a damaged file the ending `ASIDE`; nothing happens where another run was first."""
    with suppress(FileNotFoundError):
        os.replace(path, path.with_suffix(ASIDE))


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
    """A temporary folder; when the context is left without an error, what lies in it moves next to `place`.

    All of it moves, or nothing. That takes several steps; `repair` finishes them for a run that was killed. Old files
    of the same names go first and the new ones come last, so that files of two runs never stand together.

    Args:
        place: A file or folder among them, which the run is the sole writer of; its folder is made.

    Raises:
        InputError: It cannot be made there, or a folder stands where a file goes, or the other way round.
    """
    ready = _ready(place)
    with _temporary_folder(place) as temporary:
        yield temporary
        for target in (place.parent / each.name for each in temporary.iterdir()):
            if target.exists() and target.is_dir() != (temporary / target.name).is_dir():
                raise InputError(f"{target} is {'a folder' if target.is_dir() else 'a file'}; give another folder")
        if ready.is_dir():
            _put_in_place(ready)
        os.replace(temporary, ready)
    _put_in_place(ready)


@contextmanager
def sole_writer(path: Path, wait: bool = False) -> Iterator[list[str]]:
    """While in the context, no other process is in it for the same file or folder; `wait` for one that is.

    The lock goes with the process, however it ends. The folder of `path` is made. Yields what `repair` did. Where the
    file system has no locks, nothing is held and nothing repaired.

    Raises:
        InputError: Another process writes it, or the folder cannot be written to.
    """
    name = path.with_name(f".{path.name}.lock")
    lock = FileLock(name, timeout=-1 if wait else 0, fallback_to_soft=False)
    repaired: list[str] = []
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        repaired = repair(path)
    except Timeout as error:
        raise InputError(f"another run is writing {path}; wait for it, or give another --out") from error
    except OSError as error:
        lock.release()
        if error.errno not in _NO_LOCKS:
            raise InputError(
                f"{path} cannot be written ({error.strerror}); choose a folder that is writable"
            ) from error
    try:
        yield repaired
    finally:
        with suppress(OSError):
            name.unlink()  # while it is still held
        lock.release()


def repair(path: Path) -> list[str]:
    """Clean up after killed runs, at a file or folder that nobody is writing.

    Finish moves of complete results, restore a folder that was moved away, and delete incomplete files, also those
    within the folder.

    Returns:
        A line for each change that the user may wonder about.
    """
    changes: list[str] = []
    if (ready := _ready(path)).is_dir():
        _put_in_place(ready)
        changes.append(f"{path.parent}: a run was killed while its results were put in place; they are now")
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.(tmp|old)")
    for each in _matching(path.parent, name):
        if each.suffix == ".old" and not path.exists():
            os.replace(each, path)
            changes.append(f"{path}: a run was killed while it was replaced; it is there again as it was")
        else:
            _remove(each)
    for each in _matching(path, re.compile(r"\..+\.[0-9a-f]{8}\.tmp")):
        _remove(each)
    return changes


def check_same(place: Path, then: Any, now: dict[str, Any]) -> None:
    """Refuse to continue what was made in another configuration.

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


def plain(value: Any) -> Any:
    """The same data with None for numbers that are not finite, which JSON cannot hold."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    """Move whole results to where they belong; continues where a killed run stopped."""
    files_last = sorted(ready.iterdir(), key=Path.is_file)
    for each in filter(Path.is_file, files_last):
        (ready.parent / each.name).unlink(missing_ok=True)
    for each in files_last:
        _give_place(each, ready.parent / each.name)
    ready.rmdir()


def _give_place(new: Path, place: Path) -> None:
    """Move a file or folder to a place; a folder cannot be replaced in one step, so an old one is moved away first."""
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


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _matching(folder: Path, name: re.Pattern[str]) -> list[Path]:
    return [each for each in folder.iterdir() if name.fullmatch(each.name)] if folder.is_dir() else []
