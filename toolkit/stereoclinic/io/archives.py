"""What `torch.save` writes of a table of tensors, read without unpickling it.

`torch.load(weights_only=True)` runs no code, but makes what a file asks for: compressed entries inflate a thousandfold,
and a pickle of fifty bytes can ask for a bytearray of any length. Here a pickle's opcodes are only looked at. The few
that a table of names, texts and dense tensors is written in are followed, any other refuses the file, and nothing is
made that is larger than the bytes it is made of.
"""

import math
import pickletools
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stereoclinic.io.reading import MOST

#: Storages, by the name that torch writes -> dtype. With `files.DTYPES` this is all that our files hold.
_STORAGES = {
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
}
_TENSOR, _ORDERED = "torch._utils _rebuild_tensor_v2", "collections OrderedDict"
_MOST_OPCODES = 100_000  # a tensor takes about forty
#: Of a tensor; our files have four.
MOST_DIMENSIONS = 8


class Unsafe(ValueError):
    """A pickle that names more than plain tensors: to load it could run code."""


class NotPlain(ValueError):
    """A tensor of another kind: sparse, expanded, quantised."""


@dataclass(frozen=True)
class _Named:
    """Something that a pickle asks for by its name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    content: bytearray


def read_archive(path: Path) -> Any:
    """The table in a .pt file: name -> text or tensor, or whatever else a pickle of plain data holds.

    Args:
        path: Of a regular file.

    Raises:
        Unsafe: It names something else.
        NotPlain: A tensor is not dense and contiguous.
        Exception: It is damaged, or no such file; in as many ways as there are bytes.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        whole = path.stat().st_size
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise ValueError("an entry is compressed, which torch.save does not do")
        if sum(entry.file_size for entry in entries) > whole or len({e.filename for e in entries}) < len(entries):
            raise ValueError("entries claim more than the file holds")
        (index,) = (
            entry for entry in entries if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")
        )
        if index.file_size > MOST:
            raise ValueError(f"more than {MOST:,} bytes of names and texts")
        folder = index.filename.removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != sys.byteorder.encode():
            raise ValueError("written on a machine of the other byte order")
        return _follow(archive, folder, archive.read(index))


def _follow(archive: zipfile.ZipFile, folder: str, pickle: bytes) -> Any:
    """What the opcodes of a pickle build, in time that grows with their number alone."""
    stack: list[Any] = []
    marks: list[int] = []  # where in the stack a tuple or a run of items begins
    memo: dict[int, Any] = {}
    contents: dict[str, bytearray] = {}  # each once, however many tensors lie in it

    def taken(start: int) -> list[Any]:
        if start < (marks[-1] if marks else 0):
            raise ValueError("a pickle that takes more than it has")
        found = stack[start:]
        del stack[start:]
        return found

    def since_mark() -> list[Any]:
        return taken(marks.pop())

    def last(count: int) -> tuple[Any, ...]:
        return tuple(taken(len(stack) - count))

    arg: Any
    for number, (opcode, arg, _) in enumerate(pickletools.genops(pickle)):
        name = opcode.name
        if number > _MOST_OPCODES:
            raise ValueError(f"a pickle of more than {_MOST_OPCODES} steps")
        if name in ("PROTO", "FRAME"):
            continue
        elif name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            stack.append(arg)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE"):
            stack.append({} if name == "EMPTY_DICT" else ())
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(last(int(name[-1])))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in ("SETITEM", "SETITEMS"):
            items = last(2) if name == "SETITEM" else since_mark()
            table = stack[-1]
            # A key is hashed, and a text is the one thing that no nesting makes hard to hash.
            if type(table) is not dict or not all(type(key) is str for key in items[::2]):
                raise NotPlain("something whose name is no text")
            table.update(zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_Named(_known(*(arg.split(" ", 1) if name == "GLOBAL" else last(2)))))
        elif name == "BINPERSID":
            stack.append(_storage(archive, folder, contents, *last(1)))
        elif name == "REDUCE":
            stack.append(_made(*last(2)))
        elif name == "STOP":
            (found,) = stack
            return found
        else:
            raise Unsafe(f"opcode {name}")
    raise ValueError("a pickle without an end")


def _known(module: Any, attribute: Any) -> str:
    if type(module) is not str or type(attribute) is not str:  # a tuple in a tuple may be endless to write out
        raise Unsafe("a name that is no text")
    name = f"{module} {attribute}"
    if name in (_TENSOR, _ORDERED) or (module == "torch" and attribute in _STORAGES):
        return name
    if name.startswith("torch._utils _rebuild_"):
        raise NotPlain("a tensor that is sparse, quantised or of a type of its own")
    raise Unsafe(name)


def _storage(archive: zipfile.ZipFile, folder: str, contents: dict[str, bytearray], about: Any) -> _Storage:
    """("storage", type, key, place, numbers), as torch writes a reference to an entry."""
    kind, named, key, _, numbers = about
    if kind != "storage" or not isinstance(named, _Named) or not isinstance(key, str):
        raise ValueError("a reference to something other than a storage")
    dtype = _STORAGES[named.name.removeprefix("torch ")]
    if key not in contents:
        contents[key] = bytearray(archive.read(f"{folder}data/{key}"))
    content = contents[key]
    if type(numbers) is not int or numbers * dtype.itemsize != len(content):
        raise ValueError("a storage of another length than it says")
    return _Storage(dtype, content)


def _made(function: Any, given: Any) -> Any:
    if not isinstance(function, _Named) or type(given) is not tuple:
        raise ValueError("a call of something that has no name")
    if function.name == _ORDERED and given == ():
        return {}  # the backward hooks of a tensor, of which there are none
    if function.name != _TENSOR or len(given) < 4 or not isinstance(given[0], _Storage):
        raise Unsafe(function.name)
    return _tensor(*given[:4])


def _tensor(storage: _Storage, start: Any, size: Any, strides: Any) -> Tensor:
    if type(size) is not tuple or type(strides) is not tuple or not len(strides) == len(size) <= MOST_DIMENSIONS:
        raise NotPlain(f"a tensor without a shape, or of more than {MOST_DIMENSIONS} dimensions")
    whole = (start, *size, *strides)
    if not all(type(number) is int and 0 <= number < 2**63 for number in whole):
        raise ValueError("a tensor whose sizes are none")
    dense, step = [], 1
    for length in reversed(size):
        dense.append(step)
        step *= max(length, 1)
    used = zip(size, strides, reversed(dense), strict=True)
    if any(length > 1 and stride != expected for length, stride, expected in used) and 0 not in size:
        raise NotPlain("a tensor that is not contiguous")
    numbers = math.prod(size)
    if start + numbers > len(storage.content) // storage.dtype.itemsize:
        raise ValueError("a tensor beyond the end of its storage")
    if numbers == 0:
        return torch.empty(size, dtype=storage.dtype)
    offset = start * storage.dtype.itemsize
    return torch.frombuffer(storage.content, dtype=storage.dtype, count=numbers, offset=offset).view(size)
