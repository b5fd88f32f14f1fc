"""A file's size bounds the memory that reading it takes: what claims more is refused before anything is made for it."""

import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from tests.fuzz.made import a_mask, a_relevance

from stereoclinic.errors import InputError
from stereoclinic.io.reading import MOST, MOST_TOML, check_plain
from stereoclinic.io.tensors import load_tensors, save_tensors

#: Reads each file that it is given and prints by how many bytes the process grew, and what it was told.
_READ = """
import json, resource, sys
from pathlib import Path
from stereoclinic.prompts.axes import load_axis
from stereoclinic.ddtd.relevance import Relevance
from stereoclinic.errors import InputError
from stereoclinic.evaluation.references import load_confusion
from stereoclinic.evaluation.results import Results
from stereoclinic.prompts.sets import load_prompts
from stereoclinic.sns.mask import NeuronMask
from tests.fuzz.made import a_mask, a_relevance
read = {
    "mask": NeuronMask.load, "relevance": Relevance.load, "axis": load_axis, "results": Results.load,
    "confusion": lambda path: load_confusion(path, ("female", "male")), "prompts": load_prompts,
}
folder = Path(sys.argv[1])
a_mask().save(folder / "mask-whole.pt")
a_relevance().save(folder / "relevance-whole.pt")
for path in sorted(folder.glob("*-whole.pt")):
    read[path.name.split("-")[0]](path)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for path in sorted(folder.iterdir()):
    if path.name.endswith("-whole.pt"):
        continue
    before = peak()
    try:
        read[path.name.split("-")[0]](path)
        said = None
    except InputError as error:
        said = str(error)
    print(json.dumps([path.name, peak() - before, said]), flush=True)
"""


def archive(pickle: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A .pt file of a pickle, with one entry of numbers."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", compression) as file:
        file.writestr("m/data.pkl", pickle)
        file.writestr("m/data/0", b"\0" * 12)
    return held.getvalue()


def header(text: bytes, claimed: int | None = None) -> bytes:
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text


def bombs(folder: Path) -> None:
    """Small files that ask for a lot."""
    texts = b"\x80\x02}X\x0c\x00\x00\x00stereoclinicX" + (2**28).to_bytes(4, "little") + b"a" * 2**28 + b"s."
    (folder / "mask-compressed.pt").write_bytes(archive(texts, zipfile.ZIP_DEFLATED))
    (folder / "mask-bytearray.pt").write_bytes(archive(b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R."))
    (folder / "mask-memo.pt").write_bytes(archive(b"\x80\x02}r\xff\xff\xff\x7f."))
    (folder / "mask-dicts.pt").write_bytes(archive(b"\x80\x02" + b"}" * 10_000_000 + b"."))
    whole = bytearray(archive(b"\x80\x02}."))
    for signature, at in (
        (b"PK\x03\x04", 18),
        (b"PK\x01\x02", 20),
    ):  # both sizes of the last entry, wherever they stand
        start = whole.rindex(signature) + at
        whole[start : start + 8] = (2**31).to_bytes(4, "little") * 2
    (folder / "mask-claims.pt").write_bytes(whole)
    shared = torch.zeros(2**22)
    many = {"stereoclinic": "{}", **{f"t{i}": shared for i in range(900)}}
    torch.save(many, folder / "mask-shared.pt")
    (folder / "mask-header.safetensors").write_bytes(header(b"{}", 2**62))
    (folder / "mask-spaces.safetensors").write_bytes(header(b" " * (MOST + 1)))
    shape = b'{"t":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}'
    (folder / "mask-shape.safetensors").write_bytes(header(shape) + b"\0" * 4)
    save_tensors(folder / "mask-nested.safetensors", "mask", 2, {}, {})
    deep = json.dumps({"stereoclinic": "[" * 5_000_000})
    (folder / "mask-nested.safetensors").write_bytes(header(f'{{"__metadata__":{deep}}}'.encode()))
    found = a_relevance()
    tensors = {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}
    tensors["timesteps"] = torch.zeros(2**40, 0)
    head = {"sites": [["a.conv2", "conv", 2**60]], "groups": ["a", "b"], "labels": ["a"]}
    save_tensors(folder / "relevance-sizes.pt", "relevance", 2, tensors, head)
    (folder / "axis-dots.toml").write_bytes(b"a." * 100_000 + b"a = 1")
    (folder / "axis-arrays.toml").write_bytes(b"a = " + b"[" * 200_000)
    (folder / "axis-large.toml").write_bytes(b"#" * (MOST_TOML + 1))
    (folder / "axis-number.toml").write_bytes(b"name = 0x" + b"f" * 200_000)
    (folder / "results-nested.json").write_bytes(b"[" * 5_000_000)
    (folder / "results-large.json").write_bytes(b" " * (MOST + 1))
    (folder / "confusion-large.csv").write_bytes(b"group,read,count\n" + b"a,b,1\n" * (MOST // 6))
    (folder / "confusion-line.csv").write_bytes(b"group,read,count\n" + b"a" * 4_000_000)
    (folder / "prompts-line.txt").write_bytes(b"a photo of a " + b"doctor" * 2_000_000)
    same = pyarrow.array(["a photo of a doctor"]).dictionary_encode()
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0]).take(pyarrow.array([0] * 3_000_000)), same.dictionary)
    parquet.write_table(pyarrow.table({"prompt": rows}), folder / "prompts-rows.parquet")
    long = pyarrow.table({"prompt": ["a" * 2**27]})
    parquet.write_table(long, folder / "prompts-long.parquet", compression="zstd", use_dictionary=False)
    same = ["a" * 2**20]
    huge = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000, pyarrow.int32()), same)
    for kind in (pyarrow.string(), pyarrow.large_string()):
        table = pyarrow.table({"prompt": huge.cast(pyarrow.dictionary(pyarrow.int32(), kind))})
        parquet.write_table(table, folder / f"prompts-huge-{kind}.parquet", compression="zstd")
        table = pyarrow.table({"prompt": pyarrow.array(same * 50, kind)})
        parquet.write_table(table, folder / f"prompts-dense-{kind}.parquet", compression="zstd")
        how = {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
        parquet.write_table(table, folder / f"prompts-delta-{kind}.parquet", **how)
    nested = pyarrow.ListArray.from_arrays([0, 3_000_000], pyarrow.array(["a"] * 3_000_000))
    parquet.write_table(pyarrow.table({"prompt": nested}), folder / "prompts-nested.parquet")
    parquet.write_table(pyarrow.table({"other": nested}), folder / "prompts-other.parquet")
    (folder / "prompts-deep.json").write_bytes(b'{"prompt": ' + b"[" * 5_000_000)
    (folder / "prompts-lists.jsonl").write_bytes(b"[" * 5_000_000)
    (folder / "prompts-object.json").write_bytes(b'{"prompt": [' + b"[]," * 2_000_000)


def test_what_asks_for_more_than_it_holds_is_refused_before_it_is_made(tmp_path: Path):
    folder = tmp_path / "bombs"
    folder.mkdir()
    bombs(folder)
    run = subprocess.run(
        [sys.executable, "-c", _READ, str(folder)], capture_output=True, text=True, timeout=300,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = {name: (grew, said) for name, grew, said in map(json.loads, run.stdout.splitlines())}
    assert set(found) == {path.name for path in folder.iterdir() if not path.name.endswith("-whole.pt")}
    for name, (grew, said) in found.items():
        assert said is not None and "\n" not in said, name
        most = 30 * (folder / name).stat().st_size + 2**25
        assert grew <= min(most, 2**28), f"{name} of {(folder / name).stat().st_size:,} bytes took {grew:,}: {said}"


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_mask_of_other_shapes_than_it_says(tmp_path: Path, ending: str):
    path = tmp_path / f"m{ending}"
    a_mask().save(path)
    tensors, head = load_tensors(path, "mask", 2)
    head["sites"][0][2] = 2**60
    save_tensors(path, "mask", 2, tensors, head)
    with pytest.raises(InputError, match=r"factors of shape \(2, 2, 7\); expected \(2, 2, 1152921504606846980\)"):
        type(a_mask()).load(path)


def test_plain_data_is_shallow_small_and_without_what_a_terminal_obeys():
    check_plain({"a": [1, -(2**63), 2**64 - 1, 1.5, float("nan"), None, True, "ä\n\t"]})
    deep: list = []
    for _ in range(49):
        deep = [deep]
    check_plain(deep)
    for odd in ([deep], 2**64, -(2**63) - 1, "\x1b[2J", "\ud800", {"\x00": 1}):
        with pytest.raises(ValueError):
            check_plain(odd)
    with pytest.raises(ValueError, match="not finite"):
        check_plain([1e999], finite=True)


#: Pickles of a hundred kilobytes that take long to follow for whoever looks at all that lies below, again and again.
_SLOW = {
    "marks": b"N" * 40_000 + b"(t" * 29_000,
    "pairs of pairs": b")q\x00" + b"h\x00h\x00\x86q\x00" * 12_000 + b"h\x00\x93",
    "pairs as a name": b")q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"h\x00h\x00\x93",
    "a shape of many sizes": b"(" + b"K\x01" * 40_000 + b"tq\x00" + b"h\x000" * 20_000,
    "marks alone": b"(" * 99_000,
}


@pytest.mark.parametrize("name", _SLOW)
def test_a_pickle_is_refused_in_time_that_grows_with_its_length(tmp_path: Path, name: str):
    path = tmp_path / "slow.pt"
    path.write_bytes(archive(b"\x80\x02" + _SLOW[name] + b"."))
    began = time.perf_counter()
    with pytest.raises(InputError):
        load_tensors(path, "mask", 2)
    assert time.perf_counter() - began < 5  # it took minutes


def test_a_tensor_of_more_dimensions_than_ours_have(tmp_path: Path):
    for ending in (".pt", ".safetensors"):
        for dimensions in (9, 64):
            path = tmp_path / f"{dimensions}{ending}"
            save_tensors(path, "mask", 2, {"factors": torch.ones([1] * dimensions)}, {})
            with pytest.raises(InputError, match=r"not a plain tensor|truncated"):
                load_tensors(path, "mask", 2)


def test_a_tensor_that_claims_more_than_its_entry_holds(tmp_path: Path):
    path, held = tmp_path / "m.pt", io.BytesIO()
    save_tensors(path, "mask", 2, {"factors": torch.arange(100.0)}, {})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(held, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, content.replace(b"Kd", b"K\xc8") if name.endswith(".pkl") else content)
    path.write_bytes(held.getvalue())
    with pytest.raises(InputError, match="truncated"):
        load_tensors(path, "mask", 2)
