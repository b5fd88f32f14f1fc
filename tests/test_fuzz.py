"""Whatever a file holds, what reads it either reads it or says in one line why not: `InputError`, and nothing else."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fuzz.samples import CONFIGURATION, TENSORS, TEXTS, read_shard, states
from torch import Tensor

from stereoclinic.ddtd.shards import KIND as SHARD
from stereoclinic.ddtd.shards import VERSION as SHARD_VERSION
from stereoclinic.errors import InputError
from stereoclinic.evaluation.bench.drawing import KIND as DRAWN
from stereoclinic.evaluation.bench.drawing import Part, Store
from stereoclinic.evaluation.bench.mitigation import Mitigation
from stereoclinic.evaluation.report.report import slug
from stereoclinic.files import load_tensors, save_tensors
from stereoclinic.pipelines import pictures  # noqa: F401  (imported here, so that no example pays for it)
from stereoclinic.pipelines.sites import Site
from stereoclinic.prompts import load_prompts
from stereoclinic.sns.planning import KIND as PLAN
from stereoclinic.sns.planning import VERSION as PLAN_VERSION
from stereoclinic.sns.planning import Unfinished
from stereoclinic.sns.stepwise import Planned

ENDINGS = (".pt", ".safetensors")
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
MANY = settings(FEW, max_examples=150)

#: What a value may be replaced by: other JSON types, ends of ranges, what a terminal obeys, what no encoding holds.
ODD: list[Any] = [
    None, True, 0, -1, 3, 1.5, -0.5, float("nan"), float("inf"), 10**30, 2**63, -(2**63), 2**40, "", " ", "x",
    "\x1b[2J", "\ud800", "a" * 3000, "../../x", [], {}, [[]], [1, 2], ["a", "b"], [["a", "conv", 3]], {"a": 1},
    {"estimate": "x"}, {"": {"": []}}, [None, None],
]  # fmt: skip
odd = st.sampled_from(ODD) | st.integers(1, 300).map(lambda depth: json.loads("[" * depth + "]" * depth))


@st.composite
def damage(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes flipped, cut out, inserted, written twice or over, up to four times."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "twice", "over", "end"]))
        new = draw(
            st.binary(max_size=12) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"[" * 400, b"9" * 400, b"nan", b"\n"])
        )
        if how == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:to]
        elif how == "insert":
            content[at:at] = new
        elif how == "twice":
            content[at:at] = content[at:to]
        elif how == "over":
            content[at : at + len(new)] = new
        else:
            del content[at:]
    return bytes(content)


def places(data: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value within plain data."""
    found = [path]
    if isinstance(data, dict):
        found += [each for key in data for each in places(data[key], (*path, key))]
    elif isinstance(data, list):
        found += [each for i in range(len(data)) for each in places(data[i], (*path, i))]
    return found


@st.composite
def swapped(draw: st.DrawFn, data: Any) -> Any:
    """One or two values of plain data dropped, or replaced by something else."""
    data = json.loads(json.dumps(data))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(data)))
        new = json.loads(json.dumps(draw(odd)))
        if not path:
            return new
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        if draw(st.booleans()) and draw(st.booleans()):
            del inner[path[-1]]
        else:
            inner[path[-1]] = new
    return data


@st.composite
def reshaped(draw: st.DrawFn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor left out, or of another shape, dtype or value."""
    name = draw(st.sampled_from(sorted(tensors)))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]))
    value = draw(st.sampled_from([0.0, 1.0, -1.0, 1e30, float("nan"), float("inf")]))
    huge = torch.zeros(0, 2**40, dtype=dtype) if draw(st.booleans()) else torch.zeros(2**40, 0, dtype=dtype)
    filled = torch.full(shape, 1.0 if not dtype.is_floating_point else value, dtype=torch.float64).to(dtype)
    same = torch.full_like(tensors[name], value if tensors[name].is_floating_point() else 1)
    new = draw(st.sampled_from([None, filled, filled, same, huge]))
    rest = {key: each for key, each in tensors.items() if key != name}
    return rest if new is None else {**rest, name: new}


def holds(read: Callable[[Path], Any], path: Path) -> None:
    try:
        read(path)
    except InputError as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 4000
        line.encode()  # can be printed


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", TENSORS)
@MANY
@given(data=st.data())
def test_damaged_files_of_tensors(tmp_path: Path, kind: str, ending: str, data: st.DataObject):
    write, read = TENSORS[kind]
    whole, path = tmp_path / f"whole{ending}", tmp_path / f"damaged{ending}"
    if not whole.exists():
        write(whole)
    path.write_bytes(data.draw(damage(whole.read_bytes())))
    holds(read, path)


@pytest.mark.parametrize("kind", TENSORS)
@MANY
@given(data=st.data())
def test_files_of_tensors_that_hold_something_else(tmp_path: Path, kind: str, data: st.DataObject):
    write, read = TENSORS[kind]
    whole, path = tmp_path / "whole.pt", tmp_path / f"other{data.draw(st.sampled_from(ENDINGS))}"
    if not whole.exists():
        write(whole)
    tensors, head = load_tensors(whole, kind, 2)
    read(whole)
    if data.draw(st.booleans()):
        head = data.draw(swapped(head).filter(lambda each: isinstance(each, dict)))
    else:
        tensors = data.draw(reshaped(tensors))
    save_tensors(path, kind, 2, tensors, head)
    holds(read, path)


@MANY
@given(data=st.data())
def test_shards_that_hold_something_else(tmp_path: Path, data: st.DataObject):
    path = tmp_path / "shards" / "a-0.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {**states(), "done": torch.tensor([0, 2])}
    head: dict[str, Any] = {"configuration": CONFIGURATION, "labels": ["a", "b"], "dropped": 1}
    save_tensors(path, SHARD, SHARD_VERSION, tensors, head)
    read_shard(path)
    if data.draw(st.booleans()):
        head = data.draw(swapped(head).filter(lambda each: isinstance(each, dict)))
    else:
        tensors = data.draw(reshaped(tensors))
    save_tensors(path, SHARD, SHARD_VERSION, tensors, head)
    holds(read_shard, path)


@MANY
@given(data=st.data())
def test_parts_that_hold_something_else(tmp_path: Path, data: st.DataObject):
    store = Store(tmp_path)
    part = Part(Mitigation("untreated"), [{"prompt": "a", "seed": 0}, {"prompt": "a", "seed": 1}], 2, 1.0, "m")
    path = tmp_path / f"{part.key}.safetensors"
    tensors = {"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "allotted": torch.tensor([0, -1])}
    head: dict[str, Any] = {"arm": "untreated", "seconds": 1.5}
    save_tensors(path, DRAWN, 1, tensors, head)
    assert store.read([part, part]).images.shape == (4, 3, 4, 4)
    if data.draw(st.booleans()):
        head = data.draw(swapped(head).filter(lambda each: isinstance(each, dict)))
    else:
        tensors = data.draw(reshaped(tensors))
    save_tensors(path, DRAWN, 1, tensors, head)
    holds(lambda _: store.read([part, part]), path)


@MANY
@given(data=st.data())
def test_unfinished_plans_that_hold_something_else(tmp_path: Path, data: st.DataObject):
    path = tmp_path / "unfinished.safetensors"
    tensors = {"factors": torch.ones(2, 3), "roots": torch.zeros(2, 3)}
    kept = Unfinished(path, {"root": "group", "seeds": [0, 1]}, neurons=3, steps=4)
    said = dict.fromkeys(("timestep", "before", "after", "off_axis", "damping"), 1.5)
    kept.keep([Planned(factor, root, said) for factor, root in zip(*tensors.values(), strict=True)])
    assert len(kept.read()) == 2
    tensors, head = load_tensors(path, PLAN, PLAN_VERSION)
    if data.draw(st.booleans()):
        head = data.draw(swapped(head).filter(lambda each: isinstance(each, dict)))
    else:
        tensors = data.draw(reshaped(tensors))
    save_tensors(path, PLAN, PLAN_VERSION, tensors, head)
    holds(lambda _: kept.read(), path)


@pytest.mark.parametrize("kind", TEXTS)
@FEW
@given(data=st.data())
def test_damaged_texts(tmp_path: Path, kind: str, data: st.DataObject):
    ending, whole, read = TEXTS[kind]
    path = tmp_path / f"text{ending}"
    path.write_bytes(whole)
    read(path)
    path.write_bytes(data.draw(damage(whole)))
    holds(read, path)


@pytest.mark.parametrize("kind", ["results", "classes in JSON"])
@MANY
@given(data=st.data())
def test_json_that_holds_something_else(tmp_path: Path, kind: str, data: st.DataObject):
    ending, whole, read = TEXTS[kind]
    path = tmp_path / f"text{ending}"
    path.write_text(json.dumps(data.draw(swapped(json.loads(whole)))))
    holds(read, path)


@st.composite
def toml(draw: st.DrawFn, text: str) -> str:
    """A line's value swapped for one of another type."""
    values = [
        "0xfff",
        "-1",
        "1e400",
        "nan",
        "true",
        '""',
        '"x"',
        "[]",
        "[1]",
        "[[]]",
        '["a"]',
        "{}",
        "1979-05-27",
        '["",0]',
    ]
    values += ["{ a = 1 }", "0x" + "f" * 6000, "[" * 200 + "]" * 200, '"\\u0000"', '["", " "]']
    lines = text.split("\n")
    valued = [i for i, line in enumerate(lines) if re.match(r"[\w-]+ = ", line)]
    i = draw(st.sampled_from(valued))
    lines[i] = lines[i].split(" = ", 1)[0] + " = " + draw(st.sampled_from(values))
    return "\n".join(lines)


@pytest.mark.parametrize("kind", ["axis", "composite", "protocol", "world", "classes"])
@MANY
@given(data=st.data())
def test_toml_that_holds_something_else(tmp_path: Path, kind: str, data: st.DataObject):
    ending, whole, read = TEXTS[kind]
    path = tmp_path / f"text{ending}"
    path.write_text(data.draw(toml(whole.decode())))
    holds(read, path)


@FEW
@given(data=st.data())
def test_damaged_parquet(tmp_path: Path, data: st.DataObject):
    import pyarrow
    from pyarrow import parquet

    whole, path = tmp_path / "whole.parquet", tmp_path / "damaged.parquet"
    if not whole.exists():
        table = pyarrow.table({"prompt": ["a photo of a doctor", "a photo of a nurse"] * 20, "occupation": [""] * 40})
        parquet.write_table(table, whole)
        assert len(load_prompts(whole)) == 2
    path.write_bytes(data.draw(damage(whole.read_bytes())))
    holds(load_prompts, path)


@given(st.text())
def test_file_names_made_from_texts_stay_in_their_folder(text: str):
    name = slug(text)
    assert re.fullmatch(r"[a-z0-9-]{1,60}", name)
    assert (Path("/folder") / f"{name}-1.png").parent == Path("/folder")
    assert Site(name, "ff", 1).name == name
