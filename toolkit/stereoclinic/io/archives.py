"""What a `.pt` file asks for, checked before `torch.load` makes anything of it.

`torch.load(weights_only=True)` runs no code, but it allocates whatever size a file asks for: compressed entries grow a
thousandfold, and a pickle of fifty bytes can ask for a bytearray of any length. The checks here keep the memory and
the time of a load in proportion to the size of the file.
"""

import io
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from stereoclinic.io.reading import MOST

#: Bounds of a pickle. A tensor takes about forty steps; relevance has fourteen tensors.
_MOST_STEPS = 20_000
_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
_REBUILD = "torch._utils _rebuild_"
_NAMES = {f"{_REBUILD}tensor_v2", "collections OrderedDict", *(f"torch {kind}Storage" for kind in _STORAGES)}
#: Steps that make one value, which may be used again. A tuple that is used again could be endless to hash or print.
_SINGLE = {"GLOBAL", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE"}
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_BUILD = {"EMPTY_DICT", "EMPTY_TUPLE", "MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "SETITEM", "SETITEMS"}
_STEPS = {"PROTO", "STOP", "BINPERSID", "REDUCE", *_SINGLE, *_PUT, *_GET, *_BUILD}


class Unsafe(ValueError):
    """A pickle that names more than plain tensors: loading it could run code."""


class NotPlain(ValueError):
    """A tensor of another kind: sparse, expanded, quantised."""


def load_archive(path: Path) -> Any:
    """What `torch.save` wrote: a table of texts and dense tensors.

    Raises:
        Unsafe: The pickle names something else.
        NotPlain: A tensor is sparse, quantised or of a type of its own.
        Exception: The file is damaged; libraries raise many errors then.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(checked, "w") as copy:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise ValueError("an entry is compressed, which torch.save does not do")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("entries claim more than the file holds")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("two entries have one name")
        for entry in entries:
            content = archive.read(entry)
            if entry.filename.endswith(".pkl"):
                _check_pickle(content)
            copy.writestr(entry.filename, content)  # torch's reader of archives then sees what was checked, no more
    checked.seek(0)
    return torch.load(checked, map_location="cpu", weights_only=True)


def _check_pickle(content: bytes) -> None:
    """Refuse a pickle that takes any step which a table of texts and tensors does not need."""
    if len(content) > MOST:
        raise ValueError(f"more than {MOST:,} bytes of names and texts")
    single, last = set[int](), ""
    value: Any
    for number, (opcode, value, _) in enumerate(pickletools.genops(content)):
        if number > _MOST_STEPS:
            raise ValueError(f"a pickle of more than {_MOST_STEPS:,} steps")
        step = opcode.name
        if step not in _STEPS:
            raise Unsafe(f"step {step} of a pickle")
        if step == "GLOBAL" and value not in _NAMES:
            if value.startswith(_REBUILD):
                raise NotPlain("a tensor that is sparse, quantised or of a type of its own")
            raise Unsafe(value)
        if step in _PUT:
            single.discard(value)
            if last in _SINGLE:
                single.add(value)
        elif step in _GET and value not in single:
            raise ValueError("a pickle that uses a table or a list twice")
        last = step if step not in _PUT else last
