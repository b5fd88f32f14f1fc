"""Pictures that show nothing: a few seeds are left out, more than that and nothing is judged."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tests.evaluation.conftest import AXIS, parts

from stereoclinic.errors import Incomplete
from stereoclinic.evaluation.arms import Protocol
from stereoclinic.evaluation.draw import Store, draw
from stereoclinic.evaluation.experiment import Arm, drawn, run
from stereoclinic.evaluation.methods.base import Batch, Mitigation
from stereoclinic.evaluation.readers import PortraitsReader
from stereoclinic.pipelines.images import check_blank
from stereoclinic.pipelines.watch import Call, Visit, Walk
from stereoclinic.prompts.sets import load_prompts, with_seeds, write
from stereoclinic.report.page import build_page
from stereoclinic.report.pictures import grids


class Spoilt(Mitigation):
    """Predictions that are not finite, for some samples."""

    def __init__(self, name: str, *spoilt: tuple[str, int]) -> None:
        super().__init__(name)
        self.spoilt = spoilt

    def key(self) -> str:
        return f"{self.name} {self.spoilt}"

    def begin(self, rows: list[dict]) -> Batch:
        spoilt = [i for i, row in enumerate(rows) if (row["prompt"], row["seed"]) in self.spoilt]

        def prepare(walk: Walk) -> Visit:
            def visit(call: Call) -> None:
                call.reply = call.own().index_fill(0, torch.tensor(spoilt, dtype=torch.long), torch.nan)

            return visit

        return Batch([row["prompt"] for row in rows], prepare)


def test_pictures_that_show_nothing_are_named_and_none_is_judged(model, rows, tmp_path: Path):
    """Also those that another run has left in the folder."""
    store, prompt, seed = Store(tmp_path), rows[4]["prompt"], rows[4]["seed"]
    cut = parts(model, rows, Spoilt("a", (prompt, seed)), 6)
    says = rf"1 of 6 images show nothing .*'{prompt}', seed {seed} \(a\); that is more than 1%"
    with pytest.raises(Incomplete, match=says):
        draw(model, cut, store, accelerator="cpu")
    assert store.read(cut).blank == (4,)
    reader, protocol = (
        PortraitsReader(model.folder / "reader"),
        Protocol(AXIS, load_prompts("portraits", 3), 2, 0, 40, 2),
    )
    arm = Arm("a", Spoilt("a", (prompt, seed)), rows, 2)
    with pytest.raises(Incomplete, match=says):
        drawn(model, reader, protocol, [arm], parts=tmp_path, accelerator="cpu")


def test_many_pictures_that_show_nothing_are_not_all_named():
    names = [f"'a nurse', seed {i} (a)" for i in range(40)]
    said = check_blank(names, 4000)
    assert said.startswith("40 of 4000 images") and said.endswith("seed 4 (a) and 35 more") and len(said) < 300
    assert check_blank([], 10) is None
    with pytest.raises(Incomplete, match="no images are judged"):
        check_blank(names, 3999)


def test_the_seed_of_a_picture_that_shows_nothing_is_left_out_of_all_arms(model, tmp_path: Path):
    samples = list(with_seeds(load_prompts("portraits", 3), 40, 20))
    reader, protocol = (
        PortraitsReader(model.folder / "reader"),
        Protocol(AXIS, load_prompts("portraits", 3), 20, 0, 40, 1),
    )
    arms = [Arm("a", Spoilt("a"), samples, 20), Arm("b", Spoilt("b", (samples[22]["prompt"], 47)), samples, 20)]
    said: list[str] = []
    run = partial(drawn, model, reader, protocol, parts=tmp_path, warn=said.append, accelerator="cpu")
    (whole,) = run(arms[:1])
    assert whole.seeds == tuple(range(40, 60)) and not said
    one, other = run(arms)
    assert len(said) == 1 and "1 of 120 images show nothing" in said[0] and "seed 47 (b)" in said[0]
    expected = whole.only([place for place in range(20) if place != 7])
    assert one.seeds == other.seeds == expected.seeds and 47 not in one.seeds and len(one.seeds) == 19
    assert torch.equal(one.images, expected.images) and torch.equal(one.reads, expected.reads)
    assert (other.images.int() - expected.images.int()).abs().max() <= 1 and one.others.keys() == other.others.keys()


def test_results_say_which_seeds_are_left_out(model):
    prompts = load_prompts("portraits", 2)
    protocol = Protocol(AXIS, prompts, 10, 0, 30, steps=1)
    spoilt = Spoilt("spoilt", (write(prompts[1]), 30))
    experiment = run(
        model, PortraitsReader(model.folder / "reader"), protocol, {}, baselines=[spoilt], warn=lambda text: None
    )
    results = experiment.results
    assert results["left_out"] == {"pictures": 1, "seeds": {"neutral": [30]}}
    assert results["images_per_prompt"] == 9 and results["seeds"] == [31, 39]
    assert {arm["images"] for arm in results["arms"].values()} == {18}
    (grid,) = grids([experiment])
    assert grid.cards[0].rows[0][1][0].seed == 31
    assert "blank images: 1 (their seeds are left out)" in build_page({"provenance": {}, "experiments": [results]})
