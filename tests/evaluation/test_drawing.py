"""Drawing in parts: each is drawn once, whatever was there before, and however the work is cut."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.evaluation.conftest import AXIS, parts

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.draw import Pictures, Store, draw, model_digest
from stereoclinic.evaluation.experiment import Arm, drawn
from stereoclinic.evaluation.methods.base import Batch, Mitigation
from stereoclinic.evaluation.methods.oracles import AllocationOracle, BalancedOracle
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.io.tensors import load_tensors, save_tensors
from stereoclinic.pipelines.memory import Peak
from stereoclinic.prompts.axes import load_axis
from stereoclinic.prompts.sets import load_prompts, with_seeds


class Counting(Mitigation):
    """The model as it is, and how often it was asked."""

    def __init__(self, name: str, fails_after: int | None = None, most: int | None = None) -> None:
        super().__init__(name)
        self.begun, self.inside, self.fails_after, self.most = 0, False, fails_after, most

    def __enter__(self) -> "Counting":
        self.inside = True
        return self

    def __exit__(self, *failure: object) -> None:
        self.inside = False

    def begin(self, rows: list[dict]) -> Batch:
        assert self.inside
        if self.most is not None and len(rows) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        if self.begun == self.fails_after:
            raise ZeroDivisionError
        self.begun += 1
        return super().begin(rows)


def test_what_was_drawn_is_not_drawn_again(model, rows, tmp_path: Path):
    store, counting = Store(tmp_path), Counting("a")
    cut = parts(model, rows, counting)
    assert draw(model, cut, store, accelerator="cpu")
    first = store.read(cut)
    assert counting.begun == 3 and first.images.shape == (6, 3, 64, 64) and first.seconds > 0
    counted: list[tuple[str, int]] = []
    assert draw(model, cut, store, lambda *done: counted.append(done), accelerator="cpu")
    assert counting.begun == 3 and counted == [("a", 2)] * 3
    assert torch.equal(store.read(cut).images, first.images)


def test_a_run_that_was_cut_off_goes_on_and_ends_the_same(model, rows, tmp_path: Path):
    whole, broken = Store(tmp_path / "whole"), Store(tmp_path / "broken")
    expected = parts(model, rows, Counting("a"))
    draw(model, expected, whole, accelerator="cpu")
    with pytest.raises(ZeroDivisionError):
        draw(model, parts(model, rows, Counting("a", fails_after=2)), broken, accelerator="cpu")
    with pytest.raises(Incomplete, match="missing"):
        broken.read(expected)
    resumed = Counting("a")
    draw(model, parts(model, rows, resumed), broken, accelerator="cpu")
    assert resumed.begun == 1
    assert torch.equal(broken.read(expected).images, whole.read(expected).images)
    assert not list((tmp_path / "broken").glob("*.tmp"))


def test_pictures_do_not_depend_on_how_much_fits_in_memory(model, rows, tmp_path: Path):
    whole, halved, said = Store(tmp_path / "whole"), Store(tmp_path / "halved"), []
    cut = parts(model, rows, Counting("a"), 6)
    draw(model, cut, whole, accelerator="cpu")
    draw(model, parts(model, rows, Counting("a", most=3), 6), halved, warn=said.append, accelerator="cpu")
    difference = whole.read(cut).images.int() - halved.read(cut).images.int()
    assert difference.abs().max() <= 1  # of 255: rounding
    assert len(said) == 1 and "going on with 3" in said[0]


def test_keys_tell_apart_whatever_changes_a_picture(model, rows, tmp_path: Path):
    def key(mitigation: Mitigation = Mitigation("a"), those: list[dict] = rows, **how: object) -> str:  # noqa: B008
        return parts(model, those, mitigation, len(those), **how)[0].key

    others = [
        key(those=rows[:3]),
        key(those=[{**row, "seed": row["seed"] + 1} for row in rows]),
        key(steps=3),
        key(guidance=2.0),
        key(model="another"),
        key(BalancedOracle(AXIS)),
        key(BalancedOracle(AXIS, (0.0, 0.5))),
        key(BalancedOracle(load_axis("age"))),
        key(AllocationOracle(AXIS)),
        key(AllocationOracle(AXIS, torch.tensor([0.3, 0.7], dtype=torch.float64))),
    ]
    # What is written for a group goes by its place in the prompt, which the neutral prompt does not show.
    moved = []
    for text in ("a portrait of a {group} person as a nurse", "a portrait of a person as a {group} nurse"):
        (tmp_path / "prompts.txt").write_text(text)
        moved.append(list(with_seeds(load_prompts(tmp_path / "prompts.txt"), 0, 1)))
    assert moved[0][0]["prompt"] == moved[1][0]["prompt"] and key(those=moved[0]) == key(those=moved[1])
    others += [key(oracle, those) for oracle in (AllocationOracle(AXIS), BalancedOracle(AXIS)) for those in moved]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(Mitigation("of another name"))  # the same pictures


def test_the_models_digest_follows_weights_and_scheduler(model):
    before = model_digest(model)
    weight = model.pipe.vae.decoder.conv_out.bias
    kept, scheduler = weight.data.clone(), model.pipe.scheduler
    weight.data += 1
    assert model_digest(model) != before
    weight.data.copy_(kept)
    assert model_digest(model) == before
    model.pipe.scheduler = type(scheduler).from_config(scheduler.config, beta_schedule="scaled_linear", beta_end=0.1)
    assert model_digest(model) != before
    model.pipe.scheduler = scheduler
    vae = model.pipe.vae
    factor = vae.config.scaling_factor
    vae.register_to_config(scaling_factor=2 * factor)
    assert model_digest(model) != before
    vae.register_to_config(scaling_factor=factor)
    assert model_digest(model) == before


def test_the_most_memory_of_a_gpu_is_kept_with_the_pictures(model, rows, tmp_path: Path, monkeypatch):
    used = {"bytes": 7 << 20}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: used.update(bytes=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used["bytes"])
    with Peak(torch.device("cuda", 0)) as peak:
        used["bytes"] += 3 << 20
    assert peak.bytes == 3 << 20
    with Peak(torch.device("cpu")) as unknown:
        pass
    assert unknown.bytes is None

    store, made = Store(tmp_path), parts(model, rows, Mitigation("untreated"), 2)
    draw(model, made, store, accelerator="cpu")
    assert store.read(made).memory is None
    for part, taken in zip(made, (2 << 20, None, 5 << 20), strict=True):
        store.keep(part, replace(store.read([part]), memory=taken))
    assert store.read(made).memory == 5 << 20


def test_allotted_groups_come_back_in_the_samples_order(model, rows, tmp_path: Path):
    store, oracle = Store(tmp_path), AllocationOracle(AXIS)
    draw(model, cut := parts(model, rows, oracle, 4), store, accelerator="cpu")
    assert store.read(cut).allotted.tolist() == oracle.begin(rows).allotted.tolist()


def test_fewer_batches_than_devices_and_folders_that_cannot_be_made(model, rows, tmp_path: Path):
    with pytest.raises(InputError, match=r"1 batches for 2 devices: give fewer devices, or a smaller --batch-size"):
        draw(
            model, parts(model, rows, Mitigation("a"), 6), Store(tmp_path), accelerator="cpu", devices=2,
            strategy="ddp",
        )  # fmt: skip
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        Store(tmp_path / "file" / "parts")


def test_a_damaged_part_is_named(model, rows, tmp_path: Path):
    store, (part,) = Store(tmp_path), parts(model, rows, Mitigation("a"), 6)
    store.keep(part, Pictures(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), None, 1.0))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        store.read([part])


@pytest.mark.parametrize("amiss", ["swapped", "damaged", "cut short", "of an earlier version"])
def test_pictures_that_are_not_those_they_stand_for_are_set_aside_and_drawn_again(
    model, rows, tmp_path: Path, amiss: str
):
    store = Store(tmp_path)
    cut = parts(model, rows, Counting("a"), 6) + parts(model, rows, BalancedOracle(AXIS), 6)
    draw(model, cut, store, accelerator="cpu")
    before = [store.read([each]).images for each in cut]
    assert not torch.equal(*before)
    one, two = (tmp_path / f"{each.key}.safetensors" for each in cut)
    if amiss == "swapped":
        contents = one.read_bytes(), two.read_bytes()
        one.write_bytes(contents[1])
        two.write_bytes(contents[0])
    elif amiss == "damaged":
        content = bytearray(one.read_bytes())
        content[-1] ^= 1
        one.write_bytes(content)
    elif amiss == "cut short":
        one.write_bytes(one.read_bytes()[:-100])
    else:
        tensors, about = load_tensors(one, "drawn", 1)
        save_tensors(one, "drawn", 1, tensors, {name: value for name, value in about.items() if name != "content"})
    with pytest.raises(InputError, match=one.name):
        store.read(cut)
    said: list[str] = []
    draw(model, cut, Store(tmp_path), warn=said.append, accelerator="cpu")
    (line,) = said
    assert one.name in line and "set aside as *.set-aside and drawn again" in line
    assert one.with_suffix(".set-aside").is_file() and two.with_suffix(".set-aside").exists() == (amiss == "swapped")
    for each, images in zip(cut, before, strict=True):
        assert torch.equal(store.read([each]).images, images)


def test_times_of_different_devices_are_not_compared(model, rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reader = PortraitsReader(model.folder / "reader")
    protocol = Protocol(AXIS, load_prompts("portraits", 3), 2, 0, 40, 2, 1.0, 6)
    arms = [Arm(name, Counting(name), rows, 2) for name in ("a", "b")]
    monkeypatch.setattr(Counting, "key", lambda self: self.name)
    run = partial(drawn, model, reader, protocol, arms, parts=tmp_path, accelerator="cpu")
    assert all(each.seconds > 0 for each in run())
    store, (part,) = Store(tmp_path), arms[0].parts(protocol, model_digest(model))
    store.keep(part, replace(store.read([part]), device="NVIDIA H100"))
    said: list[str] = []
    assert [each.seconds for each in run(warn=said.append)] == [None, None]
    assert len(said) == 1 and "(NVIDIA H100, cpu)" in said[0]
