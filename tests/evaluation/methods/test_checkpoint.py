"""Comparators that are kept: what is read is what was made, and whoever waits for it gets it, or gives up."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.evaluation.methods.conftest import AXIS, SMALL, Alternating, draw

from stereoclinic.errors import Incomplete, InputError
from stereoclinic.evaluation.methods import BASELINES, baseline_class
from stereoclinic.evaluation.methods import checkpoint as kept
from stereoclinic.evaluation.methods.checkpoint import kept_baselines
from stereoclinic.io.tensors import load_tensors, save_tensors


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings under which making takes no time; and a wait of no patience."""
    for name, settings in SMALL.items():
        monkeypatch.setattr(baseline_class(name), "defaults", settings)
    monkeypatch.setattr(kept, "PATIENCE", 0.5)
    monkeypatch.setattr(kept, "EVERY", 0.01)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("made again")


def test_what_is_read_is_what_was_made(model, samples, calibration, rows, tmp_path: Path, monkeypatch):
    """By every rank and again: the same key, cost and pictures."""
    made: list[str] = []
    first = kept_baselines(list(BASELINES), model, AXIS, samples, calibration, tmp_path, making=made.append)
    assert made == [name for name in BASELINES if name != "prompt"] and len(list(tmp_path.iterdir())) == len(made)
    anew = [baseline_class(name).fit(model, AXIS, samples, calibration) for name in BASELINES]
    for name in made:
        monkeypatch.setattr(baseline_class(name), "fit", never)
    again = kept_baselines(list(BASELINES), model, AXIS, samples, calibration, tmp_path)
    other = kept_baselines(list(BASELINES), model, AXIS, samples, calibration, tmp_path, makes=False)
    for one, *rest in zip(anew, first, again, other, strict=True):
        assert {each.key() for each in rest} == {one.key()}
        assert rest[0].cost == rest[1].cost == rest[2].cost == replace(one.cost, seconds=rest[0].cost.seconds)
        assert torch.equal(draw(model, rest[1], rows), draw(model, one, rows))


def test_whatever_it_is_made_from_has_a_file_of_its_own(model, samples, calibration, tmp_path: Path, monkeypatch):
    def file(samples=samples, calibration=calibration) -> None:
        kept_baselines(["equisteer"], model, AXIS, samples, calibration, tmp_path)

    class Other(Alternating):
        classes = {"gender": AXIS.groups, "age": ("young", "old")}  # noqa: RUF012

    changes = [
        {},
        {"samples": samples[:-1]},
        {"samples": [{**row, "seed": row["seed"] + 1} for row in samples]},
        *({"calibration": replace(calibration, **{name: value})} for name, value in (
            ("steps", 2), ("guidance", 1.0), ("shares", {"female": 0.3, "male": 0.7}), ("reader", Other()),
        )),
    ]  # fmt: skip
    for change in changes * 2:
        file(**change)
    bias = model.pipe.vae.decoder.conv_out.bias
    before = bias.data.clone()
    bias.data += 1
    file()
    bias.data.copy_(before)
    monkeypatch.setattr(
        baseline_class("equisteer"), "defaults", replace(baseline_class("equisteer").defaults, strength=2.0)
    )
    file()
    assert len(list(tmp_path.iterdir())) == len(changes) + 2


@pytest.mark.parametrize("how", ["cut short", "a bit", "of another name", "another cost"])
def test_a_damaged_file_is_named(model, samples, calibration, tmp_path: Path, how: str):
    arguments = (["h-space"], model, AXIS, samples, calibration, tmp_path)
    kept_baselines(*arguments)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if how == "cut short":
        file.write_bytes(content[:-9])
    elif how == "a bit":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "of another name":
        kept_baselines(*arguments[:3], samples[:3], calibration, tmp_path)
        (other,) = set(tmp_path.iterdir()) - {file}
        other.replace(file)
    else:
        tensors, about = load_tensors(file, kept.KIND, kept.VERSION)
        save_tensors(file, kept.KIND, kept.VERSION, tensors, {**about, "cost": {"seconds": -1}})
    with pytest.raises(InputError, match=f"{file.name} (is truncated|holds something else than was made; remove it)"):
        kept_baselines(*arguments)


def test_a_rank_waits_as_long_as_the_first_gives_signs(model, samples, calibration, tmp_path: Path, monkeypatch):
    """A hundred looks, of which every tenth sees a sign; patience is for fifty."""
    arguments = (["h-space"], model, AXIS, samples, calibration)
    (made,) = kept_baselines(*arguments, tmp_path / "elsewhere")
    (done,) = (tmp_path / "elsewhere").iterdir()
    folder, looks = tmp_path / "parts", []
    signs = (folder / done.name).with_suffix(".making")

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) % 10 == 0:
            kept._give(signs)
        if len(looks) == 100:
            done.replace(folder / done.name)
            signs.unlink()

    # Of this module alone: other threads sleep as well.
    monkeypatch.setattr(kept, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: sum(looks)))
    (read,) = kept_baselines(*arguments, folder, makes=False)
    assert read.key() == made.key() and len(looks) == 100


def test_a_rank_whose_folder_stays_empty_gives_up(model, samples, calibration, tmp_path: Path):
    with pytest.raises(Incomplete, match=r"nothing showed for 0.5 s .* with a folder that all devices share"):
        kept_baselines(["prompt", "uce"], model, AXIS, samples, calibration, tmp_path, makes=False)


def test_the_signs_of_work_go_with_it(model, samples, calibration, tmp_path: Path, monkeypatch):
    seen: list[int] = []

    def fit(*arguments: Any) -> Any:
        arguments[-1]("h-space", 4)
        seen.extend(each.stat().st_size for each in tmp_path.glob("*.making"))
        raise KeyboardInterrupt

    monkeypatch.setattr(baseline_class("h-space"), "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        kept_baselines(["h-space"], model, AXIS, samples, calibration, tmp_path)
    assert seen == [2] and not list(tmp_path.iterdir())
