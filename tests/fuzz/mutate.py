"""What is done to valid files: bytes damaged, values swapped, tensors reshaped; the same by the same random numbers."""

import io
import json
import re
import zipfile
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

#: What a value may be replaced by: other JSON types, ends of ranges, what a terminal obeys, what no encoding holds.
ODD: list[Any] = [
    None, True, 0, -1, 3, 1.5, -0.5, float("nan"), float("inf"), 10**30, 2**63, -(2**63), 2**40, "", " ", "x",
    "\x1b[2J", "\ud800", "a" * 3000, "../../x", [], {}, [[]], [1, 2], ["a", "b"], [["a", "conv", 3]], {"a": 1},
    {"estimate": "x"}, {"": {"": []}}, [None, None], "\u202e", "a\nb",
]  # fmt: skip
_BYTES = [
    b"\xff" * 8,
    b"\0" * 8,
    b"[" * 400,
    b"9" * 400,
    b"nan",
    b"\n",
    b",",
    b'"',
    b"{",
    b"\xef\xbb\xbf",
    b"\r",
    b"*a",
]
#: Opcodes of pickles in a row: marks, what is taken since the last, what is remembered and made into pairs.
_OPCODES = [
    b"(" * 300,
    b"t" * 40,
    b"h\x00" * 300,
    b"h\x01" * 40,
    b"\x86" * 40,
    b"R",
    b"\x93",
    b"Q",
    b"\x94" * 300,
    b"s",
    b"u",
]
_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def damaged(random: Random, whole: bytes, others: Sequence[bytes] = _BYTES) -> bytes:
    """Bytes flipped, cut out, inserted, written twice or over, up to four times."""
    content = bytearray(whole)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(content))
        to = min(len(content), at + random.randint(0, 40))
        how = random.choice(["flip", "flip", "cut", "insert", "twice", "over", "end"])
        new = random.choice([*others, random.randbytes(random.randint(0, 12))])
        if how == "flip" and at < len(content):
            content[at] ^= 1 << random.randint(0, 7)
        elif how == "cut":
            del content[at:to]
        elif how == "insert":
            content[at:at] = new
        elif how == "twice":
            content[at:at] = content[at:to]
        elif how == "over":
            content[at : at + len(new)] = new
        elif how == "end" and random.random() < 0.5:
            del content[at:]
    return bytes(content)


def odd(random: Random) -> Any:
    """A value of another kind, or one that is nested deep."""
    if random.random() < 0.1:
        depth = random.randint(1, 300)
        return json.loads("[" * depth + "]" * depth)
    return json.loads(json.dumps(random.choice(ODD)))


def _places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within plain data."""
    found = [path]
    if isinstance(data, dict):
        found += [each for key in data for each in _places(data[key], (*path, key))]
    elif isinstance(data, list):
        found += [each for i in range(len(data)) for each in _places(data[i], (*path, i))]
    return found


def swapped(random: Random, data: Any) -> Any:
    """One or two values of plain data dropped, replaced by something else, or joined by one that was not there."""
    data = json.loads(json.dumps(data))
    for _ in range(random.randint(1, 2)):
        path = random.choice(_places(data))
        if not path:
            if random.random() < 0.1:
                return odd(random)
            continue
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        if random.random() < 0.2:
            del inner[path[-1]]
        elif isinstance(inner, dict) and random.random() < 0.1:
            inner[random.choice(["", "images", "a" * 300, "selection", "\x1b"])] = odd(random)
        else:
            inner[path[-1]] = odd(random)
    return data


def swapped_json(random: Random, whole: bytes) -> bytes:
    return json.dumps(swapped(random, json.loads(whole))).encode()


_VALUES = [
    "0xfff", "-1", "1e400", "nan", "true", '""', '"x"', "[]", "[1]", "[[]]", '["a"]', "{}", "1979-05-27", '["",0]',
    "{ a = 1 }", "0x" + "f" * 6000, "[" * 200 + "]" * 200, '"\\u0000"', '["", " "]', '"' + "a" * 3000 + '"',
    '["a\\nb"]',
]  # fmt: skip


def swapped_toml(random: Random, whole: bytes) -> bytes:
    """A line's value swapped for one of another type."""
    lines = whole.decode().split("\n")
    i = random.choice([i for i, line in enumerate(lines) if re.match(r"[\w-]+ = ", line)])
    lines[i] = lines[i].split(" = ", 1)[0] + " = " + random.choice(_VALUES)
    return "\n".join(lines).encode()


_YAML = [
    '!!int ""', "!!bool maybe", "2020-99-99", "2020-01-01", "!!float x", "!!binary x", "!!set {a}", "!!omap [a]",
    "&a x",
    "*a", "!!python/object/apply:os.system [id]", "!x y", "<<", "=", "~", ".nan", ".inf", "0x_", "0b_", "1:99:99",
    "[a, [b]]",
    "{a: 1}", "? [a]", "!!timestamp x", "|\n  a", '"\\ud800"', '"\\x1b[2J"', "9" * 5000, "- " * 50, "'", "%YAML 9",
    "!!null x",
]  # fmt: skip


def swapped_yaml(random: Random, whole: bytes) -> bytes:
    """A line's value, or its key, swapped for something that YAML means something else by."""
    lines = whole.decode().split("\n")
    i = random.randrange(len(lines))
    key, _, value = lines[i].partition(": ")
    new = random.choice(_YAML)
    lines[i] = f"{new}: {value}" if random.random() < 0.2 else f"{key}: {new}"
    return "\n".join(lines).encode()


def reshaped(random: Random, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor left out, or of another shape, dtype or value."""
    name = random.choice(sorted(tensors))
    rest = {key: each for key, each in tensors.items() if key != name}
    shape = [random.choice([0, 1, 2, 3, 7]) for _ in range(random.randint(0, 5))]
    if random.random() < 0.1:
        shape = [1] * random.choice([9, 64, 65])
    dtype = random.choice(_DTYPES)
    value = random.choice([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")])
    how = random.choice(["none", "other", "other", "same", "wide", "tall", "more"])
    if how == "none":
        return rest
    if how == "same":
        return {**rest, name: torch.full_like(tensors[name], value if tensors[name].is_floating_point() else 1)}
    if how == "more":
        return {**tensors, random.choice(["", "x", "stereoclinic", "a" * 300]): tensors[name]}
    if how in ("wide", "tall"):
        return {**rest, name: torch.empty((0, 2**40) if how == "wide" else (2**40, 0), dtype=dtype)}
    count = 1
    for size in shape:
        count *= size
    values = [value if dtype.is_floating_point else 1.0] * count
    return {**rest, name: torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)}


def odd_objects(random: Random, head: str, tensors: dict[str, Tensor]) -> bytes:
    """A .pt file in which one tensor is of a kind that ours are never of."""
    name = random.choice(sorted(tensors))
    deep: Any = ()
    for _ in range(200):
        deep = (deep, deep)
    made = [
        torch.eye(2).to_sparse(), torch.eye(2).to_sparse_csr(),
        torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8),
        torch.eye(2, dtype=torch.complex64),
        torch.eye(2).to(torch.float8_e4m3fn), torch.ones(1).expand(5), torch.eye(3).T,
        torch.nn.Parameter(torch.eye(2)), [1, 2], {"a": 1}, {1, 2}, "text", None, 10**30, b"bytes", deep, 1.5,
        torch.empty(2, device="meta"), torch.float32, torch.Size([2]), Random,
    ]  # fmt: skip
    held = io.BytesIO()
    torch.save({"stereoclinic": head, **tensors, name: random.choice(made)}, held)
    return held.getvalue()


def repacked(random: Random, whole: bytes) -> bytes:
    """A .pt file whose pickle, or one entry of numbers, is damaged, and whose archive is whole."""
    held = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(held, "w") as new:
        names = old.namelist()
        chosen = random.choice([name for name in names if name.endswith("data.pkl")] * len(names) + names)
        for name in names:
            content = old.read(name)
            new.writestr(name, damaged(random, content, _OPCODES) if name == chosen else content)
    return held.getvalue()
